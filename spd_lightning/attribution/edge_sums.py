"""Sums of edges by the components of their ends (section A of docs/method.md).

`EdgeSums` is an edge sink for the closed forms, and also receives edges one by one. For each pair
of layers it keeps a matrix with a row for each source and a column for each target. An entry holds
two sums: over places where the target's value is positive or 0, and over those where it is
negative. `dataset_edges` runs the model and returns the sums.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Complex128, Float, Float64, Int, Int64
from torch import Tensor

from spd_lightning.attribution.autograd import LayerEdges
from spd_lightning.attribution.closed_form.sinks import (
    AttentionEdges,
    Nodes,
    SingleNodes,
    existing_edges,
)
from spd_lightning.attribution.graph import Layer, NodeKind

EmbeddingRows = Mapping[str, Int[Tensor, "batch pos"]]
"""For each embedding that is not a site, the row that is looked up at each position."""


class PairSums(NamedTuple):
    """Sums of the edges from one layer to another, by pair of components that share an edge.

    source, target: the component, or the row of an embedding.
    edges: the number of edges. Closed forms count an edge through keys and values to a later
        position even if it is zero; other ways leave it out.
    total: Σ A. size: Σ A·sign(a_T), the total with |a_T| as the target; the sign of 0 is +.
    total_square, size_square: sums over prompts of the square of each prompt's own total or size.
        They show how much the sums vary between prompts, and so how far to trust them.
    """

    kind: NodeKind
    source_layer: str
    target_layer: str
    source: Int64[Tensor, " entries"]
    target: Int64[Tensor, " entries"]
    edges: Int64[Tensor, " entries"]
    total: Float64[Tensor, " entries"]
    size: Float64[Tensor, " entries"]
    total_square: Float64[Tensor, " entries"]
    size_square: Float64[Tensor, " entries"]


# ---- which component each node is ----------------------------------------------------------------


class Entries(NamedTuple):
    """The components of a layer that occur, and for each node its component's rank among them.

    rank: by component [C]; if the layer is whole, by place [batch, pos, 1]. For other entries,
    it means nothing.
    """

    known: Int64[Tensor, " entries"]
    rank: Int[Tensor, "..."]


def entries_of(layer: Layer, rows: EmbeddingRows) -> Entries:
    """Find the components of a layer that occur, or its embedding rows, or its only entry."""
    if not layer.whole:
        used = layer.nodes.flatten(0, 1).any(0)  # [C]
        return Entries(used.nonzero()[:, 0], used.cumsum(0, dtype=torch.int32) - 1)
    if layer.kind == "embedding":
        row = rows[layer.name]
    else:
        row = torch.zeros_like(layer.nodes[..., 0], dtype=torch.long)
    known, rank = row.unique(return_inverse=True)
    return Entries(known, rank[..., None].int())


class SignedSlots:
    """Numbers for nodes that say which component they are, and whether its value there is negative.

    Closed forms pass on one number with each node. Here it is `2 · entry + (value < 0)`, where
    entries are numbered through all layers. So the numbers of a layer are a range of their own,
    twice as wide as its entries.

    Args:
        entries: the entries of each layer.
    """

    def __init__(self, entries: Sequence[Entries], device: torch.device):
        widths = torch.tensor([2 * len(of_layer.known) for of_layer in entries])
        self.first = [0, *widths.cumsum(0).tolist()]  # the first number of every layer, and the end
        self._ends = torch.tensor(self.first[1:], device=device)

    def of_nodes(self, number: int, layer: Layer, entries: Entries) -> Int[Tensor, "batch pos K"]:
        """Number the nodes of a layer; elsewhere the numbers mean nothing."""
        negative = (layer.value.detach() < 0).int()
        return entries.rank * 2 + self.first[number] + negative

    def layers(self, slots: Int[Tensor, " nodes"]) -> Int[Tensor, " nodes"]:
        """Return the layer of each node."""
        return torch.searchsorted(self._ends, slots, right=True)

    def width(self, layer: int) -> int:
        """Return how many numbers a layer has: two for each entry."""
        return self.first[layer + 1] - self.first[layer]

    def entry(self, layer: int, slots: Tensor) -> Tensor:
        """Return the entries of nodes of a layer, without the sign."""
        return (slots - self.first[layer]) // 2

    def column(self, layer: int, slots: Tensor) -> Tensor:
        """Return the entries of nodes of a layer with the sign: 2 · entry + (value < 0)."""
        return slots - self.first[layer]


# ---- sums ----------------------------------------------------------------------------------------


class PairMatrices(NamedTuple):
    """Sums for one pair of layers, by the entries of source and target.

    A complex number holds two sums that are always read together, because one number is looked up
    in half the time of two. In `total` and `prompt`, its parts are the sums over places where the
    target's value is positive or 0 (real), and where it is negative (imaginary).

    total: the sums of finished prompts. prompt: those of the current prompt, which are not in
    `total` yet. squares: for finished prompts, the sums of the squares of each prompt's sums, to
    activations (real) and to their sizes (imaginary).
    """

    total: Complex128[Tensor, "S T"]
    edges: Int[Tensor, "S T"]
    prompt: Complex128[Tensor, "S T"]
    squares: Complex128[Tensor, "S T"]


class EdgeSums:
    """An edge sink that adds edges up by the components of their ends.

    Args:
        layers: the layers of the graphs of a batch of prompts.
        rows: the embedding rows at each position.

    Attributes:
        entries: the components that occur, by layer.
        slots: the numbers that closed forms pass on with each node (`SignedSlots`), by layer.
    """

    def __init__(self, layers: list[Layer], rows: EmbeddingRows):
        self.layers = layers
        self.entries = [entries_of(layer, rows) for layer in layers]
        self._signed = SignedSlots(self.entries, layers[-1].nodes.device)
        self.slots = [
            self._signed.of_nodes(k, layer, entries)
            for k, (layer, entries) in enumerate(zip(layers, self.entries, strict=True))
        ]
        self._sums: dict[tuple[int, int], PairMatrices] = {}
        self._touched: dict[tuple[int, int], list[Tensor]] = {}
        """The entries [S · T] to which the current prompt adds, by pair of layers."""

    def end_prompt(self) -> None:
        """Add the current prompt's sums, and their squares, to those of all prompts."""
        for pair, touched in self._touched.items():
            total, _, prompt, squares = (matrix.view(-1) for matrix in self._sums[pair])
            entries = torch.cat(touched)
            by_sign = prompt[entries]
            to_activation = by_sign.real + by_sign.imag
            to_size = by_sign.real - by_sign.imag
            own_squares = torch.complex(to_activation.square(), to_size.square())
            # An entry may occur several times, always with the same numbers: so assign, do not add.
            total[entries] = total[entries] + by_sign
            squares[entries] = squares[entries] + own_squares
            prompt[entries] = 0.0
        self._touched = {}

    def pairs(self) -> list[PairSums]:
        """Return the sums of every pair of layers that has edges."""
        pairs = []
        for (s, t), sums in sorted(self._sums.items()):
            i, j = sums.edges.nonzero(as_tuple=True)
            total, squares = sums.total[i, j], sums.squares[i, j]
            pairs.append(
                PairSums(
                    kind=self.layers[s].kind,
                    source_layer=self.layers[s].name,
                    target_layer=self.layers[t].name,
                    source=self.entries[s].known[i],
                    target=self.entries[t].known[j],
                    edges=sums.edges[i, j].long(),
                    total=total.real + total.imag,
                    size=total.real - total.imag,
                    total_square=squares.real,
                    size_square=squares.imag,
                )
            )
        return pairs

    # ---- receiving edges -------------------------------------------------------------------------

    def add_listed(self, edges: LayerEdges) -> None:
        """Receive edges one by one, from one layer to another."""
        source, target = edges.look_up(self.slots)
        ones = torch.ones_like(source)
        self._add(edges.source, edges.target, source, target, edges.attribution, ones)

    def add_same_position(
        self, source: Nodes, target: Nodes, values: Float[Tensor, "pos K J"]
    ) -> None:
        """Receive edges within each position."""
        exists = source.real[:, :, None] & target.real[:, None, :]
        if not values.numel():
            return
        # A slot has the same layer at all positions.
        for s, i in self._layer_spans(source.number.amax(0)):
            for t, j in self._layer_spans(target.number.amax(0)):
                sources = source.number[:, i, None]
                targets = target.number[:, None, j]
                self._add(s, t, sources, targets, values[:, i, j], exists[:, i, j])

    def add_attention(self, edges: AttentionEdges) -> None:
        """Receive edges from every position to itself and to later ones, all to one layer."""
        source, target = edges.source, edges.target
        sources, i = source.number[source.real].unique(return_inverse=True)
        targets, j = target.number[target.real].unique(return_inverse=True)
        no_node = torch.full_like(target.component, len(targets))
        column = no_node.masked_scatter(target.real, j)  # [pos, K]
        by_reader = sum_over_readers(edges, column, len(targets))  # [targets, source nodes]
        total = by_reader.new_zeros(len(sources), len(targets))
        total.index_add_(0, i, by_reader.T.contiguous())
        # The number of edges: source nodes at or before the position of each target node.
        at_position = total.new_zeros(len(source.real), len(sources))
        at_position[source.pos, i] = 1
        until_position = at_position.cumsum(0)  # [pos, sources]
        count = total.new_zeros(len(targets), len(sources))
        count.index_add_(0, j, until_position[target.pos])
        for s, span in self._layer_spans(sources):
            for t, _ in self._layer_spans(targets):
                self._add(s, t, sources[span, None], targets[None, :], total[span], count.T[span])

    def add_spread(
        self, source: SingleNodes, target: Nodes, values: Float[Tensor, "pos K nodes"]
    ) -> None:
        """Receive edges from single nodes to all positions, one by one."""
        every = torch.arange(len(values), device=values.device)
        exists = existing_edges(source.pos, every, target.real, values)
        layers = self._signed.layers(source.number)
        for s in layers.unique().tolist():
            i = (layers == s).nonzero()[:, 0]
            for t, j in self._layer_spans(target.number.amax(0)):
                sources = source.number[i]
                targets = target.number[:, j, None]
                self._add(s, t, sources, targets, values[:, j, i], exists[:, j, i])

    def _layer_spans(self, slots: Int[Tensor, " nodes"]) -> list[tuple[int, slice]]:
        """Return the layers of nodes that lie side by side, and the range of each."""
        layers, counts = self._signed.layers(slots).unique_consecutive(return_counts=True)
        ends = counts.cumsum(0).tolist()
        starts = [0, *ends][: len(ends)]
        spans = (slice(start, end) for start, end in zip(starts, ends, strict=True))
        return list(zip(layers.tolist(), spans, strict=True))

    def _add(
        self, s: int, t: int, source: Tensor, target: Tensor, values: Tensor, edges: Tensor
    ) -> None:
        """Add the edges of a pair of layers; the slots of their nodes broadcast with the values."""
        sums = self._matrices(s, t)
        width = self._signed.width(t)
        # Slots without a node have meaningless numbers. Clamp them; their values are not added.
        row = (self._signed.entry(s, source) * width).clamp_(min=0)
        column = self._signed.column(t, target).clamp_(min=0)
        places = (row + column).flatten()  # in the matrix [S, T] of both parts of each number
        entries = places // 2
        by_sign = torch.view_as_real(sums.prompt).view(-1)
        by_sign.index_add_(0, places, (values * (edges > 0)).flatten().double())
        sums.edges.view(-1).index_add_(0, entries, edges.flatten().int())
        self._touched.setdefault((s, t), []).append(entries)

    def _matrices(self, s: int, t: int) -> PairMatrices:
        """Return the sums of a pair of layers; they are zeros at first."""
        if (s, t) not in self._sums:
            shape = (len(self.entries[s].known), len(self.entries[t].known))
            device = self.slots[t].device
            self._sums[s, t] = PairMatrices(
                total=torch.zeros(shape, dtype=torch.complex128, device=device),
                edges=torch.zeros(shape, dtype=torch.int32, device=device),
                prompt=torch.zeros(shape, dtype=torch.complex128, device=device),
                squares=torch.zeros(shape, dtype=torch.complex128, device=device),
            )
        return self._sums[s, t]


def sum_over_readers(
    edges: AttentionEdges, column: Int[Tensor, "pos K"], count: int
) -> Float[Tensor, "count sources"]:
    """Add up edges over the positions that read, by the columns of the targets there.

    An edge is Σ_h weight_h[s, i] Σ_e left_h[s, j, e] right_h[i, e]. For the first `own` columns e,
    left is the same at every place of a target, so only the weights are added up:

        Σ_s A = Σ_h (Σ_s weight_h[s, i]) (left_h · right_h)[own]
              + Σ_h Σ_e (Σ_s weight_h[s, i] left_h[s, j, e]) right_h[i, e]     e: the others

    column: the column of each target; slots without a node have the column `count` and are dropped.
    """
    sources = edges.weight.shape[-1]
    width = column.shape[1]
    flat = column.flatten()
    every = torch.arange(len(flat), device=flat.device)
    place = flat.new_zeros(count + 1).scatter(0, flat, every)[:count]  # one place of each target

    def over_positions(weights: Iterable[Tensor]) -> Float[Tensor, "count sources"]:
        """Add up the weights [pos, sources] of each slot k by the column of the target there."""
        total = edges.weight.new_zeros(count + 1, sources)
        for k, weight in enumerate(weights):
            total.index_add_(0, column[:, k], weight)
        return total[:count]

    total = edges.weight.new_zeros(count, sources)
    for weight, left, right in zip(edges.weight, edges.left, edges.right, strict=True):
        own = left.flatten(0, 1)[place, : edges.own] @ right[:, : edges.own].T  # [count, sources]
        total.addcmul_(over_positions([weight] * width), own)
        for e in range(edges.own, left.shape[-1]):
            weighted = (weight * left[:, k, e, None] for k in range(width))
            total.addcmul_(over_positions(weighted), right[:, e])
    return total
