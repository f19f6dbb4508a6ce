"""The nodes of one prompt laid side by side, edges between them in blocks, and what becomes of those.

Closed forms give edges as arrays, padded where one position has fewer nodes than another. A *taker* makes of them what
is wanted: `Tables` one row an edge, as prompt graphs have them; `dataset_edges.Sums` what they add up to.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spd_lightning.attribution.graph import EdgeTable

T = TypeVar("T", covariant=True)
BLOCK = 1 << 17
"""Key–value edges worked on at once: few enough to stay near the processor."""


# ---- the nodes of one prompt ----------------------------------------------------------------------------------------


class Nodes(NamedTuple):
    """The nodes of one layer on one prompt, side by side at each position, as many as the fullest position has."""

    component: Int[Tensor, "pos K"]
    number: Int[Tensor, "pos K"]
    real: Bool[Tensor, "pos K"]

    @property
    def pos(self) -> Int[Tensor, " nodes"]:
        """The position of every real node."""
        return self.real.nonzero()[:, 0]

    def pick(self, values: Float[Tensor, "pos C"]) -> Float[Tensor, "pos K"]:
        """Each node's own value."""
        return values.gather(1, self.component)


def nodes_of(held: Bool[Tensor, "pos C"], number: Int[Tensor, "pos C"]) -> Nodes:
    """Lays the nodes of a layer out."""
    pos, component = held.nonzero(as_tuple=True)
    count = held.sum(1)
    rank = torch.arange(len(pos), device=pos.device) - (count.cumsum(0) - count)[pos]
    shape = (len(held), int(count.max()))
    index, numbers, real = pos.new_zeros(shape), number.new_zeros(shape), held.new_zeros(shape)
    index[pos, rank], numbers[pos, rank], real[pos, rank] = component, number[pos, component], True
    return Nodes(index, numbers, real)


class Places(NamedTuple):
    """Some nodes of one prompt one after another: their numbers and positions."""

    number: Int[Tensor, " nodes"]
    pos: Int[Tensor, " nodes"]


# ---- what becomes of edges ------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """Edges from every real source node, in order of position, to the target nodes at some positions; 0 from later."""

    pos: Int[Tensor, " block"]
    values: Float[Tensor, "block K sources"]


class Across(NamedTuple):
    """Edges `Σ_h weight_h[s, i] (left_h[s, j] · right_h[i])` from each position to itself and later ones.

    own: so many columns of left, the first, are the target component's own, wherever it stands.
    """

    source: Nodes
    target: Nodes
    weight: Float[Tensor, "head pos sources"]
    left: Float[Tensor, "head pos K e"]
    right: Float[Tensor, "head sources e"]
    own: int

    def blocks(self) -> Iterator[Block]:
        """The edges themselves, some positions at a time; a block ends with the last source that may reach it."""
        count, width = self.source.real.sum(1).cumsum(0).tolist(), self.left.shape[2]
        size = max(1, BLOCK // max(1, width * count[-1]))
        for pos in torch.arange(len(count), device=self.left.device).split(size):
            block, n = slice(int(pos[0]), int(pos[-1]) + 1), count[pos[-1]]
            values = self.left.new_zeros(len(pos), width, n)
            for weight, left, right in zip(self.weight, self.left, self.right, strict=True):
                products = left[block].flatten(0, 1) @ right[:n].T
                values.addcmul_(products.view_as(values), weight[block, None, :n])
            yield Block(pos, values)


def onward(
    source: Int[Tensor, " sources"],
    pos: Int[Tensor, " block"],
    real: Bool[Tensor, "block K"],
    values: Float[Tensor, "block K sources"],
) -> Bool[Tensor, "block K sources"]:
    """Mark the edges that can exist: from a source to a target at its position, or at a later one if not zero."""
    gap = pos[:, None, None] - source
    return real[:, :, None] & (gap >= 0) & ((gap == 0) | (values != 0))


@runtime_checkable
class Taker(Protocol[T]):
    """Receives the edges of a graph as they are computed, one pair of layers or several at a time."""

    def same(self, source: Nodes, target: Nodes, values: Float[Tensor, "pos K J"]) -> T:
        """Edges within each position; meaningless where one of the nodes is not real."""
        ...

    def across(self, edges: Across) -> Iterator[T]:
        """Edges from every position to itself and to later ones."""
        ...

    def far(self, source: Places, target: Nodes, values: Float[Tensor, "pos K nodes"]) -> T:
        """Edges from single nodes to all positions; none to earlier ones, nor to later ones where they are zero."""
        ...


class Tables:
    """One row an edge."""

    def __init__(self, prompt: int):
        self.prompt = prompt

    def same(self, source: Nodes, target: Nodes, values: Float[Tensor, "pos K J"]) -> EdgeTable:
        both = source.real[:, :, None] & target.real[:, None, :]
        return self._kept(both, source.number[:, :, None], target.number[:, None, :], values)

    def across(self, edges: Across) -> Iterator[EdgeTable]:
        source, target = edges.source, edges.target
        at, numbers = source.pos, source.number[source.real]
        for pos, values in edges.blocks():
            n = values.shape[-1]
            held = onward(at[:n], pos, target.real[pos], values)
            yield self._kept(held, numbers[:n], target.number[pos, :, None], values)

    def far(self, source: Places, target: Nodes, values: Float[Tensor, "pos K nodes"]) -> EdgeTable:
        every = torch.arange(len(values), device=values.device)
        held = onward(source.pos, every, target.real, values)
        return self._kept(held, source.number, target.number[:, :, None], values)

    def _kept(self, held: Tensor, source: Tensor, target: Tensor, values: Tensor) -> EdgeTable:
        """The edges of an array that are held; the numbers of their nodes are spread over it."""
        at = held.flatten().nonzero()[:, 0]
        columns = (column.expand_as(held).reshape(-1).index_select(0, at) for column in (source, target, values))
        return EdgeTable(torch.tensor(self.prompt, dtype=torch.int32, device=at.device).expand(len(at)), *columns)
