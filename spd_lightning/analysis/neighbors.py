"""The sources and targets of a component, over the prompts of a harvest."""

from typing import Literal

import polars as pl

from spd_lightning.analysis.dataset_edges import strongest
from spd_lightning.analysis.names import MOST_ROWS, component_of
from spd_lightning.errors import BadInput, check_range, command, nearest
from spd_lightning.store import Store

Side = Literal["sources", "targets"]
SIDES: tuple[Side, ...] = ("sources", "targets")

GRAPHS = command("predict --config NAME.yaml --config graphs.yaml")
"""The command that makes graphs, for messages."""

MOST_PROMPTS = 200
"""The number of prompts whose graphs are read, if the harvest has no sums over all prompts."""


def neighbors(store: Store, name: str, side: Side = "sources", top: int = 20) -> pl.DataFrame:
    """Return the strongest sources of a component, or its strongest targets.

    Sources can also be inputs and embeddings; targets can also be outputs. Columns kind, layer,
    component, edges (their number), sum (of attributions), prompts (the number of prompts behind
    these). A harvest of sums covers all its prompts. In a harvest of graphs, only the 200 prompts
    are read on which the component has the largest importance.

    Args:
        store: a harvest of sums (`DatasetEdges`) or of graphs (`PromptGraphs`).
        name: `layer:component`.
        side: "sources" for what drives the component; "targets" for what it drives.
        top: the largest number of rows.

    Raises:
        BadInput: the harvest has no such component, or no edges.
    """
    if side not in SIDES:
        raise BadInput(f"side '{side[:60]}': {nearest(side, SIDES)}")
    check_range("neighbors", least=1, most=MOST_ROWS, whole=True, top=top)
    layer, component = component_of(store, name)
    if "dataset_edges" in store.tables:
        rows = strongest(store, layer, component, side, scale="sum", top_k=top)
        prompts = pl.lit(store.manifest["prompts"])
        return rows.select(
            "kind", "layer", "component", "edges", sum="to_activation", prompts=prompts
        )
    if "edges" not in store.tables:
        raise BadInput(f"harvest '{store.path}': it has no edges; to make graphs: {GRAPHS}")
    return _from_graphs(store, layer, component, side, top)


def _from_graphs(store: Store, layer: str, component: int, side: Side, top: int) -> pl.DataFrame:
    """Add up the edges of the graphs of the prompts on which a component is most important."""
    this, other = ("target", "source") if side == "sources" else ("source", "target")
    nodes = store.scan("nodes_by_component", component=(layer, component))
    own_nodes = store.collect(nodes.filter(pl.col("kind") == "component"))
    by_prompt = own_nodes.group_by("prompt_id").agg(pl.col("importance").max())
    prompts = by_prompt.sort(-pl.col("importance"), "prompt_id").head(MOST_PROMPTS)["prompt_id"]
    ends = own_nodes.lazy().select("prompt_id", pl.col("node").alias(this))
    frames = []
    for prompt in prompts:
        edges = store.scan("edges", prompt).join(ends, on=["prompt_id", this], how="semi")
        nodes = store.scan("nodes", prompt).select(
            pl.col("node").alias(other), "kind", "layer", "component"
        )
        frames.append(edges.join(nodes, on=other))
    if not frames:
        return pl.DataFrame(
            schema={
                "kind": pl.String,
                "layer": pl.String,
                "component": pl.UInt32,
                "edges": pl.UInt32,
                "sum": pl.Float64,
                "prompts": pl.UInt32,
            }
        )
    totals = pl.concat(frames).group_by("kind", "layer", "component")
    sums = totals.agg(edges=pl.len(), sum=pl.col("attribution").cast(pl.Float64).sum())
    ranked = sums.sort(-pl.col("sum").abs(), pl.col("layer").to_physical(), "component").head(top)
    return store.collect(ranked.with_columns(prompts=pl.lit(len(prompts), pl.UInt32)))
