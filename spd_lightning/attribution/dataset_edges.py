"""Attributions over a corpus: what the edges from one component to another add up to (section A of docs/method.md).

1. *Edges* are those of the prompt graphs: between nodes (A3), over all positions, from every s' ≤ s through keys and
   values. Two sums are made of them: of `A`, and of `A·sign(a_T)`, which is the attribution to `|a_T|`.
2. *Sums.* In decoders, `Sums` takes what closed forms give and adds it up by component before any edge stands by
   itself: through keys and values first over the positions that read, then over those that are read. A target has two
   columns, for places where it is positive (or 0) and negative; their sum and their difference are the two sums
   wanted, so that the second costs nothing. Other models' edges are added up as batched products give them.
3. *Normalizers*: firings, importances and squares of every component, for readers to divide by.

An embedding that is not a site is one source a row: a token, or a position. A rest or a bias of frozen graphs is one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spd_lightning.attribution.autograd import Edges, prompt_edges
from spd_lightning.attribution.closed_form.rows import batch_of
from spd_lightning.attribution.closed_form.sinks import Across, Nodes, Places, onward
from spd_lightning.attribution.closed_form.trace import why_not
from spd_lightning.attribution.closed_form.walk import Graph
from spd_lightning.attribution.graph import Layer, NodeKind, Subject
from spd_lightning.decomposition.model import ComponentModel

Rows = Mapping[str, Int[Tensor, "batch pos"]]
"""For each embedding that is not a site, the row that is looked up at each position."""


class PairSums(NamedTuple):
    """Sums of the edges from one layer to another: one entry for each pair of components that share an edge.

    source, target: which component, or which row of an embedding. edges: how many there are; closed forms count those
    through keys and values to a later position though they be zero, which other ways leave out. total: Σ A. size: the
    same with |a_T| as the target, Σ A·sign(a_T), where the sign of 0 is +. total_square, size_square: the sum over
    prompts of the square of each prompt's own total, or size. From these follows how much the sums vary from prompt to
    prompt, and so how far to trust them.
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


class NodeSums(NamedTuple):
    """Sums over the nodes of one layer: one entry per component, or per row of an embedding that occurs.

    firings: at how many positions it is a node. importance: Σ g over all positions; firings, where there is no g.
    square: Σ a² over all positions; of rows of an embedding, of the size of what they write. size: Σ |a| over the
    positions at which it is a node.
    """

    kind: NodeKind
    layer: str
    component: Int64[Tensor, " entries"]
    firings: Int64[Tensor, " entries"]
    importance: Float64[Tensor, " entries"]
    square: Float64[Tensor, " entries"]
    size: Float64[Tensor, " entries"]


def dataset_edges(
    of: Subject, wanted: Callable[[str], bool] = lambda layer: True
) -> tuple[list[NodeSums], list[PairSums]]:
    """Adds up the prompt graphs of a batch, without making them where the model and the mode have closed forms.

    wanted: of which layers, by name; edges need both ends.
    """
    sums = _closed(of, wanted) if why_not(of.model, of.mode) is None else _listed(of)
    nodes = [node_sums(layer, at) for layer, at in zip(sums.layers, sums.at, strict=True) if wanted(layer.name)]
    return nodes, [each for each in sums.pairs() if wanted(each.source_layer) and wanted(each.target_layer)]


def _closed(of: Subject, wanted: Callable[[str], bool]) -> "Sums":
    """The sums of the blocks that a decoder's closed forms give."""
    batch, inputs = batch_of(of), of.inputs
    layers = [x if x.whole or wanted(x.name) else x._replace(nodes=torch.zeros_like(x.nodes)) for x in batch.layers]
    places = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    sums = Sums(layers, {"wte": inputs, "wpe": places})
    batch = batch._replace(layers=layers, numbers=sums.numbers)
    for prompt in range(len(inputs)):
        for _ in Graph(batch, prompt, sums):
            pass
        sums.end_prompt()
    return sums


def _listed(of: Subject) -> "Sums":
    """The sums of edges one by one."""
    layers, found = prompt_edges(of)
    sums = Sums(layers, looked_up(of.model, of.inputs))
    pieces = [by_prompt(each, len(of.inputs)) for each in found]
    for prompt in range(len(of.inputs)):
        for piece in pieces:
            sums.listed(piece[prompt])
        sums.end_prompt()
    return sums


def by_prompt(found: Edges, prompts: int) -> list[Edges]:
    """Split the edges of a batch of prompts into those of each prompt."""
    order = found.prompt.argsort(stable=True)
    sizes = torch.bincount(found.prompt, minlength=prompts).tolist()
    columns = [column[order].split(sizes) for column in found[2:]]
    return [Edges(found.source, found.target, *parts) for parts in zip(*columns, strict=True)]


class _LookUps(TorchFunctionMode):
    """While open, keeps the rows that embeddings look up, whatever their modules are given to find them.

    Args:
        names: the names of the embeddings, by their weights' place in memory.
    """

    def __init__(self, names: Mapping[int, str]):
        super().__init__()
        self.names, self.rows = names, dict[str, Tensor]()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.embedding and (name := self.names.get(id(args[1]))):
            self.rows[name] = args[0]
        return func(*args, **(kwargs or {}))


def looked_up(model: ComponentModel, inputs: Tensor) -> Rows:
    """The rows that the target's embeddings look up on a batch of prompts, by the embeddings' names."""
    tables = {name: module for name, module in model.target.named_modules() if isinstance(module, nn.Embedding)}
    if not tables:
        return {}
    with torch.no_grad(), _LookUps({id(module.weight): name for name, module in tables.items()}) as seen:
        model.target(inputs)
    apart = {name: ids.view(inputs.shape) if len(ids) == inputs.numel() else ids for name, ids in seen.rows.items()}
    return {name: ids.expand(len(inputs), ids.shape[-1]) for name, ids in apart.items()}


# ---- nodes ----------------------------------------------------------------------------------------------------------


class At(NamedTuple):
    """The nodes of a layer: the components that occur, and the rank of each node's component among them.

    Of what is not a node the rank means nothing.
    """

    known: Int64[Tensor, " entries"]
    rank: Int[Tensor, "..."]


def standing(layer: Layer, rows: Rows) -> At:
    """Find the component of every node; in a layer without components, its embedding row, or its only entry.

    rank: by component, or, where the layer is whole, by place [batch, pos, 1].
    """
    if not layer.whole:
        used = layer.nodes.flatten(0, 1).any(0)
        return At(used.nonzero()[:, 0], used.cumsum(0, dtype=torch.int32) - 1)
    row = rows[layer.name] if layer.kind == "embedding" else layer.nodes[..., 0].long() * 0
    known, rank = row.unique(return_inverse=True)
    return At(known, rank[..., None].int())


def node_sums(layer: Layer, at: At) -> NodeSums:
    """The sums of one layer's nodes."""
    square = layer.value.detach().square()
    if layer.whole:
        rank = at.rank.flatten().long()
        firings = torch.bincount(rank, minlength=len(at.known))
        total = torch.bincount(rank, square.flatten().double(), minlength=len(at.known))
        size = torch.bincount(rank, square.sqrt().flatten().double(), minlength=len(at.known))
        return NodeSums(layer.kind, layer.name, at.known, firings, firings.double(), total, size)
    firings, g = layer.nodes.sum((0, 1)), layer.importance
    importance = firings.double() if g is None else g.sum((0, 1), dtype=torch.float64)
    every = torch.arange(len(firings), device=firings.device)
    total = square.sum((0, 1), dtype=torch.float64)
    size = (layer.value.detach().abs() * layer.nodes).sum((0, 1), dtype=torch.float64)
    return NodeSums(layer.kind, layer.name, every, firings, importance, total, size)


def sums_gap(model: ComponentModel, nodes: Sequence[NodeSums], pairs: Sequence[PairSums]) -> float:
    """By how much the sums of all in-edges miss the sizes of what they enter: 0 of frozen graphs (A6).

    It is Σ_j |Σ |a_j| − Σ in-edges·sign(a_j)| / Σ_j Σ |a_j| over components j (but those of embeddings)
    and outputs; each inner sum is over all places where j is a node.
    """
    fed = {name for name, site in model.sites.items() if site.kind != "embedding"} | {"output"}
    missed, size = 0.0, 0.0
    for node in nodes:
        if node.layer not in fed or node.kind not in ("component", "output"):
            continue
        entered = torch.zeros_like(node.size)
        for pair in pairs:
            if pair.target_layer == node.layer:
                entered.index_add_(0, pair.target, pair.size)
        missed += float((node.size - entered).abs().sum())
        size += float(node.size.sum())
    return missed / size if size else 0.0


# ---- sums of edges --------------------------------------------------------------------------------------------------


class Matrices(NamedTuple):
    """Sums of the edges of one pair of layers, over those who are nodes; two columns a target, for its two signs.

    prompt: the sums of the prompt at hand, not yet part of `total`. squares: over the prompts before it, the sum of the
    squares of their sums, to activations and to sizes.
    """

    total: Float64[Tensor, "S T2"]
    edges: Int[Tensor, "S T2"]
    prompt: Float64[Tensor, "S T2"]
    squares: Float64[Tensor, "2 S T"]


class Sums:
    """Takes edges and keeps their sums, for each pair of layers that has any.

    Args:
        layers: the layers of the graphs of a batch of prompts.
        rows: which rows of embeddings stand where.

    Attributes:
        at: which component stands where, by layer.
        numbers: for closed forms, in place of a node's number: twice its component's among those of all layers, and
            one more where its value is negative.
    """

    def __init__(self, layers: list[Layer], rows: Rows):
        self.layers, self.at = layers, [standing(layer, rows) for layer in layers]
        self._first = [0, *torch.tensor([2 * len(at.known) for at in self.at]).cumsum(0).tolist()]
        self._ends = torch.tensor(self._first[1:], device=layers[-1].nodes.device)
        self.numbers = [
            (at.rank * 2 + first) + (layer.value.detach() < 0).int()
            for layer, at, first in zip(layers, self.at, self._first, strict=False)
        ]
        self._sums: dict[tuple[int, int], Matrices] = {}
        self._touched: dict[tuple[int, int], list[Tensor]] = {}  # entries [S, T] that the prompt at hand adds to

    def end_prompt(self) -> None:
        """Fold the sums of the prompt at hand into those of all prompts, and their squares into the squares."""
        for pair, touched in self._touched.items():
            sums, entries = self._sums[pair], torch.cat(touched)
            signs, total = sums.prompt.view(-1, 2), sums.total.view(-1, 2)
            own = signs[entries]  # [entries, 2]: from where the target is positive or 0, and from where it is negative
            # An entry may be there many times over, each time with the same numbers: they are assigned, not added.
            total[entries] = total[entries] + own
            to_activation, to_size = own[:, 0] + own[:, 1], own[:, 0] - own[:, 1]
            for squares, value in zip(sums.squares.flatten(1), (to_activation, to_size), strict=True):
                squares[entries] = squares[entries] + value.square()
            signs[entries] = 0.0
        self._touched = {}

    def pairs(self) -> list[PairSums]:
        """The sums of every pair of layers."""
        found = []
        for (s, t), sums in sorted(self._sums.items()):
            total, edges = (x.unflatten(1, (-1, 2)) for x in (sums.total, sums.edges))
            i, j = edges.any(-1).nonzero(as_tuple=True)
            plus, minus = total[i, j].unbind(-1)
            ends = self.layers[s].kind, self.layers[s].name, self.layers[t].name
            nodes = self.at[s].known[i], self.at[t].known[j]
            both = plus + minus, plus - minus
            found.append(PairSums(*ends, *nodes, edges[i, j].sum(-1), *both, *sums.squares[:, i, j]))
        return found

    # ---- taking edges -------------------------------------------------------------------------------------------

    def listed(self, found: Edges) -> None:
        """Edges one by one, from one layer to another."""
        ends = ((found.source, found.source_at), (found.target, found.target_at))
        source, target = (self.numbers[layer][found.prompt, at[:, 0], at[:, 1]] for layer, at in ends)
        self._add(found.source, found.target, source, target, found.attribution, torch.ones_like(source))

    def same(self, source: Nodes, target: Nodes, values: Float[Tensor, "pos K J"]) -> None:
        """Edges within each position."""
        held = source.real[:, :, None] & target.real[:, None, :]
        if not values.numel():
            return
        for s, i in self._spans(source.number.amax(0)):  # above one another are nodes of one layer
            for t, j in self._spans(target.number.amax(0)):
                numbers = source.number[:, i, None], target.number[:, None, j]
                self._add(s, t, *numbers, values[:, i, j], held[:, i, j])

    def across(self, edges: Across) -> Iterator[None]:
        """Edges from every position to itself and to later ones, to one layer."""
        source, target = edges.source, edges.target
        sources, i = source.number[source.real].unique(return_inverse=True)
        targets, j = target.number[target.real].unique(return_inverse=True)
        slots = torch.full_like(target.component, len(targets)).masked_scatter(target.real, j)
        by_reader = over_readers(edges, slots, len(targets))
        total = by_reader.new_zeros(len(sources), len(targets)).index_add_(0, i, by_reader.T.contiguous())
        before = total.new_zeros(len(source.real), len(sources))
        before[source.pos, i] = 1
        count = total.new_zeros(len(targets), len(sources)).index_add_(0, j, before.cumsum(0)[target.pos])
        for s, span in self._spans(sources):
            for t, _ in self._spans(targets):
                self._add(s, t, sources[span, None], targets[None, :], total[span], count.T[span])
        return iter(())

    def far(self, source: Places, target: Nodes, values: Float[Tensor, "pos K nodes"]) -> None:
        """Edges from single nodes to all positions, one by one."""
        every = torch.arange(len(values), device=values.device)
        held, layers = onward(source.pos, every, target.real, values), self._layers(source.number)
        for s in layers.unique().tolist():
            i = (layers == s).nonzero()[:, 0]
            for t, j in self._spans(target.number.amax(0)):
                numbers = source.number[i], target.number[:, j, None]
                self._add(s, t, *numbers, values[:, j, i], held[:, j, i])

    def _layers(self, numbers: Int[Tensor, " nodes"]) -> Int[Tensor, " nodes"]:
        """The layers of some nodes."""
        return torch.searchsorted(self._ends, numbers, right=True)

    def _spans(self, numbers: Int[Tensor, " nodes"]) -> list[tuple[int, slice]]:
        """The layers of nodes that lie side by side, and where each one's are."""
        names, counts = self._layers(numbers).unique_consecutive(return_counts=True)
        ends = counts.cumsum(0).tolist()
        return [(s, slice(a, b)) for s, a, b in zip(names.tolist(), [0, *ends], ends, strict=False)]

    def _add(self, s: int, t: int, source: Tensor, target: Tensor, values: Tensor, edges: Tensor) -> None:
        """Adds the edges of a pair of layers, by the numbers of their nodes, which are spread over the values."""
        width = self._first[t + 1] - self._first[t]
        if (s, t) not in self._sums:
            rows, float64 = len(self.at[s].known), torch.float64
            zeros = [values.new_zeros(rows, width, dtype=float64) for _ in range(2)]
            squares = values.new_zeros(2, rows, width // 2, dtype=float64)
            self._sums[s, t] = Matrices(zeros[0], edges.new_zeros(rows, width).int(), zeros[1], squares)
        sums = self._sums[s, t]
        i, j = (source - self._first[s]) // 2, target - self._first[t]  # of what is not a node: anywhere
        slots = ((i * width).clamp_(min=0) + j.clamp_(min=0)).flatten()
        sums.prompt.view(-1).index_add_(0, slots, (values * (edges > 0)).flatten().double())
        self._touched.setdefault((s, t), []).append(slots // 2)
        sums.edges.view(-1).index_add_(0, slots, edges.flatten().int())


def over_readers(edges: Across, slots: Int[Tensor, "pos K"], count: int) -> Float[Tensor, "count sources"]:
    """Edges across positions summed over those that read, by the slots of the targets there; slot `count` is dropped.

    What a target reads of a value is the same wherever it stands, so only the weights of its places are summed; what
    differs from place to place is summed beside them.
    """
    sources, flat = edges.weight.shape[-1], slots.flatten()
    place = flat.new_zeros(count + 1).scatter(0, flat, torch.arange(len(flat), device=flat.device))[:count]

    def summed(weights: Iterator[Tensor]) -> Tensor:
        found = edges.weight.new_zeros(count + 1, sources)
        for k, weight in enumerate(weights):
            found.index_add_(0, slots[:, k], weight)
        return found[:count]

    total, width = edges.weight.new_zeros(count, sources), slots.shape[1]
    for weight, left, right in zip(edges.weight, edges.left, edges.right, strict=True):
        own = left.flatten(0, 1)[place, : edges.own] @ right[:, : edges.own].T
        total.addcmul_(summed(weight for _ in range(width)), own)
        for e in range(edges.own, left.shape[-1]):
            total.addcmul_(summed(weight * left[:, k, e, None] for k in range(width)), right[:, e])
    return total
