"""Prompt attributions: which component drives which, on one input (section A of docs/method.md).

1. *Cut.* Run the decomposed model with every site's inner activation cut from the graph: `a = x V` is the value that
   readers are asked about, `â` a leaf of the same value that writers are asked about, and
   `y = (m ∘ â) U + δ·(x Δᵀ) + b`. Inputs are leaves too; in `frozen` mode so are each site's rest and its bias.
2. *Differentiate.* The edge from component i of S to component j of T is `∂a_T[s,j]/∂â_S[s',i] · â_S[s',i]` (A1): only
   direct paths carry it, since every other site is cut.
3. *Collect* the edges between nodes: components whose importance exceeds a threshold, inputs, outputs (A3).

`oracle` does this by definition, one gradient a target node; `edges` by batched vector-Jacobian products, many targets
and prompts at once. Which sites are connected is found out by asking (a gradient that does not exist), never by name.
Not here: closed forms without a backward pass (`closed_form`), pruning.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from spd_lightning.decomposition.components import Site, available
from spd_lightning.decomposition.frozen import Frozen
from spd_lightning.decomposition.model import ComponentModel, Map
from spd_lightning.decomposition.outputs import OutputNodes, every_output, reading_of
from spd_lightning.errors import BadInput, nearest

ModeName = Literal["unmasked", "ci_masked", "frozen", "reference"]
NodeKind = Literal["component", "input", "embedding", "output", "rest", "bias"]


@dataclass(frozen=True)
class Mode:
    """A graph's kind: three choices (A5)."""

    mask: Literal["ci", "ones"]
    delta: Literal["off", "cut", "flow"]
    linearisation: Literal["jacobian", "frozen"]


MODES: dict[ModeName, Mode] = {
    "unmasked": Mode("ones", "cut", "jacobian"),
    "ci_masked": Mode("ci", "off", "jacobian"),
    "frozen": Mode("ones", "cut", "frozen"),
    "reference": Mode("ones", "flow", "jacobian"),
}


def known_mode(name: str, place: str) -> ModeName:
    """A kind of graph by its name, given to something.

    Raises:
        BadInput: there is none.
    """
    if name not in MODES:
        raise BadInput(f"mode '{name}' in {place}: no such kind of graph; {nearest(name, MODES)}")
    return name


Threshold = float | Mapping[str, Tensor]
"""Importance above which a component is a node: one for all, or of every site a tensor that broadcasts with its g."""


def exceeds(g: Tensor, threshold: Threshold, site: str) -> Tensor:
    """Which components of a site are nodes, by their importance (A3)."""
    return g > (threshold[site] if isinstance(threshold, Mapping) else threshold)


CHUNK = 1 << 20
"""Numbers held at once by one batched product: few enough to stay near the processor."""


# ---- the cut run ----------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """One row of the graph on a batch of prompts, as a source, a target, or both.

    leaf: what gradients are taken to, or None for a pure target. value [batch, pos, K]: what gradients are taken of.
    nodes [batch, pos, K]: which entries are nodes. importance: of components. whole: the leaf is one node a position,
    whatever its width.
    """

    name: str
    kind: NodeKind
    leaf: Tensor | None
    value: Float[Tensor, "batch pos K"]
    nodes: Bool[Tensor, "batch pos K"]
    importance: Float[Tensor, "batch pos K"] | None = None
    whole: bool = False

    def contributions(self, gradient: Tensor) -> Float[Tensor, "targets batch pos K"]:
        """gradient × value of every node: the edges from this layer to some targets (A1, A2)."""
        assert self.leaf is not None
        product = (gradient * self.leaf.detach()).reshape(len(gradient), *_shape3(self.leaf))
        return product.sum(-1, keepdim=True) if self.whole else product


def _shape3(x: Tensor) -> tuple[int, int, int]:
    """[batch, K] and [batch, pos, K] alike as (batch, pos, K)."""
    return x.shape[0], x.shape[1] if x.ndim == 3 else 1, x.shape[-1]


def _whole(name: str, kind: NodeKind, leaf: Tensor) -> Layer:
    b, p, _ = _shape3(leaf)
    ones = torch.ones(b, p, 1, dtype=torch.bool, device=leaf.device)
    return Layer(name, kind, leaf, leaf.detach().reshape(b, p, -1).norm(dim=-1, keepdim=True), ones, whole=True)


def _leaf(value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_()


def biased(model: ComponentModel) -> dict[str, nn.Module]:
    """The norms and maps that are no sites and add a bias: in frozen graphs a node of its own (A6, rule 1)."""
    sites = {site.module for site in model.sites.values()}
    adds = {site.module for site in available(model.target).values()} - sites
    adds |= {module for module in model.target.modules() if isinstance(module, nn.LayerNorm)}
    return {n: m for n, m in model.target.named_modules() if m in adds and getattr(m, "bias", None) is not None}


def cut_run(
    model: ComponentModel,
    inputs: Tensor,
    importances: Mapping[str, Tensor],
    mode: Mode,
    threshold: Threshold = 0.0,
    output_nodes: OutputNodes = every_output,
) -> list[Layer]:
    """The layers of the graphs of a batch of prompts, in forward order, joined by one autograd graph.

    inputs: [batch, features] floating point, or [batch, pos] token ids. importances: g of the clean run.
    """
    layers: list[Layer] = []
    sites = {site.module for site in model.sites.values()}
    embeddings = [(m, name) for name, m in model.target.named_modules() if isinstance(m, nn.Embedding)]
    named: dict[nn.Module, str] = {m: name for m, name in embeddings if m not in sites}
    biases = {m: name for name, m in biased(model).items()} if mode.linearisation == "frozen" else {}

    def at_site(site: Site, x: Tensor, own: Map) -> Tensor:
        site_layers, y = _cut_site(model, site, x, own, importances[site.name], mode, threshold)
        layers.extend(site_layers)
        return y

    def with_bias(module: nn.Module, own: Map) -> Map:
        def forward(x: Tensor) -> Tensor:
            out = own(x)
            leaf = _leaf(module.bias.expand_as(out))  # pyright: ignore[reportCallIssue]
            layers.append(_whole(biases[module], "bias", leaf))
            return out + (leaf - leaf.detach())

        return forward

    def at_module(module: nn.Module, own: Map) -> Map:
        if module in biases:
            return with_bias(module, own)

        def forward(*args, **kwargs):
            leaf = _leaf(own(*args, **kwargs))
            batched = leaf.expand(len(inputs), *leaf.shape[-2:]) if leaf.ndim == 2 or len(leaf) == 1 else leaf
            leaf = leaf if batched is leaf else _leaf(batched)
            layers.append(_whole(named[module], "embedding", leaf))
            return leaf

        return forward

    x = _leaf(inputs) if inputs.is_floating_point() else inputs
    if inputs.is_floating_point():
        shaped = inputs.reshape(_shape3(inputs))
        layers.append(Layer("input", "input", x, shaped, shaped != 0))
    frozen = Frozen() if mode.linearisation == "frozen" else nullcontext()
    with torch.enable_grad(), frozen, model.replaced(at_site, at_module, [*named, *biases]):
        out = reading_of(output_nodes)(model.target(x))
    shaped = out.reshape(_shape3(out))
    return [*layers, Layer("output", "output", None, shaped, output_nodes(shaped.detach()))]


def _cut_site(model, site: Site, x: Tensor, own: Map, g: Tensor, mode: Mode, threshold: Threshold):
    """A site under the cut: its layers (components; in frozen mode also rest and bias) and its output."""
    V, U = model[site.name].V.detach(), model[site.name].U.detach()
    a = site.inner(x, V)
    leaf, nodes = _leaf(a), exceeds(g, threshold, site.name)
    mask = g.detach() if mode.mask == "ci" else torch.ones_like(g)
    shape = _shape3(a)
    layers = [Layer(site.name, "component", leaf, a.reshape(shape), nodes.reshape(shape), g.detach().reshape(shape))]
    bias = torch.zeros_like(U[0]) if site.bias is None else site.bias
    y = (mask * leaf * nodes) @ U
    rest = (mask * a * ~nodes) @ U
    if mode.delta != "off":
        rest = rest + (own(x) - bias - a @ U)
    if mode.linearisation == "frozen":
        layers.append(_whole(site.name, "rest", _leaf(rest)))
        layers.append(_whole(site.name, "bias", _leaf(bias.expand_as(rest))))
        return layers, y + layers[1].leaf + layers[2].leaf
    if mode.delta == "flow":  # what is no node is cut like every component; only Δ carries gradient
        others = ((mask * a * ~nodes) @ U).detach()
        return layers, y + others + (own(x) - bias - a @ U) + bias
    return layers, y + rest.detach() + bias


# ---- edges ----------------------------------------------------------------------------------------------------------


class Edges(NamedTuple):
    """Edges from one layer to another: per edge its prompt, both ends as (pos, component), and its attribution."""

    source: int
    target: int
    prompt: Tensor
    source_at: Tensor
    target_at: Tensor
    attribution: Tensor


class EdgeTable(NamedTuple):
    """Edges as a flat table: per edge its prompt in the batch, the numbers of both nodes there, and its attribution."""

    prompt: Tensor
    source: Tensor
    target: Tensor
    attribution: Tensor


def node_numbers(layers: list[Layer]) -> list[Int[Tensor, "batch pos K"]]:
    """The number of every node within its prompt, in order of layer, position and component; elsewhere nonsense."""
    start, found = 0, []
    for layer in layers:
        counted = layer.nodes.flatten(1).cumsum(1)
        found.append((counted - 1 + start).view(layer.nodes.shape))
        start = counted[:, -1:] + start
    return found


def joined(tables: Sequence[EdgeTable]) -> EdgeTable:
    """Several tables as one."""
    return tables[0] if len(tables) == 1 else EdgeTable(*(torch.cat(column) for column in zip(*tables, strict=True)))


def tabled(layers: list[Layer], found: Iterable[Edges]) -> Iterator[EdgeTable]:
    """Edges between layers as flat tables."""
    numbers = node_numbers(layers)
    for e in found:
        ends = ((e.source, e.source_at), (e.target, e.target_at))
        source, target = (numbers[layer][e.prompt, at[:, 0], at[:, 1]] for layer, at in ends)
        yield EdgeTable(e.prompt, source, target, e.attribution)


def edges(layers: list[Layer], pairs: set[tuple[int, int]] | None = None) -> Iterator[Edges]:
    """All edges between nodes of a cut run by batched vector-Jacobian products, or those of some pairs of layers.

    Edges across positions are given where they are not exactly zero (no direct path moves there otherwise).
    """
    sources = [k for k, layer in enumerate(layers) if layer.leaf is not None]
    for t, target in enumerate(layers):
        if target.kind not in ("component", "output") or not target.value.requires_grad:
            continue
        before = [s for s in sources if s < t and (pairs is None or (s, t) in pairs)]
        for where, gradients in _products(target, [layers[s].leaf for s in before]):
            for s, gradient in zip(before, gradients, strict=True):
                if gradient is not None:
                    yield _select(layers[s], s, target, t, where, gradient)


def _products(target: Layer, leaves: list) -> Iterator[tuple[Tensor, tuple[Tensor | None, ...]]]:
    """Chunks of target entries (pos, component) that are nodes in some prompt, with their gradients to all leaves."""
    where = target.nodes.any(0).nonzero() if leaves else target.nodes.nonzero()[:0]
    widest = max((leaf.numel() for leaf in leaves), default=1)
    size = max(1, CHUNK // max(widest, target.value.numel()))
    for chunk in where.split(size) if len(where) else ():
        cotangents = torch.zeros(len(chunk), *target.value.shape, dtype=target.value.dtype, device=target.value.device)
        cotangents[torch.arange(len(chunk)), :, chunk[:, 0], chunk[:, 1]] = 1
        yield (
            chunk,
            torch.autograd.grad(
                target.value, leaves, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True
            ),
        )


def _select(source: Layer, s: int, target: Layer, t: int, where: Tensor, gradient: Tensor) -> Edges:
    """The products of one chunk that join two nodes."""
    values = source.contributions(gradient)
    live = target.nodes[:, where[:, 0], where[:, 1]].T[:, :, None, None] & source.nodes
    here = where[:, 0, None] == torch.arange(values.shape[2], device=values.device)
    live = live & (here[:, None, :, None] | (values != 0))
    index = live.nonzero()
    return Edges(s, t, index[:, 1], index[:, 2:], where[index[:, 0]], values[tuple(index.T)])


def connected(layers: list[Layer]) -> set[tuple[int, int]]:
    """The pairs of layers joined by a direct path (A4), found by asking for gradients."""
    pairs = set()
    for t, target in enumerate(layers):
        before = {s: layer.leaf for s, layer in enumerate(layers[:t]) if layer.leaf is not None}
        if target.kind in ("component", "output") and target.value.requires_grad and before:
            leaves = list(before.values())
            found = torch.autograd.grad(target.value.sum(), leaves, retain_graph=True, allow_unused=True)
            pairs |= {(s, t) for s, g in zip(before, found, strict=True) if g is not None}
    return pairs


def prompt_edges(
    model: ComponentModel,
    inputs: Tensor,
    importances: Mapping[str, Tensor],
    mode: Mode,
    threshold: Threshold = 0.0,
    output_nodes: OutputNodes = every_output,
) -> tuple[list[Layer], list[Edges]]:
    """The graphs of a batch of prompts: their layers and all edges between their nodes.

    Where delta carries gradient, edges are kept to direct pairs and to their own position (mode `reference`, A5).
    """
    products = Products(model, inputs, importances, mode, threshold, output_nodes)
    return products.layers, list(products.edges())


class Products:
    """The graphs of a batch of prompts by batched products; edges are computed as they are asked for, and anew.

    Arguments are those of `prompt_edges`; `layers` are those of the graphs.
    """

    def __init__(
        self,
        model: ComponentModel,
        inputs: Tensor,
        importances: Mapping[str, Tensor],
        mode: Mode,
        threshold: Threshold = 0.0,
        output_nodes: OutputNodes = every_output,
    ):
        self.layers = cut_run(model, inputs, importances, mode, threshold, output_nodes)
        self._direct: set[tuple[int, int]] | None = None
        if mode.delta == "flow":
            cut = Mode(mode.mask, "cut", mode.linearisation)
            self._direct = connected(cut_run(model, inputs, importances, cut, threshold, output_nodes))

    def edges(self) -> Iterator[Edges]:
        """Between layers."""
        found = edges(self.layers, self._direct)
        return found if self._direct is None else map(_own_position, found)

    def __iter__(self) -> Iterator[EdgeTable]:
        return tabled(self.layers, self.edges())


def _own_position(e: Edges) -> Edges:
    keep = e.source_at[:, 0] == e.target_at[:, 0]
    return Edges(e.source, e.target, e.prompt[keep], e.source_at[keep], e.target_at[keep], e.attribution[keep])


EdgeKey = tuple[str, int, int, str, int, int]


def oracle(layers: list[Layer]) -> dict[tuple[NodeKind, EdgeKey], float]:
    """Every edge of one prompt by definition: one `autograd.grad` for each target node, read entry by entry (A7).

    layers: a cut run of a batch of one. Returns {(source kind, (S, s', i, T, s, j)): attribution}.
    """
    found = {}
    for t, target in enumerate(layers):
        sources = [layer for layer in layers[:t] if layer.leaf is not None]
        leaves = [layer.leaf for layer in sources if layer.leaf is not None]
        if target.kind not in ("component", "output") or not target.value.requires_grad:
            continue
        for pos, j in target.nodes[0].nonzero().tolist():
            gradients = torch.autograd.grad(target.value[0, pos, j], leaves, retain_graph=True, allow_unused=True)
            for layer, gradient in zip(sources, gradients, strict=True):
                if gradient is None:
                    continue
                values = layer.contributions(gradient[None])[0, 0]
                for q, i in layer.nodes[0].nonzero().tolist():
                    if q == pos or values[q, i] != 0:
                        found[layer.kind, (layer.name, q, i, target.name, pos, j)] = values[q, i].item()
    return found
