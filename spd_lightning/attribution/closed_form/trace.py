"""One recorded run of a decoder, for the closed forms of graphs (section A of docs/method.md)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spd_lightning.attribution.autograd import bias_of
from spd_lightning.attribution.graph import GraphSpec, Layer, LayerKey, Mode, NodeKind, whole_layer
from spd_lightning.decomposition.components import Site
from spd_lightning.decomposition.model import ComponentModel, Map
from spd_lightning.targets.transformer import Decoder


def closed_form_obstacle(model: ComponentModel, mode: Mode) -> str | None:
    """Return the reason why a model's graphs have no closed form, or None if they have one."""
    target = model.target
    if not isinstance(target, Decoder):
        return f"{type(target).__name__} is not a supported decoder"
    if mode.delta == "flow":
        return "this mode lets delta carry gradient"
    layout = target.layout
    supported = {*layout.maps(), layout.embeddings[0], layout.unembedding}
    others = set(model.sites) - supported
    if others:
        return f"'{min(others)}' is decomposed"
    return None


# ---- one forward pass ----------------------------------------------------------------------------


class Trace(NamedTuple):
    """A recorded forward pass of a batch of prompts.

    output: the quantities that output nodes stand for [batch, pos, K].
    norm_inputs, map_outputs: by module.
    inner, weight: a = x V and w = m ∘ a, by site.
    whole: the vectors [batch, pos, d] of layers with a single node at each position.
    order: all layers except the output, in forward order.
    """

    spec: GraphSpec
    output: Tensor
    norm_inputs: dict[nn.Module, Tensor]
    map_outputs: dict[nn.Module, Tensor]
    inner: dict[str, Tensor]
    weight: dict[str, Tensor]
    whole: dict[LayerKey, Tensor]
    order: list[LayerKey]


class _Recorder:
    """Runs a decoder under a mode's masks and records what passes through its parts."""

    def __init__(self, spec: GraphSpec):
        self.spec = spec
        self.model = spec.model
        self.target: Any = spec.model.target
        self.trace = Trace(
            spec=spec,
            output=spec.inputs,  # until the run is over
            norm_inputs={},
            map_outputs={},
            inner={},
            weight={},
            whole={},
            order=[],
        )
        layout = self.target.layout
        sites = {site.module for site in self.model.sites.values()}

        self.plain: dict[nn.Module, str] = {}
        """Norms, and maps that are not sites."""
        for name in (*layout.norms(), *layout.maps()):
            module = self.target.get_submodule(name)
            if module not in sites:
                self.plain[module] = name

        self.embeddings: dict[nn.Module, str] = {}
        """Embeddings that are not sites."""
        for name in layout.embeddings:
            module = getattr(self.target, name)  # None in a decoder without position embeddings
            if module is not None and module not in sites:
                self.embeddings[module] = name

    def run(self) -> Trace:
        """Run the prompts."""
        recorded = [*self.plain, *self.embeddings]
        with torch.no_grad(), self.model.replaced(self._at_site, self._at_module, recorded):
            logits = self.target(self.spec.inputs)
            output = self.spec.reading(logits)
        return self.trace._replace(output=output)

    def _at_site(self, site: Site, x: Tensor, original: Map) -> Tensor:
        spec = self.spec
        mode = spec.mode
        name = site.name
        components = self.model[name]
        U = components.U
        g = spec.importances[name]
        bias = 0.0
        if site.bias is not None:
            bias = site.bias
        a = site.inner(x, components.V)
        w = a
        if mode.mask == "ci":
            w = g * a
        if mode.delta == "off":
            y = w @ U + bias
        else:
            y = original(x)  # all components with mask 1, and the delta (D5)
            if mode.mask == "ci":
                y = y + (w - a) @ U
        trace = self.trace
        trace.inner[name] = a
        trace.weight[name] = w
        trace.map_outputs[site.module] = y
        trace.order.append(("component", name))
        if spec.frozen:
            is_node = spec.is_node(name, g)
            written = (w * is_node) @ U  # Σ_nodes w_i U_i
            rest = y - bias - written  # (A6)
            self._add_whole("rest", name, rest, y)
            self._add_whole("bias", name, y.new_zeros(()) + bias, y)
        return y

    def _at_module(self, module: nn.Module, original: Map) -> Map:
        """Return a forward pass that records a norm, an embedding, or a map that is not a site."""
        trace = self.trace

        def forward(x: Tensor) -> Tensor:
            y = original(x)
            trace.norm_inputs[module] = x
            trace.map_outputs[module] = y
            if module in self.embeddings:
                name = self.embeddings[module]
                self._add_embedding(name, y)
                return y
            # In frozen graphs, the bias of a norm or of a map that is not a site is a leaf (A6).
            bias = bias_of(module)
            if self.spec.frozen and bias is not None:
                name = self.plain[module]
                self._add_whole("bias", name, bias, y)
            return y

        return forward

    def _add_embedding(self, name: str, vectors: Tensor) -> None:
        """Record an embedding; one of positions is the same for all prompts."""
        prompts = len(self.spec.inputs)
        by_prompt = vectors.expand(prompts, -1, -1)
        self._add_whole("embedding", name, vectors, by_prompt)

    def _add_whole(self, kind: NodeKind, name: str, vectors: Tensor, like: Tensor) -> None:
        """Record a layer with a single node at each position; its vectors expand to `like`."""
        key = (kind, name)
        self.trace.whole[key] = vectors.expand_as(like)
        self.trace.order.append(key)


def trace(spec: GraphSpec) -> Trace:
    """Run prompts under a mode's masks; in frozen graphs rests and biases are layers too (A6)."""
    recorder = _Recorder(spec)
    return recorder.run()


def layers_of(run: Trace) -> list[Layer]:
    """Return the graphs' layers in forward order, like `autograd.cut_run`, but without leaves."""
    spec = run.spec
    layers = list[Layer]()
    for kind, name in run.order:
        if kind == "component":
            layer = _component_layer(run, name)
        else:
            vectors = run.whole[kind, name]
            layer = whole_layer(name, kind, vectors)
        layers.append(layer)
    nodes = spec.outputs(run.output)
    output = Layer("output", "output", None, run.output, nodes)
    return [*layers, output]


def _component_layer(run: Trace, name: str) -> Layer:
    """Return the layer of a site, without a leaf."""
    g = run.spec.importances[name].detach()
    return Layer(
        name=name,
        kind="component",
        leaf=None,
        value=run.inner[name],
        nodes=run.spec.is_node(name, g),
        importance=g,
    )
