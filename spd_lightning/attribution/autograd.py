"""Prompt attributions: which component drives which, on one input (section A of docs/method.md).

1. *Cut.* Run the decomposed model with the inner activation of every site cut from the autograd
   graph. The value `a = x V` is what gradients are taken of; a leaf `â` of the same value is what
   they are taken with respect to; and `y = (m ∘ â) U + δ·(x Δᵀ) + b`. Inputs are leaves too; in
   `frozen` mode so are each site's rest and its bias.
2. *Differentiate.* The edge from component i of S to component j of T is `∂a_T[s,j]/∂â_S[s',i] ·
   â_S[s',i]` (A1). Only direct paths carry it, since every other site is cut.
3. *Collect* the edges between nodes: components whose importance exceeds a threshold, inputs,
   outputs (A3).

`oracle` follows this definition, with one gradient for each target node. `vjp_edges` uses batched
vector-Jacobian products, for many targets and prompts at once. Whether two sites are connected
follows from whether a gradient exists, never from their names.

Not here: closed forms without a backward pass (`closed_form`), pruning.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spd_lightning.attribution.graph import (
    EdgeTable,
    GraphSpec,
    Layer,
    NodeKind,
    node_numbers,
    shape3,
)
from spd_lightning.attribution.linearize import Frozen
from spd_lightning.decomposition.components import Site, available
from spd_lightning.decomposition.model import ComponentModel, Map, flattened

MAX_VJP_NUMBERS = 1 << 20
"""The count of numbers that one batched product holds; few enough to stay in the processor's cache.
"""


# ---- step 1: the cut run -------------------------------------------------------------------------


def embeddings(model: ComponentModel) -> dict[nn.Module, str]:
    """Return the embeddings of the target that are not sites, with their names."""
    sites = {site.module for site in model.sites.values()}
    return {
        module: name
        for name, module in model.target.named_modules()
        if isinstance(module, nn.Embedding) and module not in sites
    }


def biased(model: ComponentModel) -> dict[str, nn.Module]:
    """Return the norms and maps that add a bias and are not sites (nodes in frozen graphs, A6)."""
    sites = {site.module for site in model.sites.values()}
    adding = {site.module for site in available(model.target).values()} - sites
    adding |= {module for module in model.target.modules() if isinstance(module, nn.LayerNorm)}
    return {
        name: module
        for name, module in model.target.named_modules()
        if module in adding and bias_of(module) is not None
    }


def bias_of(module: nn.Module) -> Tensor | None:
    """Return the bias that a map or a norm adds, or None."""
    return dict(module.named_parameters(recurse=False)).get("bias")


def cut_run(spec: GraphSpec) -> list[Layer]:
    """Return the layers of some prompts' graphs in forward order, joined by one autograd graph."""
    return _CutRun(spec).run()


class _CutRun:
    """Runs a decomposed model with every site cut, and collects the layers on the way."""

    def __init__(self, spec: GraphSpec):
        self.spec, self.model = spec, spec.model
        self.layers: list[Layer] = []
        self.embeddings = embeddings(self.model)
        self.biases: dict[nn.Module, str] = {}
        if spec.frozen:
            self.biases = {module: name for name, module in biased(self.model).items()}

    def run(self) -> list[Layer]:
        spec, inputs = self.spec, self.spec.inputs
        x = inputs
        if inputs.is_floating_point():
            leaf = _leaf(inputs)
            shaped = inputs.reshape(shape3(inputs))
            self.layers.append(Layer("input", "input", leaf, shaped, shaped != 0))
            x = leaf.clone()
        linear = Frozen() if spec.frozen else nullcontext()
        recorded = [*self.embeddings, *self.biases]
        with (
            torch.enable_grad(),
            linear,
            self.model.replaced(self._at_site, self._at_module, recorded),
        ):
            out = spec.reading(self.model.target(x))
        shaped = out.reshape(shape3(out))
        nodes = spec.outputs(shaped.detach())
        return [*self.layers, Layer("output", "output", None, shaped, nodes)]

    def _at_module(self, module: nn.Module, own: Map) -> Map:
        return self._add_bias(module, own) if module in self.biases else self._embed(module, own)

    def _add_bias(self, module: nn.Module, own: Map) -> Map:
        """Make the bias of a norm or of a map that is not a site a layer of its own."""
        bias = bias_of(module)
        assert bias is not None

        def forward(x: Tensor) -> Tensor:
            out = own(x)
            folded = self.model.folded(out)
            leaf = _leaf(bias.expand_as(folded))
            self.layers.append(_whole_layer(self.biases[module], "bias", leaf))
            return out + flattened(leaf - leaf.detach(), folded.ndim - out.ndim)

        return forward

    def _embed(self, module: nn.Module, own: Map) -> Map:
        """Make an embedding that is not a site a layer of its own."""

        def forward(*args, **kwargs):
            out = own(*args, **kwargs)
            leaf = _leaf(self.model.folded(out))
            added = leaf.ndim - out.ndim
            if leaf.ndim == 2 or len(leaf) == 1:  # the same for all prompts, as positions are
                leaf = _leaf(leaf.expand(len(self.spec.inputs), *leaf.shape[-2:]))
            self.layers.append(_whole_layer(self.embeddings[module], "embedding", leaf))
            return flattened(leaf.clone(), added)  # a clone, since the model may change it in place

        return forward

    def _at_site(self, site: Site, x: Tensor, own: Map) -> Tensor:
        """Cut a site, and return its output."""
        spec = self.spec
        mode = self.spec.mode
        components = self.model[site.name]
        V = components.V.detach()
        U = components.U.detach()
        a = site.inner(x, V)
        g = spec.importances[site.name]
        leaf = _leaf(a)
        nodes = spec.is_node(site.name, g)
        mask = g.detach() if mode.mask == "ci" else torch.ones_like(g)
        shape = shape3(a)
        self.layers.append(
            Layer(
                name=site.name,
                kind="component",
                leaf=leaf,
                value=a.reshape(shape),
                nodes=nodes.reshape(shape),
                importance=g.detach().reshape(shape),
            )
        )
        bias = torch.zeros_like(U[0]) if site.bias is None else site.bias
        written = (mask * leaf * nodes) @ U
        others = (mask * a * ~nodes) @ U  # by components that are not nodes
        if mode.delta == "off":
            delta, rest = 0.0, others
        else:
            delta = own(x) - bias - a @ U
            rest = others + delta
        if spec.frozen:
            rest, added = _leaf(rest), _leaf(bias.expand_as(rest))
            self.layers.append(_whole_layer(site.name, "rest", rest))
            self.layers.append(_whole_layer(site.name, "bias", added))
            return written + rest + added
        if (
            mode.delta == "flow"
        ):  # components that are not nodes are cut too; only Δ carries gradient
            return written + others.detach() + delta + bias
        return written + rest.detach() + bias


def _leaf(value: Tensor) -> Tensor:
    """Return a leaf of the same value."""
    return value.detach().clone().requires_grad_()


def _whole_layer(name: str, kind: NodeKind, leaf: Tensor) -> Layer:
    """Return a layer whose single node at each position stands for the whole vector."""
    batch, positions, _ = shape3(leaf)
    size = leaf.detach().reshape(batch, positions, -1).norm(dim=-1, keepdim=True)
    nodes = torch.ones(batch, positions, 1, dtype=torch.bool, device=leaf.device)
    return Layer(name, kind, leaf, size, nodes, whole=True)


# ---- steps 2 and 3: edges ------------------------------------------------------------------------


class LayerEdges(NamedTuple):
    """Edges from one layer to another: prompt, both ends as (pos, component), and attribution."""

    source: int
    target: int
    prompt: Tensor
    source_at: Tensor
    target_at: Tensor
    attribution: Tensor

    def look_up(self, values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the values of both ends of each edge, from a tensor [batch, pos, K] per layer."""
        source_pos, source_component = self.source_at.unbind(1)
        target_pos, target_component = self.target_at.unbind(1)
        source = values[self.source][self.prompt, source_pos, source_component]
        target = values[self.target][self.prompt, target_pos, target_component]
        return source, target

    def within_position(self) -> "LayerEdges":
        """Return the edges that stay at their position."""
        stays = self.source_at[:, 0] == self.target_at[:, 0]
        return LayerEdges(self.source, self.target, *(column[stays] for column in self[2:]))


def as_tables(layers: list[Layer], edges: Iterable[LayerEdges]) -> Iterator[EdgeTable]:
    """Turn edges between layers into flat tables."""
    numbers = node_numbers(layers)
    for each in edges:
        source, target = each.look_up(numbers)
        yield EdgeTable(each.prompt, source, target, each.attribution)


def vjp_edges(
    layers: list[Layer], pairs: set[tuple[int, int]] | None = None
) -> Iterator[LayerEdges]:
    """Compute the edges between nodes of a cut run by batched vector-Jacobian products.

    Edges across positions are included only where they are not exactly zero: elsewhere no direct
    path moves between positions.

    pairs: the pairs of layers (source, target) to include; all if omitted.
    """
    sources = [k for k, layer in enumerate(layers) if layer.leaf is not None]
    for t, target in enumerate(layers):
        if not _is_target(target):
            continue
        before = [s for s in sources if s < t and (pairs is None or (s, t) in pairs)]
        for where, gradients in _vjps(target, [layers[s].leaf for s in before]):
            for s, gradient in zip(before, gradients, strict=True):
                if gradient is not None:
                    yield _select_edges(layers[s], s, target, t, where, gradient)


def _is_target(layer: Layer) -> bool:
    """Return whether edges can end in a layer."""
    return layer.kind in ("component", "output") and layer.value.requires_grad


def _vjps(target: Layer, leaves: list) -> Iterator[tuple[Tensor, tuple[Tensor | None, ...]]]:
    """Yield chunks of target entries (pos, component) that are nodes, and their gradients."""
    if not leaves:
        return
    value = target.value
    where = target.nodes.any(0).nonzero()  # [entries, 2]
    widest = max(leaf.numel() for leaf in leaves)
    size = max(1, MAX_VJP_NUMBERS // max(widest, value.numel()))
    for chunk in where.split(size) if len(where) else ():
        cotangents = value.new_zeros(len(chunk), *value.shape)
        cotangents[torch.arange(len(chunk)), :, chunk[:, 0], chunk[:, 1]] = 1
        gradients = torch.autograd.grad(
            value, leaves, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
        yield chunk, gradients


def _select_edges(
    source: Layer, s: int, target: Layer, t: int, where: Tensor, gradient: Tensor
) -> LayerEdges:
    """Select from the products of one chunk those that join two nodes."""
    values = source.contributions(gradient)  # [targets, batch, pos, K]
    target_is_node = target.nodes[:, where[:, 0], where[:, 1]].T  # [targets, batch]
    both = target_is_node[:, :, None, None] & source.nodes
    positions = torch.arange(values.shape[2], device=values.device)
    same_position = where[:, 0, None] == positions  # [targets, pos]
    exists = both & (same_position[:, None, :, None] | (values != 0))
    index = exists.nonzero()  # [edges, 4]
    return LayerEdges(
        source=s,
        target=t,
        prompt=index[:, 1],
        source_at=index[:, 2:],
        target_at=where[index[:, 0]],
        attribution=values[tuple(index.T)],
    )


# ---- which layers are connected ------------------------------------------------------------------


def connected(layers: list[Layer]) -> set[tuple[int, int]]:
    """Return the pairs of layers joined by a direct path (A4), that is, by a gradient."""
    pairs = set()
    for t, target, leaves in _targets_with_leaves(layers):
        for s, gradient in _gradients(target.value.sum(), leaves):
            if gradient is not None:
                pairs.add((s, t))
    return pairs


def crossing(layers: list[Layer]) -> set[tuple[int, int]]:
    """Return the pairs of layers joined by a direct path that moves between positions (A4).

    The gradient of targets at even positions is taken with respect to sources at odd ones, and the
    reverse. If anything can be read from another position, some target reads it from a position of
    the opposite parity, because causal attention reaches the next position.
    """
    pairs = set()
    for t, target, leaves in _targets_with_leaves(layers):
        if target.value.shape[1] == 1:
            continue
        for parity in (0, 1):
            for s, gradient in _gradients(target.value[:, parity::2].sum(), leaves):
                if gradient is None:
                    continue
                elsewhere = gradient.reshape(shape3(gradient))[:, 1 - parity :: 2]
                if elsewhere.any():
                    pairs.add((s, t))
    return pairs


def _targets_with_leaves(layers: list[Layer]) -> Iterator[tuple[int, Layer, dict[int, Tensor]]]:
    """Yield every layer that can be a target, with its number and the leaves of earlier layers."""
    for t, target in enumerate(layers):
        leaves = {s: layer.leaf for s, layer in enumerate(layers[:t]) if layer.leaf is not None}
        if _is_target(target) and leaves:
            yield t, target, leaves


def _gradients(total: Tensor, leaves: dict[int, Tensor]) -> Iterator[tuple[int, Tensor | None]]:
    """Return the gradient of a number at each leaf, by the leaf's key; None without a path."""
    gradients = torch.autograd.grad(
        total, list(leaves.values()), retain_graph=True, allow_unused=True
    )
    return zip(leaves, gradients, strict=True)


# ---- graphs --------------------------------------------------------------------------------------


def prompt_edges(spec: GraphSpec) -> tuple[list[Layer], list[LayerEdges]]:
    """Return the layers of the graphs of a batch of prompts, and all edges between their nodes.

    If delta carries gradient (mode `reference`, A5), only the pairs of layers that are direct in
    the cut run are included. Edges between them stay within a position, except for pairs that cross
    positions in the cut run.
    """
    graphs = VectorJacobianEdges(spec)
    return graphs.layers, list(graphs.layer_edges())


class VectorJacobianEdges:
    """The edges of a batch of prompts by batched vector-Jacobian products.

    Attributes:
        layers: the layers of the graphs.
    """

    def __init__(self, spec: GraphSpec):
        self.layers = cut_run(spec)
        self._direct: set[tuple[int, int]] | None = None
        self._crossing: set[tuple[int, int]] = set()
        if spec.mode.delta == "flow":
            cut = cut_run(spec._replace(mode=replace(spec.mode, delta="cut")))
            self._direct = connected(cut)
            self._crossing = crossing(cut)

    def layer_edges(self) -> Iterator[LayerEdges]:
        """Compute the edges for one pair of layers and one chunk of targets at a time."""
        for edges in vjp_edges(self.layers, self._direct):
            pair = edges.source, edges.target
            stays = self._direct is not None and pair not in self._crossing
            yield edges.within_position() if stays else edges

    def for_each(self, visit: Callable[[EdgeTable], None]) -> None:
        """Compute all edges, and pass each piece to `visit`."""
        for table in as_tables(self.layers, self.layer_edges()):
            visit(table)


EdgeKey = tuple[str, int, int, str, int, int]


def oracle(layers: list[Layer]) -> dict[tuple[NodeKind, EdgeKey], float]:
    """Compute every edge of one prompt by definition: one `autograd.grad` a target node (A7).

    layers: a cut run of a batch of one. Returns {(source kind, (S, s', i, T, s, j)): attribution}.
    """
    edges = {}
    for t, target in enumerate(layers):
        sources = [layer for layer in layers[:t] if layer.leaf is not None]
        leaves = [layer.leaf for layer in sources if layer.leaf is not None]
        if not _is_target(target):
            continue
        for pos, j in target.nodes[0].nonzero().tolist():
            value = target.value[0, pos, j]
            gradients = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
            for layer, gradient in zip(sources, gradients, strict=True):
                if gradient is None:
                    continue
                values = layer.contributions(gradient[None])[0, 0]  # [pos, K]
                for q, i in layer.nodes[0].nonzero().tolist():
                    if q == pos or values[q, i] != 0:
                        key = layer.name, q, i, target.name, pos, j
                        edges[layer.kind, key] = values[q, i].item()
    return edges
