"""The edges of graphs that stay: a share of all that enters their target at least, and no more than memory holds."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lightning.attribution.graph import EdgeTable, joined

MOST = 1 << 25
"""Edges of one prompt that are held together."""


def strong(tables: Sequence[EdgeTable], at_least: float) -> EdgeTable:
    """The edges of some graphs as one table; of each node's in-edges those that make up a share of all their sizes."""
    whole = joined(tables)
    if not at_least or not len(whole.source):
        return whole
    size = whole.attribution.abs()
    node = whole.prompt.long() * (int(whole.target.max()) + 1) + whole.target
    total = size.new_zeros(int(node.max()) + 1).index_add(0, node, size)
    keep = (size >= at_least * total[node]).nonzero()[:, 0]
    return EdgeTable(*(column.index_select(0, keep) for column in whole))


def no_edges() -> EdgeTable:
    """An empty table."""
    none = torch.zeros(0, dtype=torch.int32)
    return EdgeTable(none, none, none, torch.zeros(0))


class Bounded(NamedTuple):
    """The edges of some graphs that stay, and the share of all that enters their target that they had to be."""

    table: EdgeTable
    share: float


def unseen(table: EdgeTable) -> None:
    """Nobody looks at the edges that are left out."""


def bounded(
    parts: Iterable[EdgeTable], at_least: float = 0.0, most: int = MOST, seen: Callable[[EdgeTable], None] = unseen
) -> Bounded:
    """The edges of some graphs as one table, of each node's in-edges those that make up a share of all their sizes.

    More than `most` edges, then of one prompt, are never held: they are computed twice, first to add up what enters
    every node, then to keep what is at least a share of it; the share is as large as it takes to keep `most` at most.

    Args:
        parts: gives all edges whenever it is gone through.
        at_least: that share.
        most: so many edges are held together.
        seen: is shown all edges once.
    """
    held, count, sizes = list[EdgeTable](), 0, None
    for table in parts:
        seen(table)
        held.append(table)
        count += len(table.source)
        if count > most:
            sizes, held = _sizes(held, sizes), []
    if sizes is None:
        return Bounded(strong(held, at_least) if held else no_edges(), at_least)
    share, bounds, kept = at_least, at_least * sizes, list[EdgeTable]()
    for table in parts:
        kept.append(_above(table, bounds))
        if share == at_least and sum(len(part.source) for part in kept) > most:
            share = int((sizes > 0).sum()) / most  # so a node has 1/share in-edges, all together `most`
            bounds = (share * sizes).clamp(min=torch.finfo(sizes.dtype).tiny)
            kept = [_above(part, bounds) for part in kept]
    return Bounded(joined(kept), share)


def _sizes(tables: Sequence[EdgeTable], before: Tensor | None) -> Float[Tensor, " nodes"]:
    """Sum the sizes of the in-edges of every node of one prompt."""
    for table in tables:
        found = torch.bincount(table.target, table.attribution.abs(), 0 if before is None else len(before))
        found = found.to(table.attribution.dtype)  # of no edges it counts in whole numbers
        if before is not None:
            found[: len(before)] += before
        before = found
    assert before is not None
    return before


def _above(table: EdgeTable, bounds: Tensor) -> EdgeTable:
    """The edges that are at least as large as their target asks."""
    keep = (table.attribution.abs() >= bounds[table.target.long()]).nonzero()[:, 0]
    return EdgeTable(*(column.index_select(0, keep) for column in table))
