"""Attribution graphs of prompts: whole graphs, their strongest edges, and the edges of one node.

An edge's strength is |attribution|. Ties are broken by (source, target), so that every result is
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
    """The part of one prompt's graph that passes the filters, and the size of the whole graph.

    `nodes` has the columns node, kind, layer, pos, component, importance, activation; `edges` has
    source, target, attribution, strongest first. `edges_total` counts the prompt's edges.
    `edges_passing` counts those above the threshold and between visible nodes, before the cut to
    `top_k`. `largest` is the largest finite |attribution| of the prompt (0 if there is none).
    `scores` say how much of the whole graph is explained.
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
    """Return the strongest edges of one prompt between sufficiently important nodes.

    Args:
        store: The harvest.
        prompt: The prompt's id.
        top_k: Keep at most this many edges.
        threshold: Keep edges with |attribution| of at least this share (0 to 1) of the prompt's
            largest.
        min_importance: Keep nodes of at least this importance. Nodes without an importance (inputs
            and outputs) always stay.
        influence: Before the other filters, keep the nodes that make up this share (0 to 1) of the
            influence on the outputs.

    Raises:
        BadInput: the harvest has no such prompt, or a file is damaged.
    """
    whole = whole_graph(store, prompt)
    part = pruned(whole, influence, edges=1.0) if influence < 1 else whole
    # In single precision, min_importance would be rounded.
    importance = pl.col("importance").cast(pl.Float64)
    is_visible = importance.is_null() | (importance >= min_importance)
    nodes = part.nodes.drop("weight").filter(is_visible)
    finite_strength = STRENGTH.filter(STRENGTH.is_finite())
    maximum = whole.edges.select(finite_strength.max()).item()
    largest = float(maximum or 0.0)
    visible = nodes["node"].implode()
    passing = part.edges.filter(
        STRENGTH.ge(threshold * largest),
        pl.col("source").is_in(visible),
        pl.col("target").is_in(visible),
    )
    return PromptGraph(
        nodes=nodes,
        edges=passing.sort(**STRONGEST_FIRST).head(top_k),
        nodes_total=len(whole.nodes),
        edges_total=len(whole.edges),
        edges_passing=len(passing),
        largest=largest,
        scores=scores(whole),
    )


def whole_graph(store: Store, prompt: int) -> Graph:
    """Return all stored nodes and edges of one prompt's graph, and the weight of each output.

    Raises:
        BadInput: the harvest has no such prompt, or a file is damaged.
    """
    nodes, edges = tables(store, prompt)
    if nodes.is_empty():
        raise BadInput(
            f"prompt {prompt} has no graph in harvest '{store.path}'; choose another prompt, or "
            "harvest this one"
        )
    outputs = store.scan("outputs", prompt).select(
        "pos", component="token_id", weight="ci_probability"
    )
    nodes = nodes.join(
        store.collect(outputs), on=["pos", "component"], how="left", maintain_order="left"
    )
    is_output = pl.col("kind") == "output"
    probability = pl.col("weight").cast(pl.Float64).fill_null(1.0)
    weight = pl.when(is_output).then(probability).otherwise(0.0)
    frozen = store.manifest["mode"] == "frozen"
    return Graph(nodes.with_columns(weight=weight), edges, frozen)


def node_name(node: Mapping[str, Any]) -> str:
    """Return a node's name `layer:pos:component`.

    For the rest and the bias of a site, the component is replaced by `rest` or `bias`.
    """
    layer = node["layer"]
    pos = node["pos"]
    kind = node["kind"]
    if kind in ("rest", "bias"):
        return f"{layer}:{pos}:{kind}"
    return f"{layer}:{pos}:{node['component']}"


def tables(store: Store, prompt: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the nodes, in order of their numbers, and the edges of one prompt's graph.

    The prompt can be `ALL_PROBES`.
    """
    if prompt == ALL_PROBES:
        prompts = probes(store)["prompt_id"]
        return _together(store, prompts)
    nodes = store.collect(store.scan("nodes", prompt))
    edges = store.collect(store.scan("edges", prompt))
    in_order = nodes.sort("node")
    return in_order.drop("prompt_id"), edges.drop("prompt_id")


def _together(store: Store, prompts: pl.Series) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Merge the graphs of several prompts: nodes at the same place become one node.

    Attributions and activations are summed, so a sum rule that holds for each graph (A6) holds for
    the merged one. A merged node gets the largest importance.
    """
    place = ["layer", "kind", "pos", "component"]
    is_merged = pl.col("prompt_id").is_in(prompts.implode())
    parts = store.collect(store.scan("nodes").filter(is_merged))
    parts = parts.sort(place)
    places = parts.group_by(place, maintain_order=True)
    merged_nodes = places.agg(pl.col("importance").max(), pl.col("activation").sum())
    nodes = merged_nodes.with_row_index("node")
    new_numbers = parts.select(place).join(nodes, on=place, how="left", maintain_order="left")
    numbers = parts.select("prompt_id", was="node")
    numbers = numbers.with_columns(now=new_numbers["node"])
    edges = store.collect(store.scan("edges").filter(is_merged))
    for end in ("source", "target"):
        renumbered = numbers.rename({"was": end, "now": f"{end}_now"})
        edges = edges.join(renumbered, on=["prompt_id", end])
    pairs = edges.group_by(source="source_now", target="target_now")
    merged_edges = pairs.agg(pl.col("attribution").sum())
    return nodes, merged_edges.sort("source", "target")


@dataclass(frozen=True)
class NodeEdges:
    """The strongest edges into and out of one node, and the sums over all of its edges.

    The frames are as in `PromptGraph.edges`. In the linearization `frozen`, `in_sum` equals the
    node's activation (law A6). In others, the gap between the two is what the linearization misses.
    """

    ins: pl.DataFrame
    outs: pl.DataFrame
    in_count: int
    out_count: int
    in_sum: float
    out_sum: float


def node_edges(store: Store, prompt: int, node: int, top_k: int = 20) -> NodeEdges:
    """Return the strongest in- and out-edges of a node, at most `top_k` of each."""
    _, edges = tables(store, prompt)
    ends_in = pl.col("target") == node
    starts_from = pl.col("source") == node
    strongest = edges.filter(starts_from | ends_in).sort(**STRONGEST_FIRST)
    ins = strongest.filter(ends_in)
    outs = strongest.filter(starts_from)
    return NodeEdges(
        ins=ins.head(top_k),
        outs=outs.head(top_k),
        in_count=len(ins),
        out_count=len(outs),
        in_sum=_total(ins),
        out_sum=_total(outs),
    )


def _total(edges: pl.DataFrame) -> float:
    """Return the sum of the attributions of some edges."""
    column = edges["attribution"]
    attributions = column.cast(pl.Float64)
    total = attributions.sum()
    return float(total)


def node_heads(store: Store, prompt: int, node: int) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """Return each head's contribution to a node's edges through attention.

    Returns:
        For each edge (source, target), a list of {head, attribution} in the order of heads; empty
        if the harvest has no heads.
    """
    if prompt == ALL_PROBES or "head_edges" not in store.tables:
        return {}
    starts_from = pl.col("source") == node
    ends_in = pl.col("target") == node
    terms = store.scan("head_edges", prompt).filter(starts_from | ends_in)
    in_order = store.collect(terms.sort("head"))
    attribution = finite(pl.col("attribution"))
    rows = in_order.with_columns(attribution).to_dicts()
    heads = dict[tuple[int, int], list[dict[str, Any]]]()
    for row in rows:
        edge = (row["source"], row["target"])
        term = {"head": row["head"], "attribution": row["attribution"]}
        heads.setdefault(edge, []).append(term)
    return heads
