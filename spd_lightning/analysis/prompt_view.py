"""One prompt: its tokens, its nodes, its strongest edges, and what the target predicts."""

from dataclasses import dataclass

import polars as pl

from spd_lightning.analysis.graphs import tables
from spd_lightning.analysis.names import MOST_ROWS
from spd_lightning.analysis.normalize import Normalization, normalized
from spd_lightning.analysis.prompts import prompt_text
from spd_lightning.errors import BadInput, check_range
from spd_lightning.store import Store
from spd_lightning.store.tables import summed


@dataclass(frozen=True)
class PromptView:
    """The part of a prompt that passes the filters.

    Attributes:
        prompt_id: the prompt.
        text: its text.
        tokens: the texts of its tokens.
        nodes: columns node, kind, layer, pos, component, importance, activation.
        edges: columns source, target (numbers of nodes), attribution, strongest first.
        outputs: the likely next tokens: columns pos, token_id, token, ci_probability,
            target_probability, and logits.
        edges_total: the number of edges between the nodes; `edges` has only the `top_k` strongest.
    """

    prompt_id: int
    text: str
    tokens: list[str]
    nodes: pl.DataFrame
    edges: pl.DataFrame
    outputs: pl.DataFrame
    edges_total: int


def prompt(
    store: Store,
    prompt_id: int,
    top_k: int = 200,
    ci_threshold: float = 0.0,
    max_mean_ci: float = 1.0,
    output_prob_threshold: float = 0.0,
    normalize: Normalization = "none",
) -> PromptView:
    """Return one prompt, with its nodes and its strongest edges.

    Args:
        store: a harvest of prompts; without graphs, there are no edges.
        prompt_id: the prompt's id.
        top_k: the largest number of edges.
        ci_threshold: keep components with at least this importance.
        max_mean_ci: keep components whose mean importance over all positions of the harvest is at
            most this; it removes components that are always on.
        output_prob_threshold: keep outputs with at least this probability under importances as
            masks.
        normalize: the scale of the edges, computed from all edges of the prompt. Edges that are
            equal on this scale are ordered by their attributions.

    Raises:
        BadInput: the harvest has no such prompt, or a number is out of range.
    """
    check_range("prompt", least=0, most=MOST_ROWS, whole=True, top_k=top_k)
    check_range("prompt", least=0, most=1, ci_threshold=ci_threshold, max_mean_ci=max_mean_ci)
    check_range("prompt", least=0, most=1, output_prob_threshold=output_prob_threshold)
    rows = store.collect(store.scan("prompts", prompt_id)).to_dicts()
    if not rows:
        raise BadInput(f"prompt {prompt_id}: not in harvest '{store.path}'; list them with prompts")
    nodes, edges = tables(store, prompt_id)
    outputs = store.collect(store.scan("outputs", prompt_id)).drop("prompt_id")
    raw = edges["attribution"]
    edges = normalized(edges, nodes, normalize).with_columns(raw=raw)
    nodes = _visible(store, nodes, outputs, ci_threshold, max_mean_ci, output_prob_threshold)
    likely = pl.col("ci_probability").fill_null(1.0) >= output_prob_threshold
    visible = nodes["node"].implode()
    between = edges.filter(pl.col("source").is_in(visible), pl.col("target").is_in(visible))
    return PromptView(
        prompt_id=prompt_id,
        text=prompt_text(rows[0]),
        tokens=rows[0]["tokens"],
        nodes=nodes,
        edges=_strongest(between, top_k),
        outputs=outputs.filter(likely),
        edges_total=between.height,
    )


def _strongest(edges: pl.DataFrame, top_k: int) -> pl.DataFrame:
    """Return the strongest edges; the column `raw` has their attributions before normalization."""
    size = pl.col("raw").abs()
    in_order = edges.sort(-pl.col("attribution").abs(), -size, "source", "target")
    return in_order.head(top_k).drop("raw")


def _visible(
    store: Store,
    nodes: pl.DataFrame,
    outputs: pl.DataFrame,
    ci_threshold: float,
    max_mean_ci: float,
    output_prob_threshold: float,
) -> pl.DataFrame:
    """Return the nodes that pass the filters; only components have importances."""
    importance = pl.col("importance").cast(pl.Float64)
    nodes = nodes.filter(importance.is_null() | (importance >= ci_threshold))
    if max_mean_ci < 1 and "components" in store.tables:
        sums = store.collect(summed("components", store.scan("components")))
        mean = pl.col("importance_sum") / pl.col("positions")
        always_on = sums.filter(mean > max_mean_ci).select("layer", "component")
        always_on = always_on.with_columns(kind=pl.lit("component", nodes.schema["kind"]))
        nodes = nodes.join(
            always_on, on=["layer", "component", "kind"], how="anti", maintain_order="left"
        )
    if output_prob_threshold > 0:
        unlikely = outputs.filter(pl.col("ci_probability") < output_prob_threshold)
        unlikely = unlikely.select("pos", component="token_id")
        unlikely = unlikely.with_columns(kind=pl.lit("output", nodes.schema["kind"]))
        nodes = nodes.join(
            unlikely, on=["pos", "component", "kind"], how="anti", maintain_order="left"
        )
    return nodes
