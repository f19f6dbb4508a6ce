"""The nodes of one prompt laid out as arrays, blocks of edges between them, and where these go.

Closed forms compute edges as arrays, padded where one position has fewer nodes than another. An
`EdgeSink` receives them: `TableSink` makes one row of each edge, as prompt graphs need them;
`edge_sums.EdgeSums` adds them up.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spd_lightning import budgets
from spd_lightning.attribution.graph import EdgeTable

# ---- the nodes of one prompt ---------------------------------------------------------------------


class Nodes(NamedTuple):
    """The nodes of some layers on one prompt: K slots at each position, real ones first.

    K is the number of nodes at the fullest position.
    """

    component: Int[Tensor, "pos K"]
    number: Int[Tensor, "pos K"]
    real: Bool[Tensor, "pos K"]

    @property
    def pos(self) -> Int[Tensor, " nodes"]:
        """The position of every real node."""
        pos_and_slot = self.real.nonzero()  # [nodes, 2]
        return pos_and_slot[:, 0]

    def pick(self, values: Float[Tensor, "pos C"]) -> Float[Tensor, "pos K"]:
        """Select the value of each node's component."""
        return values.gather(1, self.component)


def lay_out_nodes(is_node: Bool[Tensor, "pos C"], number: Int[Tensor, "pos C"]) -> Nodes:
    """Lay out the nodes of a layer."""
    pos, component = is_node.nonzero(as_tuple=True)  # [nodes] each, in order of position
    nodes = torch.arange(len(pos), device=pos.device)
    count = is_node.sum(1)  # [pos]
    before = count.cumsum(0) - count  # [pos]: nodes at earlier positions
    slot = nodes - before[pos]  # [nodes]: counted from 0 at every position

    fullest = int(count.max())
    shape = (len(is_node), fullest)
    components = pos.new_zeros(shape)
    numbers = number.new_zeros(shape)
    real = is_node.new_zeros(shape)
    components[pos, slot] = component
    numbers[pos, slot] = number[pos, component]
    real[pos, slot] = True
    return Nodes(components, numbers, real)


class SingleNodes(NamedTuple):
    """A list of nodes of one prompt: their numbers and positions."""

    number: Int[Tensor, " nodes"]
    pos: Int[Tensor, " nodes"]


# ---- blocks of edges -----------------------------------------------------------------------------


class EdgeBlock(NamedTuple):
    """Edges from every real source, in order of position, to the targets at some positions."""

    pos: Int[Tensor, " block"]
    values: Float[Tensor, "block K sources"]


class AttentionEdges(NamedTuple):
    """Edges `Σ_h weight_h[s, i] (left_h[s, j] · right_h[i])` to the same and later positions.

    The first `own` columns of left belong to the target's component: they are the same at every
    position.
    """

    source: Nodes
    target: Nodes
    weight: Float[Tensor, "head pos sources"]
    left: Float[Tensor, "head pos K e"]
    right: Float[Tensor, "head sources e"]
    own: int

    def blocks(self) -> Iterator[EdgeBlock]:
        """Compute the edges, some positions at a time.

        A block leaves out the sources behind its last position, which cannot reach it.
        """
        n_sources = self.source.real.sum(1)  # [pos]
        sources_until = n_sources.cumsum(0).tolist()  # [pos]: at each position or before it
        width = self.left.shape[2]
        per_position = max(1, width * sources_until[-1])
        size = max(1, budgets.MAX_ATTENTION_EDGES // per_position)
        positions = torch.arange(len(sources_until), device=self.left.device)
        for pos in positions.split(size):
            last = int(pos[-1])
            reachable = sources_until[last]
            values = self._between(pos, reachable)
            yield EdgeBlock(pos, values)

    def _between(self, pos: Int[Tensor, " block"], n: int) -> Float[Tensor, "block K n"]:
        """Compute the edges from the first n sources to the targets at consecutive positions."""
        block = slice(int(pos[0]), int(pos[-1]) + 1)
        width = self.left.shape[2]
        values = self.left.new_zeros(len(pos), width, n)
        for weight, left, right in zip(self.weight, self.left, self.right, strict=True):
            rows = left[block].flatten(0, 1)  # [block * K, e]
            columns = right[:n].T  # [e, n]
            products = rows @ columns  # [block * K, n]
            products = products.view_as(values)
            values.addcmul_(products, weight[block, None, :n])
        return values


def existing_edges(
    source_pos: Int[Tensor, " sources"],
    target_pos: Int[Tensor, " block"],
    real: Bool[Tensor, "block K"],
    values: Float[Tensor, "block K sources"],
) -> Bool[Tensor, "block K sources"]:
    """Mark the edges that exist: within a position all, to later ones those that are not zero."""
    distance = target_pos[:, None, None] - source_pos  # [block, 1, sources]
    same_position = distance == 0
    not_earlier = distance >= 0
    exists = same_position | (values != 0)
    return real[:, :, None] & not_earlier & exists


# ---- where edges go ------------------------------------------------------------------------------


@runtime_checkable
class EdgeSink(Protocol):
    """Receives edges as they are computed, for one or several pairs of layers at a time."""

    def add_same_position(
        self, source: Nodes, target: Nodes, values: Float[Tensor, "pos K J"]
    ) -> None:
        """Receive edges within each position; those of nodes that are not real mean nothing."""
        ...

    def add_attention(self, edges: AttentionEdges) -> None:
        """Receive edges from every position to itself and to later ones, all to one layer."""
        ...

    def add_spread(
        self, source: SingleNodes, target: Nodes, values: Float[Tensor, "pos K nodes"]
    ) -> None:
        """Receive edges from single nodes to all positions.

        There are no edges to earlier positions, and to later ones only where they are not zero.
        """
        ...


class TableSink:
    """Makes tables of edges, one row for each, and passes them on.

    Args:
        prompt: the number of the prompt in its batch.
        visit: is called with every table.
    """

    def __init__(self, prompt: int, visit: Callable[[EdgeTable], None]):
        self.prompt = prompt
        self.visit = visit

    def add_same_position(
        self, source: Nodes, target: Nodes, values: Float[Tensor, "pos K J"]
    ) -> None:
        source_is_real = source.real[:, :, None]  # [pos, K, 1]
        target_is_real = target.real[:, None, :]  # [pos, 1, J]
        self._send(
            exists=source_is_real & target_is_real,
            source=source.number[:, :, None],
            target=target.number[:, None, :],
            values=values,
        )

    def add_attention(self, edges: AttentionEdges) -> None:
        target = edges.target
        source_pos = edges.source.pos  # [sources]
        source_number = edges.source.number[edges.source.real]  # [sources]
        for pos, values in edges.blocks():
            n = values.shape[-1]  # the sources that the block reaches
            real = target.real[pos]
            exists = existing_edges(source_pos[:n], pos, real, values)
            self._send(
                exists=exists,
                source=source_number[:n],
                target=target.number[pos, :, None],
                values=values,
            )

    def add_spread(
        self, source: SingleNodes, target: Nodes, values: Float[Tensor, "pos K nodes"]
    ) -> None:
        every_pos = torch.arange(len(values), device=values.device)
        exists = existing_edges(source.pos, every_pos, target.real, values)
        self._send(
            exists=exists, source=source.number, target=target.number[:, :, None], values=values
        )

    def _send(self, exists: Tensor, source: Tensor, target: Tensor, values: Tensor) -> None:
        """Pass on the edges that exist; the numbers of their nodes broadcast with the values."""
        rows = exists.flatten().nonzero()[:, 0]
        selected = list[Tensor]()
        for column in (source, target, values):
            flat = column.expand_as(exists).reshape(-1)
            column_of_rows = flat.index_select(0, rows)
            selected.append(column_of_rows)
        prompt = torch.tensor(self.prompt, dtype=torch.int32, device=rows.device)
        prompts = prompt.expand(len(rows))
        table = EdgeTable(prompts, *selected)
        self.visit(table)
