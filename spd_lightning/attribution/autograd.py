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

from spd_lightning import budgets
from spd_lightning.attribution.graph import (
    EdgeTable,
    GraphSpec,
    Layer,
    NodeKind,
    node_numbers,
    shape3,
    whole_layer,
)
from spd_lightning.attribution.linearize import Frozen
from spd_lightning.decomposition.components import Site, available
from spd_lightning.decomposition.model import ComponentModel, Map, flattened

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
    maps = {site.module for site in available(model.target).values()}
    modules = {}
    for name, module in model.target.named_modules():
        is_plain_map = module in maps and module not in sites
        if not is_plain_map and not isinstance(module, nn.LayerNorm):
            continue
        if bias_of(module) is not None:
            modules[name] = module
    return modules


def bias_of(module: nn.Module) -> Tensor | None:
    """Return the bias that a map or a norm adds, or None."""
    parameters = dict(module.named_parameters(recurse=False))
    return parameters.get("bias")


def cut_run(spec: GraphSpec) -> list[Layer]:
    """Return the layers of some prompts' graphs in forward order, joined by one autograd graph."""
    return _CutRun(spec).run()


class _CutRun:
    """Runs a decomposed model with every site cut, and collects the layers on the way."""

    def __init__(self, spec: GraphSpec):
        self.spec = spec
        self.model = spec.model
        self.layers: list[Layer] = []
        self.embeddings = embeddings(spec.model)
        self.biases: dict[nn.Module, str] = {}
        if spec.frozen:
            for name, module in biased(spec.model).items():
                self.biases[module] = name

    def run(self) -> list[Layer]:
        spec = self.spec
        x = spec.inputs
        if x.is_floating_point():
            x = self._cut_input(x)
        linear = nullcontext()
        if spec.frozen:
            linear = Frozen()
        recorded = [*self.embeddings, *self.biases]
        replaced = self.model.replaced(self._at_site, self._at_module, recorded)
        with torch.enable_grad(), linear, replaced:
            out = self.model.target(x)
            out = spec.reading(out)
        value = out.reshape(shape3(out))  # [batch, pos, K]
        nodes = spec.outputs(value.detach())
        output = Layer(name="output", kind="output", leaf=None, value=value, nodes=nodes)
        return [*self.layers, output]

    def _cut_input(self, inputs: Tensor) -> Tensor:
        """Make the inputs of a model on vectors a layer; return what the model reads."""
        leaf = _leaf(inputs)
        value = inputs.reshape(shape3(inputs))  # [batch, pos, features]
        is_node = value != 0
        layer = Layer("input", "input", leaf, value, is_node)
        self.layers.append(layer)
        return leaf.clone()  # a clone, since the model may change it in place

    def _at_module(self, module: nn.Module, original: Map) -> Map:
        if module in self.biases:
            return self._add_bias(module, original)
        return self._embed(module, original)

    def _add_bias(self, module: nn.Module, original: Map) -> Map:
        """Make the bias of a norm or of a map that is not a site a layer of its own."""
        name = self.biases[module]
        bias = bias_of(module)
        assert bias is not None

        def forward(x: Tensor) -> Tensor:
            out = original(x)
            folded = self.model.folded(out)
            leaf = _leaf(bias.expand_as(folded))
            layer = _whole_layer(name, "bias", leaf)
            self.layers.append(layer)
            # `out` contains the bias already, so the leaf adds a gradient and the value 0.
            zero = leaf - leaf.detach()
            added_dims = folded.ndim - out.ndim
            return out + flattened(zero, added_dims)

        return forward

    def _embed(self, module: nn.Module, original: Map) -> Map:
        """Make an embedding that is not a site a layer of its own."""
        name = self.embeddings[module]
        prompts = len(self.spec.inputs)

        def forward(*args, **kwargs):
            out = original(*args, **kwargs)
            leaf = _leaf(self.model.folded(out))
            added_dims = leaf.ndim - out.ndim
            if leaf.ndim == 2 or len(leaf) == 1:  # the same for all prompts, as positions are
                by_prompt = leaf.expand(prompts, -1, -1)
                leaf = _leaf(by_prompt)
            layer = _whole_layer(name, "embedding", leaf)
            self.layers.append(layer)
            copy = leaf.clone()  # the model may change it in place
            return flattened(copy, added_dims)

        return forward

    def _at_site(self, site: Site, x: Tensor, original: Map) -> Tensor:
        """Cut a site, and return its output y = (m ∘ â) U + δ·(x Δᵀ) + b."""
        spec = self.spec
        mode = spec.mode
        components = self.model[site.name]
        V = components.V.detach()
        U = components.U.detach()
        g = spec.importances[site.name]
        mask = torch.ones_like(g)
        if mode.mask == "ci":
            mask = g.detach()
        a = site.inner(x, V)
        leaf = _leaf(a)  # â
        is_node = spec.is_node(site.name, g)
        layer = _component_layer(site.name, a, leaf, is_node, g)
        self.layers.append(layer)

        bias = site.bias
        if bias is None:
            bias = torch.zeros_like(U[0])
        written = (mask * leaf * is_node) @ U
        others = (mask * a * ~is_node) @ U  # by components that are not nodes
        if mode.delta == "off":
            delta = 0.0
            rest = others
        else:
            # x Δᵀ = x Wᵀ − a U
            delta = original(x) - bias - a @ U
            rest = others + delta

        if spec.frozen:
            # Everything that a site adds is a leaf, so that in-edges add up (A6, rule 1).
            rest_leaf = _leaf(rest)
            bias_leaf = _leaf(bias.expand_as(rest))
            rest_layer = _whole_layer(site.name, "rest", rest_leaf)
            bias_layer = _whole_layer(site.name, "bias", bias_leaf)
            self.layers += [rest_layer, bias_layer]
            return written + rest_leaf + bias_leaf
        if mode.delta == "flow":
            # Components that are not nodes are cut too; only Δ carries gradient.
            return written + others.detach() + delta + bias
        return written + rest.detach() + bias


def _leaf(value: Tensor) -> Tensor:
    """Return a leaf of the same value."""
    return value.detach().clone().requires_grad_()


def _component_layer(name: str, a: Tensor, leaf: Tensor, is_node: Tensor, g: Tensor) -> Layer:
    """Return the layer of a site."""
    shape = shape3(a)
    return Layer(
        name=name,
        kind="component",
        leaf=leaf,
        value=a.reshape(shape),
        nodes=is_node.reshape(shape),
        importance=g.detach().reshape(shape),
    )


def _whole_layer(name: str, kind: NodeKind, leaf: Tensor) -> Layer:
    """Return the layer of a leaf that is a single node at each position."""
    batch, positions, _ = shape3(leaf)
    vectors = leaf.detach().reshape(batch, positions, -1)  # [batch, pos, d]
    return whole_layer(name, kind, vectors, leaf)


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
        source_values = values[self.source]
        target_values = values[self.target]
        source_pos, source_component = self.source_at.unbind(1)
        target_pos, target_component = self.target_at.unbind(1)
        source = source_values[self.prompt, source_pos, source_component]
        target = target_values[self.prompt, target_pos, target_component]
        return source, target

    def within_position(self) -> "LayerEdges":
        """Return the edges that stay at their position."""
        source_pos = self.source_at[:, 0]
        target_pos = self.target_at[:, 0]
        stays = source_pos == target_pos
        return self._replace(
            prompt=self.prompt[stays],
            source_at=self.source_at[stays],
            target_at=self.target_at[stays],
            attribution=self.attribution[stays],
        )


def as_tables(layers: list[Layer], edges: Iterable[LayerEdges]) -> Iterator[EdgeTable]:
    """Turn edges between layers into flat tables."""
    numbers = node_numbers(layers)
    for piece in edges:
        source, target = piece.look_up(numbers)
        yield EdgeTable(piece.prompt, source, target, piece.attribution)


def vjp_edges(
    layers: list[Layer], pairs: set[tuple[int, int]] | None = None
) -> Iterator[LayerEdges]:
    """Compute the edges between nodes of a cut run by batched vector-Jacobian products.

    Edges across positions are included only where they are not exactly zero: elsewhere no direct
    path moves between positions.

    pairs: the pairs of layers (source, target) to include; all if omitted.
    """
    for t, target, leaves in _targets_with_leaves(layers):
        if pairs is not None:
            leaves = {s: leaf for s, leaf in leaves.items() if (s, t) in pairs}
        for entries, gradients in _vjps(target, list(leaves.values())):
            for s, gradient in zip(leaves, gradients, strict=True):
                if gradient is None:
                    continue
                selected = _select_edges(layers[s], target, entries, gradient)
                yield LayerEdges(s, t, *selected)


def _is_target(layer: Layer) -> bool:
    """Return whether edges can end in a layer."""
    if layer.kind not in ("component", "output"):
        return False
    return layer.value.requires_grad


def _vjps(
    target: Layer, leaves: list[Tensor]
) -> Iterator[tuple[Tensor, tuple[Tensor | None, ...]]]:
    """Yield chunks of target entries (pos, component) that are nodes, and their gradients."""
    if not leaves:
        return
    value = target.value  # [batch, pos, K]
    entries = target.nodes.any(0).nonzero()  # [entries, 2]
    if not len(entries):
        return
    widest_leaf = max(leaf.numel() for leaf in leaves)
    widest = max(widest_leaf, value.numel())
    size = max(1, budgets.MAX_VJP_NUMBERS // widest)
    for chunk in entries.split(size):
        # One cotangent for each entry: 1 at that entry of every prompt, 0 elsewhere.
        pos, component = chunk.unbind(1)
        every = torch.arange(len(chunk))
        cotangents = value.new_zeros(len(chunk), *value.shape)
        cotangents[every, :, pos, component] = 1
        gradients = torch.autograd.grad(
            value, leaves, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
        yield chunk, gradients


def _select_edges(
    source: Layer, target: Layer, entries: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Select from the products of one chunk those that join two nodes.

    Returns the columns of `LayerEdges`: prompt, both ends, and attribution.
    """
    values = source.contributions(gradient)  # [targets, batch, pos, K]
    target_pos, component = entries.unbind(1)  # [targets] each
    target_is_node = target.nodes[:, target_pos, component].T  # [targets, batch]
    both_are_nodes = target_is_node[:, :, None, None] & source.nodes

    source_pos = torch.arange(values.shape[2], device=values.device)
    same_position = target_pos[:, None] == source_pos  # [targets, pos]
    same_position = same_position[:, None, :, None]  # [targets, 1, pos, 1]
    exists = both_are_nodes & (same_position | (values != 0))
    rows = exists.nonzero()  # [edges, 4]
    target_number, prompt, pos, component = rows.unbind(1)
    source_at = rows[:, 2:]  # [edges, 2]: pos and component
    target_at = entries[target_number]  # [edges, 2]
    attribution = values[target_number, prompt, pos, component]
    return prompt, source_at, target_at, attribution


# ---- which layers are connected ------------------------------------------------------------------


def connected(layers: list[Layer]) -> set[tuple[int, int]]:
    """Return the pairs of layers joined by a direct path (A4), that is, by a gradient."""
    pairs = set()
    for t, target, leaves in _targets_with_leaves(layers):
        total = target.value.sum()
        for s, gradient in _gradients(total, leaves):
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
        value = target.value  # [batch, pos, K]
        if value.shape[1] == 1:
            continue
        for parity in (0, 1):
            opposite = 1 - parity
            total = value[:, parity::2].sum()
            for s, gradient in _gradients(total, leaves):
                if gradient is None:
                    continue
                by_position = gradient.reshape(shape3(gradient))
                elsewhere = by_position[:, opposite::2]
                if elsewhere.any():
                    pairs.add((s, t))
    return pairs


def _targets_with_leaves(layers: list[Layer]) -> Iterator[tuple[int, Layer, dict[int, Tensor]]]:
    """Yield every layer that can be a target, with its number and the leaves of earlier layers."""
    leaves: dict[int, Tensor] = {}  # of all layers before t
    for t, target in enumerate(layers):
        if leaves and _is_target(target):
            yield t, target, dict(leaves)
        if target.leaf is not None:
            leaves[t] = target.leaf


def _gradients(total: Tensor, leaves: dict[int, Tensor]) -> Iterator[tuple[int, Tensor | None]]:
    """Return the gradient of a number at each leaf, by the leaf's key; None without a path."""
    tensors = list(leaves.values())
    gradients = torch.autograd.grad(total, tensors, retain_graph=True, allow_unused=True)
    return zip(leaves, gradients, strict=True)


# ---- graphs --------------------------------------------------------------------------------------


def prompt_edges(spec: GraphSpec) -> tuple[list[Layer], list[LayerEdges]]:
    """Return the layers of the graphs of a batch of prompts, and all edges between their nodes.

    If delta carries gradient (mode `reference`, A5), only the pairs of layers that are direct in
    the cut run are included. Edges between them stay within a position, except for pairs that cross
    positions in the cut run.
    """
    graphs = VectorJacobianEdges(spec)
    edges = list(graphs.layer_edges())
    return graphs.layers, edges


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
            mode = replace(spec.mode, delta="cut")
            cut_layers = cut_run(spec._replace(mode=mode))
            self._direct = connected(cut_layers)
            self._crossing = crossing(cut_layers)

    def layer_edges(self) -> Iterator[LayerEdges]:
        """Compute the edges for one pair of layers and one chunk of targets at a time."""
        for edges in vjp_edges(self.layers, self._direct):
            pair = (edges.source, edges.target)
            if self._direct is None or pair in self._crossing:
                yield edges
            else:
                yield edges.within_position()

    def for_each(self, visit: Callable[[EdgeTable], None]) -> None:
        """Compute all edges, and pass each piece to `visit`."""
        for table in as_tables(self.layers, self.layer_edges()):
            visit(table)


EdgeKey = tuple[str, int, int, str, int, int]


def oracle(layers: list[Layer]) -> dict[tuple[NodeKind, EdgeKey], float]:
    """Compute every edge of one prompt by definition: one `autograd.grad` per target node (A7).

    layers: a cut run of a batch of one. Returns {(source kind, (S, s', i, T, s, j)): attribution}.
    """
    edges = {}
    for t, target in enumerate(layers):
        if not _is_target(target):
            continue
        sources = [layer for layer in layers[:t] if layer.leaf is not None]
        leaves = [layer.leaf for layer in sources if layer.leaf is not None]
        target_nodes = target.nodes[0].nonzero().tolist()
        for pos, j in target_nodes:
            value = target.value[0, pos, j]
            gradients = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
            for layer, gradient in zip(sources, gradients, strict=True):
                if gradient is None:
                    continue
                values = layer.contributions(gradient[None])[0, 0]  # [pos, K]
                source_nodes = layer.nodes[0].nonzero().tolist()
                for source_pos, i in source_nodes:
                    edge = values[source_pos, i].item()
                    if source_pos == pos or edge != 0:
                        key = (layer.name, source_pos, i, target.name, pos, j)
                        edges[layer.kind, key] = edge
    return edges
