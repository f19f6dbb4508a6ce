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

from spd_lightning.attribution.graph import EdgeTable, LazyEdges, joined, no_edges

MAX_EDGES = 1 << 25
"""The largest number of edges of one prompt that are held in memory."""


class PrunedEdges(NamedTuple):
    """The edges that stay, and the share of what enters their target that each had to carry."""

    table: EdgeTable
    share: float


def ignore(table: EdgeTable) -> None:
    """Do nothing: the default observer."""


def prune_edges(
    edges: LazyEdges,
    min_share: float = 0.0,
    max_edges: int = MAX_EDGES,
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
    if first.inflow is None:
        table = keep_strong_edges(first.tables, min_share) if first.tables else no_edges()
        return PrunedEdges(table, min_share)
    second = _SecondPass(first.inflow, min_share, max_edges)
    edges.for_each(second.add)
    return PrunedEdges(joined(second.kept), second.share)


def keep_strong_edges(tables: Sequence[EdgeTable], min_share: float) -> EdgeTable:
    """Join tables, and drop edges below a share of all |attribution| into their target."""
    whole = joined(tables)
    if not min_share or not len(whole.source):
        return whole
    size = whole.attribution.abs()
    nodes_per_prompt = int(whole.target.max()) + 1
    target = whole.prompt.long() * nodes_per_prompt + whole.target  # distinct among all prompts
    inflow = size.new_zeros(int(target.max()) + 1).index_add(0, target, size)
    strong = size >= min_share * inflow[target]
    return whole.select(strong.nonzero()[:, 0])


class _FirstPass:
    """Collects edges while they fit; beyond that, only the total |attribution| into every node.

    Attributes:
        tables: the edges, while they fit.
        inflow: the totals by the target's number, once the edges do not fit; None before.
    """

    def __init__(self, max_edges: int, observe: Callable[[EdgeTable], None]):
        self.max_edges, self.observe = max_edges, observe
        self.tables: list[EdgeTable] = []
        self.inflow: Float[Tensor, " nodes"] | None = None
        self._count = 0

    def add(self, table: EdgeTable) -> None:
        self.observe(table)
        self.tables.append(table)
        self._count += len(table.source)
        if self._count > self.max_edges:
            for held in self.tables:
                self.inflow = _add_inflow(held, self.inflow)
            self.tables = []


def _add_inflow(table: EdgeTable, before: Tensor | None) -> Float[Tensor, " nodes"]:
    """Add the |attribution| of some edges of one prompt to the totals into every node."""
    nodes = 0 if before is None else len(before)
    inflow = torch.bincount(table.target, table.attribution.abs(), nodes)
    inflow = inflow.to(table.attribution.dtype)  # bincount counts no edges in whole numbers
    if before is not None:
        inflow[:nodes] += before
    return inflow


class _SecondPass:
    """Keeps the edges that are large enough, and raises the share once if these are too many.

    Attributes:
        kept: the edges that stay.
        share: the share that was asked of them in the end.
    """

    def __init__(self, inflow: Float[Tensor, " nodes"], min_share: float, max_edges: int):
        self.max_edges, self._inflow = max_edges, inflow
        self.kept: list[EdgeTable] = []
        self.share = min_share
        self._bounds = min_share * inflow  # the smallest |attribution| that stays, by target
        self._raised = False

    def add(self, table: EdgeTable) -> None:
        self.kept.append(_at_least(table, self._bounds))
        if not self._raised and sum(len(part.source) for part in self.kept) > self.max_edges:
            self._raise_share()

    def _raise_share(self) -> None:
        """Raise the share to targets / max_edges, so that at most 1/share edges stay at each."""
        self._raised = True
        self.share = int((self._inflow > 0).sum()) / self.max_edges
        tiny = torch.finfo(self._inflow.dtype).tiny  # an edge of exactly 0 never stays
        self._bounds = (self.share * self._inflow).clamp(min=tiny)
        self.kept = [_at_least(part, self._bounds) for part in self.kept]


def _at_least(table: EdgeTable, bounds: Float[Tensor, " nodes"]) -> EdgeTable:
    """Return the edges that reach the bound of their target."""
    large = table.attribution.abs() >= bounds[table.target.long()]
    return table.select(large.nonzero()[:, 0])
