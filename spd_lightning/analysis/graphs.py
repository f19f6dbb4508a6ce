"""Prompt graphs as a reader wants them: the whole of one, its strongest edges, and all that meets
in one node.

An edge's strength is |attribution|; ties are broken by (source, target), so that every answer is
reproducible.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from spd_lightning.analysis.influence import Graph, Scores, pruned, scores
from spd_lightning.analysis.prompts import ALL_PROBES, probes
from spd_lightning.errors import BadInput
from spd_lightning.store import Store, finite

STRENGTH = pl.col("attribution").cast(pl.Float64).abs()
STRONGEST_FIRST: dict[str, Any] = {
    "by": [STRENGTH, "source", "target"],
    "descending": [True, False, False],
}


@dataclass(frozen=True)
class PromptGraph:
    """The part of one prompt's attribution graph that passed the filters, and how much there was
    before them.

    `nodes` has the columns node, kind, layer, pos, component, importance, activation; `edges` has
    source, target, attribution, strongest first. `edges_total` counts the prompt's edges,
    `edges_passing` those above threshold and between visible nodes before the cut to top-k,
    `largest` is the largest finite |attribution| of the prompt (0 if none), `scores` say how much
    of the whole graph is explained.
    """

    nodes: pl.DataFrame
    edges: pl.DataFrame
    nodes_total: int
    edges_total: int
    edges_passing: int
    largest: float
    scores: Scores


def prompt_graph(
    store: Store,
    prompt: int,
    top_k: int = 200,
    threshold: float = 0.0,
    min_importance: float = 0.0,
    influence: float = 1.0,
) -> PromptGraph:
    """The strongest edges of one prompt, between the nodes whose causal importance suffices.

    Args:
        store: The harvest.
        prompt: The prompt's id.
        top_k: Keep at most so many edges.
        threshold: Keep edges with |attribution| of at least this share (0 to 1) of the prompt's
            largest.
        min_importance: Keep nodes of at least this importance; nodes without one (inputs, outputs)
            always stay.
        influence: Before all that, keep the nodes that make up this share (0 to 1) of the influence
            on the outputs.

    Raises:
        BadInput: the harvest has no such prompt, or a file is damaged.
    """
    whole = whole_graph(store, prompt)
    part = pruned(whole, influence, edges=1.0) if influence < 1 else whole
    nodes = part.nodes.drop("weight")
    edges = part.edges
    importance = pl.col("importance").cast(
        pl.Float64
    )  # else a threshold would be rounded to single precision
    visible = nodes.filter(importance.is_null() | (importance >= min_importance))
    largest = float(whole.edges.select(STRENGTH.filter(STRENGTH.is_finite()).max()).item() or 0.0)
    shown = visible["node"].implode()
    between = [pl.col(end).is_in(shown) for end in ("source", "target")]
    passing = edges.filter(STRENGTH.ge(threshold * largest), *between)
    strongest = passing.sort(**STRONGEST_FIRST).head(top_k)
    totals = len(whole.nodes), len(whole.edges)
    return PromptGraph(visible, strongest, *totals, len(passing), largest, scores(whole))


def whole_graph(store: Store, prompt: int) -> Graph:
    """One prompt's graph with all that was stored of it, and what each output weighs.

    Raises:
        BadInput: the harvest has no such prompt, or a file is damaged.
    """
    nodes, edges = tables(store, prompt)
    if nodes.is_empty():
        raise BadInput(
            f"prompt {prompt} has no graph in harvest '{store.path}'; choose another, or harvest it"
        )
    outputs = store.collect(
        store.scan("outputs", prompt).select("pos", component="token_id", weight="ci_probability")
    )
    found = nodes.join(outputs, on=["pos", "component"], how="left", maintain_order="left")
    weight = (
        pl.when(pl.col("kind") == "output")
        .then(pl.col("weight").cast(pl.Float64).fill_null(1.0))
        .otherwise(0.0)
    )
    return Graph(found.with_columns(weight=weight), edges, store.manifest["mode"] == "frozen")


def node_name(node: Mapping[str, Any]) -> str:
    """A node's name `layer:pos:component`; what is left of a site, and its bias, stand in the
    component's place.
    """
    which = node["kind"] if node["kind"] in ("rest", "bias") else node["component"]
    return f"{node['layer']}:{node['pos']}:{which}"


def tables(store: Store, prompt: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Nodes, in order of their numbers, and edges of one prompt's graph, or of all probes
    together.
    """
    if prompt == ALL_PROBES:
        return _together(store, probes(store)["prompt_id"])
    frames = (
        store.collect(store.scan(table, prompt)).drop("prompt_id") for table in ("nodes", "edges")
    )
    nodes, edges = frames
    return nodes.sort("node"), edges


def _together(store: Store, prompts: pl.Series) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The graphs of several prompts as one: the same place is one node; attributions and
    activations are summed.

    So a sum rule that holds for each of them (A6) holds for the whole. Of importances, the largest
    is kept.
    """
    place = ["layer", "kind", "pos", "component"]
    mine = pl.col("prompt_id").is_in(prompts.implode())
    found = store.collect(store.scan("nodes").filter(mine)).sort(place)
    nodes = found.group_by(place, maintain_order=True).agg(
        pl.col("importance").max(), pl.col("activation").sum()
    )
    nodes = nodes.with_row_index("node")
    numbers = found.select("prompt_id", was="node").with_columns(
        now=found.select(place).join(nodes, on=place, how="left", maintain_order="left")["node"]
    )
    edges = store.collect(store.scan("edges").filter(mine))
    for end in ("source", "target"):
        edges = edges.join(numbers.rename({"was": end, "now": f"{end}_now"}), on=["prompt_id", end])
    merged = edges.group_by(source="source_now", target="target_now").agg(
        pl.col("attribution").sum()
    )
    return nodes, merged.sort("source", "target")


@dataclass(frozen=True)
class NodeEdges:
    """The strongest edges into and out of one node, and the sums over all of them.

    Frames as in `PromptGraph.edges`. In the linearization `frozen`, `in_sum` equals the node's
    activation (law A6); in others the gap between the two is what the linearization leaves out.
    """

    ins: pl.DataFrame
    outs: pl.DataFrame
    in_count: int
    out_count: int
    in_sum: float
    out_sum: float


def node_edges(store: Store, prompt: int, node: int, top_k: int = 20) -> NodeEdges:
    """The strongest in- and out-edges (top_k each) of a node of one prompt's graph."""
    touching = (pl.col("source") == node) | (pl.col("target") == node)
    strongest = tables(store, prompt)[1].filter(touching).sort(**STRONGEST_FIRST)
    ins = strongest.filter(pl.col("target") == node)
    outs = strongest.filter(pl.col("source") == node)
    in_sum, out_sum = (float(side["attribution"].cast(pl.Float64).sum()) for side in (ins, outs))
    return NodeEdges(ins.head(top_k), outs.head(top_k), len(ins), len(outs), in_sum, out_sum)


def node_heads(store: Store, prompt: int, node: int) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """Return each head's contribution to a node's edges through attention.

    Returns:
        For each edge (source, target), a list of {head, attribution} in the order of heads; empty
        if the harvest has no heads.
    """
    if prompt == ALL_PROBES or "head_edges" not in store.tables:
        return {}
    touching = (pl.col("source") == node) | (pl.col("target") == node)
    terms = store.collect(store.scan("head_edges", prompt).filter(touching).sort("head"))
    found: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in terms.with_columns(finite(pl.col("attribution"))).to_dicts():
        own = {"head": row["head"], "attribution": row["attribution"]}
        found.setdefault((row["source"], row["target"]), []).append(own)
    return found
