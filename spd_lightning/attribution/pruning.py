"""Edge pruning: keep the edges that carry a given share of what enters their target.

A graph of more than `max_edges` edges is never held whole. Its edges are computed twice:

1. *First pass*: collect the edges. Once they are too many, drop them and only add up |attribution|
   by target.
2. *Second pass*: keep the edges that are large enough. If they are still too many, raise the share
   so far that at most `max_edges` can stay.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lightning import budgets
from spd_lightning.attribution.graph import EdgeTable, LazyEdges, joined, no_edges


class PrunedEdges(NamedTuple):
    """The edges that stay, and the share of what enters their target that each had to carry."""

    table: EdgeTable
    share: float


def ignore(table: EdgeTable) -> None:
    """Do nothing: the default observer."""


def prune_edges(
    edges: LazyEdges,
    min_share: float = 0.0,
    max_edges: int = budgets.MAX_EDGES,
    observe: Callable[[EdgeTable], None] = ignore,
) -> PrunedEdges:
    """Keep the strong edges of some graphs as one table.

    Args:
        edges: the edges; several prompts may come together if they have at most `max_edges`.
        min_share: the least share of all |attribution| into its target that an edge must carry.
        max_edges: the largest number of edges that are held in memory; the share is raised if
            necessary.
        observe: is called once with every piece, before anything is dropped.
    """
    first = _FirstPass(max_edges, observe)
    edges.for_each(first.add)
    inflow = first.inflow
    if inflow is None:
        if first.tables:
            table = keep_strong_edges(first.tables, min_share)
        else:
            table = no_edges()
        return PrunedEdges(table, min_share)
    second = _SecondPass(inflow, min_share, max_edges)
    edges.for_each(second.add)
    table = joined(second.tables)
    return PrunedEdges(table, second.share)


def keep_strong_edges(tables: Sequence[EdgeTable], min_share: float) -> EdgeTable:
    """Join tables, and drop edges below a share of all |attribution| into their target."""
    edges = joined(tables)
    if not len(edges.source):
        return edges
    if not min_share:
        return edges
    size = edges.attribution.abs()  # [edges]
    # Nodes are numbered within each prompt; these numbers are distinct among all prompts.
    nodes_per_prompt = int(edges.target.max()) + 1
    first_number = edges.prompt.long() * nodes_per_prompt
    target = first_number + edges.target  # [edges]
    n_targets = int(target.max()) + 1
    zeros = size.new_zeros(n_targets)
    inflow = zeros.index_add(0, target, size)  # [targets]
    is_strong = size >= min_share * inflow[target]
    rows = is_strong.nonzero()[:, 0]
    return edges.select(rows)


class _FirstPass:
    """Collects edges while they fit; beyond that, only the total |attribution| into every node.

    Attributes:
        tables: the edges, while they fit.
        inflow: the totals by the target's number, once the edges do not fit; None before.
    """

    def __init__(self, max_edges: int, observe: Callable[[EdgeTable], None]):
        self.max_edges = max_edges
        self.observe = observe
        self.tables: list[EdgeTable] = []
        self.inflow: Float[Tensor, " nodes"] | None = None
        self._count = 0

    def add(self, table: EdgeTable) -> None:
        self.observe(table)
        self.tables.append(table)
        self._count += len(table.source)
        if self._count > self.max_edges:
            for piece in self.tables:
                self.inflow = _add_inflow(piece, self.inflow)
            self.tables = []


def _add_inflow(table: EdgeTable, before: Tensor | None) -> Float[Tensor, " nodes"]:
    """Add the |attribution| of some edges of one prompt to the totals into every node."""
    size = table.attribution.abs()
    nodes = 0
    if before is not None:
        nodes = len(before)
    inflow = torch.bincount(table.target, size, nodes)
    inflow = inflow.to(size.dtype)  # bincount counts no edges in whole numbers
    if before is not None:
        inflow[:nodes] += before
    return inflow


class _SecondPass:
    """Keeps the edges that are large enough, and raises the share once if these are too many.

    Attributes:
        tables: the edges that stay.
        share: the share that each edge had to carry in the end.
    """

    def __init__(self, inflow: Float[Tensor, " nodes"], min_share: float, max_edges: int):
        self.max_edges = max_edges
        self.tables: list[EdgeTable] = []
        self.share = min_share
        self._inflow = inflow
        self._bounds = min_share * inflow  # [nodes]: the smallest |attribution| that stays
        self._raised = False

    def add(self, table: EdgeTable) -> None:
        large_enough = _at_least(table, self._bounds)
        self.tables.append(large_enough)
        if self._raised:
            return
        count = sum(len(piece.source) for piece in self.tables)
        if count > self.max_edges:
            self._raise_share()

    def _raise_share(self) -> None:
        """Raise the share to targets / max_edges, so that at most 1/share edges stay at each."""
        inflow = self._inflow
        has_in_edges = inflow > 0
        targets = int(has_in_edges.sum())
        self._raised = True
        self.share = targets / self.max_edges
        bounds = self.share * inflow
        tiny = torch.finfo(bounds.dtype).tiny  # an edge of exactly 0 never stays
        self._bounds = bounds.clamp(min=tiny)
        self.tables = [_at_least(piece, self._bounds) for piece in self.tables]


def _at_least(table: EdgeTable, bounds: Float[Tensor, " nodes"]) -> EdgeTable:
    """Return the edges that reach the bound of their target."""
    bound = bounds[table.target.long()]  # [edges]
    is_large = table.attribution.abs() >= bound
    rows = is_large.nonzero()[:, 0]
    return table.select(rows)
