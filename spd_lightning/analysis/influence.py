"""Influence: how much the outputs depend on each node of a prompt's graph, and pruning by it.

1. *Shares.* Divide each |attribution| by the sum of all that enters the same target. The result is
   Ã[target, source], whose rows add up to 1.
2. *Influence.* The weights p of the outputs flow back along the shares, over all paths:
   `p (Ã + Ã² + …)`. An edge always leads to a later layer, so the sum has finitely many terms.
3. *Selection.* `pruned` keeps the nodes, then the edges, that make up a share of all influence.
   `expanded` starts from the outputs and adds one node at a time. `scores` measures how much of a
   frozen graph is explained at all.

The idea and the two scores come from circuit-tracer. Here every graph is sparse and can have a
million edges.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
from scipy.sparse import csr_array

from spd_lightning.errors import BadInput

UNEXPLAINED = ("rest", "bias")
TOKENS = ("input", "embedding")


@dataclass(frozen=True)
class Graph:
    """The attribution graph of one prompt, or the part of it that a selection keeps.

    `nodes`, in order of their numbers, has the columns of the table `nodes` and `weight`. The
    weight of an output is its probability under CI masks, or 1 if outputs are not tokens; all other
    nodes have weight 0. `edges` has source, target, attribution. If `frozen`, in-edges add up (A6),
    so rest and bias nodes hold all that no component explains.
    """

    nodes: pl.DataFrame
    edges: pl.DataFrame
    frozen: bool = False

    @cached_property
    def shares(self) -> "_Shares":
        """Every edge's share of all |attribution| into its target."""
        return _Shares(self)


@dataclass(frozen=True)
class Scores:
    """How much of a graph is explained, from 0 to 1; None unless the graph is frozen.

    `replacement`: of the influence of all leaves, the share that comes from tokens and not from
    rests and biases. `completeness`: the share of a node's in-edges that comes from neither rests
    nor biases, averaged over nodes by influence, and over outputs by weight. A leaf has no in-edges
    and counts as 1, as in circuit-tracer.
    """

    replacement: float | None
    completeness: float | None


def influence(graph: Graph, outputs: Sequence[int] | None = None) -> pl.DataFrame:
    """Return each node's influence on the outputs: columns node, influence.

    Args:
        graph: The graph.
        outputs: The nodes to be influenced. An output counts by its weight, any other node as 1.
            All outputs if omitted.

    Raises:
        BadInput: one of `outputs` is not in the graph.
    """
    weights = _weights(graph, outputs)
    columns = {"node": graph.nodes["node"], "influence": graph.shares.flow_back(weights)}
    return pl.DataFrame(columns)


def outputs_at(graph: Graph, pos: int | None = None, token: int | None = None) -> list[int]:
    """Return the output nodes at a position, of a token (an output's entry), or of both.

    The other functions take them as `outputs`.

    Raises:
        BadInput: the graph has no such output.
    """
    is_output = pl.col("kind") == "output"
    outputs = graph.nodes.filter(is_output)
    chosen = outputs
    filters: list[str] = []
    if pos is not None:
        chosen = chosen.filter(pl.col("pos") == pos)
        filters.append(f"pos {pos}")
    if token is not None:
        chosen = chosen.filter(pl.col("component") == token)
        filters.append(f"token {token}")
    if chosen.is_empty():
        place = ", ".join(filters)
        first = outputs["pos"].min()
        last = outputs["pos"].max()
        raise BadInput(
            f"{place}: the graph has no such output; its outputs are at positions {first} to {last}"
        )
    numbers = chosen["node"]
    return numbers.to_list()


def pruned(
    graph: Graph, nodes: float = 0.8, edges: float = 0.98, outputs: Sequence[int] | None = None
) -> Graph:
    """Return the nodes that make up a share of all influence, and the edges that do so among them.

    The given outputs stay, and so do tokens with any influence. An edge's influence is its share
    times that of its target in the part that is left. A node whose in-edges, or whose out-edges,
    have all been cut is dropped too. A share of 1 cuts nothing.

    Raises:
        BadInput: a share lies outside 0 to 1, or one of `outputs` is not in the graph.
    """
    weights = _weights(graph, outputs)
    shares = graph.shares
    influences = shares.flow_back(weights)
    is_token = _is_kind(graph, TOKENS)
    is_used = influences > 0
    is_output = weights > 0
    always = is_output | (is_token & is_used)
    is_large = top(influences, nodes, "nodes")
    part = _keep_nodes(graph, is_large | always)
    stays = np.isin(_numbers(graph), _numbers(part))  # by node of the whole graph
    part = _keep_strong_edges(part, weights[stays], edges)
    return _drop_dead_ends(
        part,
        always=always[stays],
        first=~shares.has_in_edges()[stays],
        last=~shares.has_out_edges()[stays],
    )


def expanded(
    graph: Graph, budget: int, edges: float = 1.0, outputs: Sequence[int] | None = None
) -> Graph:
    """Return the given outputs and `budget` nodes, added one at a time by influence.

    Each step adds the node of most influence on the nodes chosen so far, counted along paths that
    visit no others. Edges are then cut as in `pruned`.

    Raises:
        BadInput: `budget` is negative, a share lies outside 0 to 1, or one of `outputs` is not in
            the graph.
    """
    if budget < 0:
        raise BadInput(f"budget {budget}: expected a number of nodes of at least 0")
    weights = _weights(graph, outputs)
    matrix = graph.shares.matrix
    chosen = weights > 0
    reach = weights.copy()  # influence on the chosen nodes, along paths through chosen nodes
    added = np.flatnonzero(weights)
    flow = weights
    for nodes_left in range(budget, -1, -1):
        # The influence of a new node flows on through the nodes that are already chosen.
        while len(added):
            flow = flow[added] @ matrix[added]
            reach += flow
            added = np.flatnonzero(flow * chosen)
        candidates = np.where(chosen, 0, reach)
        best = int(np.argmax(candidates))
        if not nodes_left or chosen[best] or not reach[best]:
            break
        chosen[best] = True
        added = np.array([best])
        flow = reach
    part = _keep_nodes(graph, chosen)
    return _keep_strong_edges(part, weights[chosen], edges)


def scores(graph: Graph, outputs: Sequence[int] | None = None) -> Scores:
    """Return how much of a whole graph is explained; see `Scores`.

    Raises:
        BadInput: one of `outputs` is not in the graph.
    """
    if not graph.frozen:
        return Scores(None, None)
    weights = _weights(graph, outputs)
    shares = graph.shares
    influences = shares.flow_back(weights)
    unexplained = _is_kind(graph, UNEXPLAINED)
    is_token_leaf = _token_leaves(graph, shares)
    tokens = influences[is_token_leaf].sum()
    rest = influences[unexplained].sum()
    leaves = tokens + rest
    # By target: the share of its in-edges that comes from rests and biases.
    from_rest = shares.share * unexplained[shares.source]
    missing = np.bincount(shares.target, from_rest, len(weights))
    reached = influences + weights
    explained = (1 - missing) @ reached
    return Scores(
        replacement=float(tokens / leaves) if leaves > 0 else None,
        completeness=float(explained / reached.sum()) if reached.any() else None,
    )


def cumulative(values: np.ndarray) -> np.ndarray:
    """Return, for each value, the share of the total that it and all larger ones make up."""
    order = np.argsort(-values, kind="stable")
    ranked = values[order]
    running = np.cumsum(ranked)
    total = values.sum() or 1.0
    share = running / total
    capped = np.minimum(share, 1.0)  # rounding can lead to slightly more than 1
    shares = np.empty(len(values))
    shares[order] = capped
    return shares


def top(values: np.ndarray, share: float, name: str) -> np.ndarray:
    """Mark the largest values that make up a share of their sum; all if the share is 1.

    Values that are equal up to rounding, as along a chain, stay together.

    Raises:
        BadInput: the share lies outside 0 to 1.
    """
    if not 0 <= share <= 1:
        raise BadInput(f"{name} {share}: expected a share of influence from 0 to 1")
    if share == 1:
        return np.ones(len(values), dtype=bool)
    positive = values[values > 0]
    ascending = np.sort(positive)
    ranked = ascending[::-1]
    count = len(ranked)
    if count == 0:
        return np.zeros(len(values), dtype=bool)
    wanted = share * ranked.sum()
    running = np.cumsum(ranked)
    last = np.searchsorted(running, wanted)  # `count` if rounding leaves the sum below it
    last = min(last, count - 1)
    smallest = ranked[last] * (1 - 1e-9)
    return values >= smallest


class _Shares:
    """Every edge's share of all |attribution| into its target.

    Attributes:
        source, target: by edge, the row of each end in the graph's nodes.
        share: by edge.
    """

    def __init__(self, graph: Graph):
        self.size = len(graph.nodes)
        numbers = _numbers(graph)
        largest = int(numbers.max(initial=0))
        row = np.zeros(largest + 1, dtype=np.int32)  # by number
        row[numbers] = np.arange(self.size)

        edges = graph.edges
        sources = edges["source"].to_numpy()
        targets = edges["target"].to_numpy()
        self.source = row[sources]
        self.target = row[targets]

        attribution = edges["attribution"].to_numpy()
        strength = np.abs(attribution.astype(np.float64))
        is_finite = np.isfinite(strength)
        strength[~is_finite] = 0
        inflow = np.bincount(self.target, strength, self.size)  # by target
        divisor = np.where(inflow > 0, inflow, 1)
        self.share = strength / divisor[self.target]

    @cached_property
    def matrix(self) -> Any:
        """The shares as a sparse matrix Ã[target, source]."""
        places = (self.target, self.source)
        shape = (self.size, self.size)
        return csr_array((self.share, places), shape=shape)

    def flow_back(self, weights: np.ndarray) -> np.ndarray:
        """Return `weights (Ã + Ã² + …)`, by node."""
        flow = weights
        total = np.zeros(self.size)
        for _ in range(self.size):  # a bound on the length of a path; most are far shorter
            if not flow.any():
                break
            flow = flow @ self.matrix
            total += flow
        return total

    def has_in_edges(self) -> np.ndarray:
        """Mark the nodes that are the target of an edge."""
        counts = np.bincount(self.target, minlength=self.size)
        return counts > 0

    def has_out_edges(self) -> np.ndarray:
        """Mark the nodes that are the source of an edge."""
        out_degree = np.bincount(self.source, minlength=self.size)
        return out_degree > 0


def _numbers(graph: Graph) -> np.ndarray:
    return graph.nodes["node"].to_numpy()


def _is_kind(graph: Graph, kinds: Sequence[str]) -> np.ndarray:
    """Mark the nodes of some kinds."""
    column = graph.nodes["kind"]
    kind = column.cast(pl.String)
    wanted = list(kinds)
    is_wanted = kind.is_in(wanted)
    return is_wanted.to_numpy()


def _weights(graph: Graph, outputs: Sequence[int] | None) -> np.ndarray:
    """Return how much each node counts as an output: its weight, or 1 for a given inner node."""
    weights = graph.nodes["weight"].to_numpy()
    if outputs is None:
        return weights
    numbers = _numbers(graph)
    chosen = np.isin(numbers, list(outputs))
    known = numbers[chosen].tolist()
    unknown = set(outputs).difference(known)
    if unknown:
        raise BadInput(
            f"node {min(unknown)}: not in the graph, which has {len(weights)} nodes; give the "
            "number of one of them"
        )
    is_output = _is_kind(graph, ["output"])
    weights_if_chosen = np.where(is_output, weights, 1.0)
    return np.where(chosen, weights_if_chosen, 0.0)


def _keep_nodes(graph: Graph, stays: np.ndarray) -> Graph:
    """Return the marked nodes and all edges between them."""
    mask = pl.Series(stays)
    nodes = graph.nodes.filter(mask)
    numbers = nodes["node"].implode()
    edges = graph.edges.filter(pl.col("source").is_in(numbers), pl.col("target").is_in(numbers))
    return replace(graph, nodes=nodes, edges=edges)


def _keep_strong_edges(graph: Graph, weights: np.ndarray, share: float) -> Graph:
    """Return the graph with the edges that make up a share of the influence of all edges."""
    shares = graph.shares
    influences = shares.flow_back(weights)
    reached = influences + weights
    of_target = reached[shares.target]
    edge_influences = shares.share * of_target
    is_strong = top(edge_influences, share, "edges")
    mask = pl.Series(is_strong)
    edges = graph.edges
    strong_edges = edges.filter(mask)
    return replace(graph, edges=strong_edges)


def _drop_dead_ends(graph: Graph, always: np.ndarray, first: np.ndarray, last: np.ndarray) -> Graph:
    """Drop nodes that have lost all in-edges or all out-edges, until none are left.

    Args:
        graph: The graph.
        always: Marks the nodes that are never dropped.
        first: Marks the nodes that never had in-edges.
        last: Marks the nodes that never had out-edges.
    """
    while True:
        shares = graph.shares
        fed = shares.has_in_edges() | first
        used = shares.has_out_edges() | last
        alive = always | (fed & used)
        if alive.all():
            return graph
        graph = _keep_nodes(graph, alive)
        always = always[alive]
        first = first[alive]
        last = last[alive]


def _token_leaves(graph: Graph, shares: _Shares) -> np.ndarray:
    """Mark inputs and embeddings, and the components of embeddings that are sites.

    The latter are the components of layers that nothing leads to.
    """
    is_token = _is_kind(graph, TOKENS)
    is_component = _is_kind(graph, ["component"])
    has_in_edges = shares.has_in_edges()
    is_fed = is_component & has_in_edges
    names = graph.nodes["layer"].cast(pl.String)
    layer = names.to_numpy()
    fed_layers = set(layer[is_fed])
    in_fed_layer = np.isin(layer, list(fed_layers))
    is_leaf = is_component & ~in_fed_layer
    return is_token | is_leaf
