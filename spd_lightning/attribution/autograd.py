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

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spd_lightning.attribution.graph import EdgeTable, Layer, NodeKind, Subject, node_numbers, shape3
from spd_lightning.attribution.linearize import Frozen
from spd_lightning.decomposition.components import Site, available
from spd_lightning.decomposition.model import ComponentModel, Map, flattened

CHUNK = 1 << 20
"""Numbers held at once by one batched product: few enough to stay near the processor."""


# ---- the cut run ----------------------------------------------------------------------------------------------------


def _whole(name: str, kind: NodeKind, leaf: Tensor) -> Layer:
    b, p, _ = shape3(leaf)
    ones = torch.ones(b, p, 1, dtype=torch.bool, device=leaf.device)
    return Layer(name, kind, leaf, leaf.detach().reshape(b, p, -1).norm(dim=-1, keepdim=True), ones, whole=True)


def _leaf(value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_()


def biased(model: ComponentModel) -> dict[str, nn.Module]:
    """The norms and maps that are not sites and add a bias: in frozen graphs a node of its own (A6, rule 1)."""
    sites = {site.module for site in model.sites.values()}
    adds = {site.module for site in available(model.target).values()} - sites
    adds |= {module for module in model.target.modules() if isinstance(module, nn.LayerNorm)}
    return {n: m for n, m in model.target.named_modules() if m in adds and getattr(m, "bias", None) is not None}


def cut_run(of: Subject) -> list[Layer]:
    """The layers of the graphs of a batch of prompts, in forward order, joined by one autograd graph."""
    model, inputs = of.model, of.inputs
    layers: list[Layer] = []
    sites = {site.module for site in model.sites.values()}
    embeddings = [(m, name) for name, m in model.target.named_modules() if isinstance(m, nn.Embedding)]
    named: dict[nn.Module, str] = {m: name for m, name in embeddings if m not in sites}
    biases = {m: name for name, m in biased(model).items()} if of.frozen else {}

    def at_site(site: Site, x: Tensor, own: Map) -> Tensor:
        site_layers, y = _cut_site(of, site, x, own)
        layers.extend(site_layers)
        return y

    def with_bias(module: nn.Module, own: Map) -> Map:
        def forward(x: Tensor) -> Tensor:
            out = own(x)
            folded = model.folded(out)
            leaf = _leaf(module.bias.expand_as(folded))  # pyright: ignore[reportCallIssue]
            layers.append(_whole(biases[module], "bias", leaf))
            return out + flattened(leaf - leaf.detach(), folded.ndim - out.ndim)

        return forward

    def at_module(module: nn.Module, own: Map) -> Map:
        if module in biases:
            return with_bias(module, own)

        def forward(*args, **kwargs):
            out = own(*args, **kwargs)
            leaf = _leaf(model.folded(out))
            added = leaf.ndim - out.ndim
            batched = leaf.expand(len(inputs), *leaf.shape[-2:]) if leaf.ndim == 2 or len(leaf) == 1 else leaf
            leaf = leaf if batched is leaf else _leaf(batched)
            layers.append(_whole(named[module], "embedding", leaf))
            return flattened(leaf.clone(), added)  # a clone, since the model may change it in place

        return forward

    x = _leaf(inputs) if inputs.is_floating_point() else inputs
    if inputs.is_floating_point():
        shaped = inputs.reshape(shape3(inputs))
        layers.append(Layer("input", "input", x, shaped, shaped != 0))
    linear = Frozen() if of.frozen else nullcontext()
    with torch.enable_grad(), linear, model.replaced(at_site, at_module, [*named, *biases]):
        out = of.reading(model.target(x.clone() if inputs.is_floating_point() else x))
    shaped = out.reshape(shape3(out))
    return [*layers, Layer("output", "output", None, shaped, of.outputs(shaped.detach()))]


def _cut_site(of: Subject, site: Site, x: Tensor, own: Map) -> tuple[list[Layer], Tensor]:
    """A site under the cut: its layers (components; in frozen mode also rest and bias) and its output."""
    V, U = of.model[site.name].V.detach(), of.model[site.name].U.detach()
    a, g, mode = site.inner(x, V), of.importances[site.name], of.mode
    leaf, nodes = _leaf(a), of.held(site.name, g)
    mask = g.detach() if mode.mask == "ci" else torch.ones_like(g)
    shape = shape3(a)
    layers = [Layer(site.name, "component", leaf, a.reshape(shape), nodes.reshape(shape), g.detach().reshape(shape))]
    bias = torch.zeros_like(U[0]) if site.bias is None else site.bias
    y = (mask * leaf * nodes) @ U
    rest = (mask * a * ~nodes) @ U
    if mode.delta != "off":
        rest = rest + (own(x) - bias - a @ U)
    if of.frozen:
        kept, added = _leaf(rest), _leaf(bias.expand_as(rest))
        return [*layers, _whole(site.name, "rest", kept), _whole(site.name, "bias", added)], y + kept + added
    if mode.delta == "flow":  # what is not a node is cut like every component; only Δ carries gradient
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
    for t, target, leaves in _readers(layers):
        for s, gradient in _gradients(target.value.sum(), leaves):
            if gradient is not None:
                pairs.add((s, t))
    return pairs


def crossing(layers: list[Layer]) -> set[tuple[int, int]]:
    """The pairs of layers joined by a direct path that moves between positions (A4), found by asking for gradients.

    Targets at even positions are asked about sources at odd ones, and the other way around: whatever can be read from
    another position is read by some target of its opposite parity, since causal attention reaches the next position.
    """
    pairs = set()
    for t, target, leaves in _readers(layers):
        if target.value.shape[1] == 1:
            continue
        for parity in (0, 1):
            for s, gradient in _gradients(target.value[:, parity::2].sum(), leaves):
                if gradient is not None and gradient.reshape(shape3(gradient))[:, 1 - parity :: 2].any():
                    pairs.add((s, t))
    return pairs


def _readers(layers: list[Layer]) -> Iterator[tuple[int, Layer, dict[int, Tensor]]]:
    """Yield every layer that can be a target, with its number and the leaves of the layers before it, by number."""
    for t, target in enumerate(layers):
        leaves = {s: layer.leaf for s, layer in enumerate(layers[:t]) if layer.leaf is not None}
        if target.kind in ("component", "output") and target.value.requires_grad and leaves:
            yield t, target, leaves


def _gradients(total: Tensor, leaves: dict[int, Tensor]) -> Iterator[tuple[int, Tensor | None]]:
    """The gradient of a number to each leaf, by the leaf's key; None where no path leads."""
    found = torch.autograd.grad(total, list(leaves.values()), retain_graph=True, allow_unused=True)
    return zip(leaves, found, strict=True)


def prompt_edges(of: Subject) -> tuple[list[Layer], list[Edges]]:
    """The graphs of a batch of prompts: their layers and all edges between their nodes.

    Where delta carries gradient (mode `reference`, A5), edges are kept to the direct pairs of the cut run; and to one
    position, except between pairs that cross positions there.
    """
    products = Products(of)
    return products.layers, list(products.edges())


class Products:
    """The graphs of a batch of prompts by batched products. Their edges are recomputed at each iteration.

    Attributes:
        layers: those of the graphs.
    """

    def __init__(self, of: Subject):
        self.layers = cut_run(of)
        self._direct: set[tuple[int, int]] | None = None
        self._crossing: set[tuple[int, int]] = set()
        if of.mode.delta == "flow":
            cut = cut_run(of._replace(mode=replace(of.mode, delta="cut")))
            self._direct, self._crossing = connected(cut), crossing(cut)

    def edges(self) -> Iterator[Edges]:
        """Compute the edges between layers, those of one pair of layers and one chunk of targets at a time."""
        for found in edges(self.layers, self._direct):
            one_position = self._direct is not None and (found.source, found.target) not in self._crossing
            yield _own_position(found) if one_position else found

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
