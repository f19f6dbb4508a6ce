"""Influence: how much of the outputs hangs on each node of a prompt's graph, and the small graph
that carries most.

1. *Shares.* |attribution| over the sum of all that enters the same target: Ã[target, source], rows
   adding up to 1.
2. *Influence.* What the outputs weigh flows back along the shares, over all paths: `p (Ã + Ã² +
   …)`. An edge always leads to a later layer, so the sum ends by itself.
3. *Selection.* `pruned` keeps the nodes, then the edges, that make up a share of all influence;
   `expanded` starts from the outputs and adds one node after the other; `scores` says how much of a
   frozen graph is explained at all.

The idea and the two scores are those of circuit-tracer; here every graph is sparse and may have a
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
    """The attribution graph of one prompt, or what a selection has left of it.

    `nodes`, in order of their numbers, has the columns of the table `nodes` and `weight`: what an
    output counts for (its probability under CI masks; 1 where outputs are not tokens), 0 for all
    else. `edges` has source, target, attribution. `frozen`: in-edges add up (A6), so rest and bias
    nodes stand for all that no component explains.
    """

    nodes: pl.DataFrame
    edges: pl.DataFrame
    frozen: bool = False

    @cached_property
    def shares(self) -> "_Shares":
        """Every edge's share of what enters its target."""
        return _Shares(self)


@dataclass(frozen=True)
class Scores:
    """How much of a graph is explained, from 0 to 1; None where nothing stands for what is not (all
    but frozen graphs).

    `replacement`: of the influence of all leaves, the share that tokens have and not rests and
    biases. `completeness`: the share of a node's in-edges that comes from neither, averaged over
    nodes by influence, outputs by their weight; a leaf, which has none, counts as 1, as in
    circuit-tracer.
    """

    replacement: float | None
    completeness: float | None


def influence(graph: Graph, outputs: Sequence[int] | None = None) -> pl.DataFrame:
    """How much of the outputs hangs on each node: columns node, influence.

    Args:
        graph: The graph.
        outputs: Nodes that it is asked about: outputs count by their weight, any other node as 1.
            All outputs if omitted.

    Raises:
        BadInput: one of `outputs` is not in the graph.
    """
    return pl.DataFrame(
        {"node": graph.nodes["node"], "influence": graph.shares.swept(_weights(graph, outputs))}
    )


def outputs_at(graph: Graph, pos: int | None = None, token: int | None = None) -> list[int]:
    """The output nodes at a position, of a token (an output's entry), or of both: for `outputs` of
    the other functions.

    Raises:
        BadInput: there is none.
    """
    own = graph.nodes.filter(pl.col("kind") == "output")
    asked = {"pos": pos, "token": token}
    for column, value in zip(("pos", "component"), asked.values(), strict=True):
        own = own if value is None else own.filter(pl.col(column) == value)
    if own.is_empty():
        named = ", ".join(f"{name} {value}" for name, value in asked.items() if value is not None)
        places = graph.nodes.filter(pl.col("kind") == "output")["pos"]
        raise BadInput(
            f"{named}: the graph has no output there; it has some from pos {places.min()} to "
            f"{places.max()}"
        )
    return own["node"].to_list()


def pruned(
    graph: Graph, nodes: float = 0.8, edges: float = 0.98, outputs: Sequence[int] | None = None
) -> Graph:
    """The nodes that make up a share of all influence, then the edges between them that make up a
    share of theirs.

    Outputs asked about stay, and so do tokens with any influence. An edge's influence is its share
    times that of its target in what is left. A node whose in-edges, or whose out-edges, have all
    been cut goes too. A share of 1 cuts nothing.

    Raises:
        BadInput: a share lies outside 0 to 1, or one of `outputs` is not in the graph.
    """
    weights = _weights(graph, outputs)
    shares = graph.shares
    found = shares.swept(weights)
    always = (weights > 0) | (_is(graph, TOKENS) & (found > 0))
    kept = _part(graph, top(found, nodes, "nodes") | always)
    mine = np.isin(_numbers(graph), _numbers(kept))
    left = _strongest(kept, weights[mine], edges)
    return _alive(left, always[mine], ~shares.ends("target")[mine], ~shares.ends("source")[mine])


def expanded(
    graph: Graph, budget: int, edges: float = 1.0, outputs: Sequence[int] | None = None
) -> Graph:
    """The outputs asked about and, one after the other, the `budget` nodes of most influence on
    what is there already.

    A node's influence on what is there runs along paths that visit nothing else. Then edges, as in
    `pruned`.

    Raises:
        BadInput: `budget` is negative, a share lies outside 0 to 1, or one of `outputs` is not in
            the graph.
    """
    if budget < 0:
        raise BadInput(f"budget {budget}: a number of nodes; take one from 0 up")
    weights = _weights(graph, outputs)
    shares = graph.shares
    kept = weights > 0
    reach = weights.copy()
    added = np.flatnonzero(weights)
    flow = weights
    for left in range(budget, -1, -1):
        while len(added):  # what a new node brings flows on through those that are there
            flow = flow[added] @ shares.matrix[added]
            reach += flow
            added = np.flatnonzero(flow * kept)
        best = int(np.argmax(np.where(kept, 0, reach)))
        if not left or kept[best] or not reach[best]:
            break
        kept[best] = True
        added = np.array([best])
        flow = reach
    part = _part(graph, kept)
    return _strongest(part, weights[kept], edges)


def scores(graph: Graph, outputs: Sequence[int] | None = None) -> Scores:
    """How much of a whole graph is explained; see `Scores`.

    Raises:
        BadInput: one of `outputs` is not in the graph.
    """
    if not graph.frozen:
        return Scores(None, None)
    weights = _weights(graph, outputs)
    shares = graph.shares
    found = shares.swept(weights)
    unexplained = _is(graph, UNEXPLAINED)
    tokens = found[_token_leaves(graph, shares)].sum()
    rest = found[unexplained].sum()
    from_rest = np.bincount(shares.target, shares.share * unexplained[shares.source], len(weights))
    reached = found + weights
    return Scores(
        replacement=float(tokens / (tokens + rest)) if tokens + rest > 0 else None,
        completeness=float((1 - from_rest) @ reached / reached.sum()) if reached.any() else None,
    )


def cumulative(found: np.ndarray) -> np.ndarray:
    """Return, for each score, the share of the total that it and all larger ones make up."""
    order = np.argsort(-found, kind="stable")
    summed = np.empty(len(found))
    summed[order] = np.minimum(np.cumsum(found[order]) / (found.sum() or 1.0), 1.0)
    return summed


def top(found: np.ndarray, share: float, name: str) -> np.ndarray:
    """Return the indices of the largest scores that make up a share of their sum; all if the share
    is 1.

    Scores that are equal up to rounding, as along a chain, stay together.

    Raises:
        BadInput: the share lies outside 0 to 1.
    """
    if not 0 <= share <= 1:
        raise BadInput(f"{name} {share}: a share of influence; take one from 0 to 1")
    if share == 1:
        return np.ones(len(found), dtype=bool)
    ranked = np.sort(found[found > 0])[::-1]
    if not len(ranked):
        return np.zeros(len(found), dtype=bool)
    last = np.searchsorted(np.cumsum(ranked), share * ranked.sum())
    return found >= ranked[min(last, len(ranked) - 1)] * (1 - 1e-9)


class _Shares:
    """Every edge's share of what enters its target: `share`, and both ends as rows of the graph's
    nodes.
    """

    def __init__(self, graph: Graph):
        numbers = _numbers(graph)
        self.size = len(graph.nodes)
        row = np.zeros(int(numbers.max(initial=0)) + 1, dtype=np.int32)
        row[numbers] = np.arange(self.size)
        self.source, self.target = (
            row[graph.edges[end].to_numpy()] for end in ("source", "target")
        )
        strength = np.abs(graph.edges["attribution"].to_numpy().astype(np.float64))
        strength[~np.isfinite(strength)] = 0
        into = np.bincount(self.target, strength, self.size)
        self.share = strength / np.where(into > 0, into, 1)[self.target]

    @cached_property
    def matrix(self) -> Any:
        """Ã, [target, source]."""
        return csr_array((self.share, (self.target, self.source)), shape=(self.size, self.size))

    def swept(self, weights: np.ndarray) -> np.ndarray:
        """`weights (Ã + Ã² + …)`."""
        flow = weights
        total = np.zeros(self.size)
        for _ in range(self.size):  # a path has no more steps; far fewer in truth
            if not flow.any():
                break
            flow = flow @ self.matrix
            total += flow
        return total

    def ends(self, end: str) -> np.ndarray:
        """Mark the nodes that are the source, or the target, of any edge."""
        return np.bincount(getattr(self, end), minlength=self.size) > 0


def _numbers(graph: Graph) -> np.ndarray:
    return graph.nodes["node"].to_numpy()


def _is(graph: Graph, kinds: Sequence[str]) -> np.ndarray:
    return graph.nodes["kind"].cast(pl.String).is_in(list(kinds)).to_numpy()


def _weights(graph: Graph, outputs: Sequence[int] | None) -> np.ndarray:
    weights = graph.nodes["weight"].to_numpy()
    if outputs is None:
        return weights
    chosen = np.isin(_numbers(graph), list(outputs))
    if strange := set(outputs) - set(_numbers(graph)[chosen].tolist()):
        raise BadInput(
            f"node {min(strange)}: not in the graph, which has {len(weights)} nodes; see its "
            "outputs"
        )
    return np.where(chosen, np.where(_is(graph, ["output"]), weights, 1.0), 0.0)


def _part(graph: Graph, kept: np.ndarray) -> Graph:
    """Some nodes, and all edges between them."""
    nodes = graph.nodes.filter(pl.Series(kept))
    between = [pl.col(end).is_in(nodes["node"].implode()) for end in ("source", "target")]
    return replace(graph, nodes=nodes, edges=graph.edges.filter(*between))


def _strongest(graph: Graph, weights: np.ndarray, share: float) -> Graph:
    """The graph with those of its edges that make up a share of the influence of all."""
    shares = graph.shares
    reached = shares.swept(weights) + weights
    strong = top(shares.share * reached[shares.target], share, "edges")
    return replace(graph, edges=graph.edges.filter(pl.Series(strong)))


def _alive(graph: Graph, always: np.ndarray, first: np.ndarray, last: np.ndarray) -> Graph:
    """The graph without nodes that have lost all in-edges or all out-edges; `first`, `last` never
    had any.
    """
    while True:
        shares = graph.shares
        alive = always | ((shares.ends("target") | first) & (shares.ends("source") | last))
        if alive.all():
            return graph
        graph = _part(graph, alive)
        always = always[alive]
        first = first[alive]
        last = last[alive]


def _token_leaves(graph: Graph, shares: _Shares) -> np.ndarray:
    """Inputs and embeddings; where an embedding is a site, its components, to which nothing
    leads.
    """
    component = _is(graph, ["component"])
    layer = graph.nodes["layer"].cast(pl.String).to_numpy()
    reading = set(layer[component & shares.ends("target")])
    return _is(graph, TOKENS) | (component & ~np.isin(layer, list(reading)))
