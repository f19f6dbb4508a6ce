"""One recorded run of a decoder, for the closed forms of graphs (section A of docs/method.md)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spd_lightning.attribution.autograd import bias_of
from spd_lightning.attribution.graph import GraphSpec, Layer, LayerKey, Mode, NodeKind
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
    known = {*layout.maps(), layout.embeddings[0], layout.unembedding}
    if unknown := sorted(set(model.sites) - known):
        return f"'{unknown[0]}' is decomposed"
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
        self.spec, self.model = spec, spec.model
        self.target: Any = spec.model.target
        self.trace = Trace(spec, spec.inputs, {}, {}, {}, {}, {}, [])
        layout = self.target.layout
        sites = {site.module for site in self.model.sites.values()}
        modules = {
            name: self.target.get_submodule(name) for name in (*layout.norms(), *layout.maps())
        }
        embeddings = {name: getattr(self.target, name) for name in layout.embeddings}
        self.plain = {m: name for name, m in modules.items() if m not in sites}
        """Norms, and maps that are not sites."""
        self.embeddings = {
            m: name for name, m in embeddings.items() if m is not None and m not in sites
        }

    def run(self) -> Trace:
        """Run the prompts."""
        recorded = [*self.plain, *self.embeddings]
        with torch.no_grad(), self.model.replaced(self._at_site, self._at_module, recorded):
            output = self.spec.reading(self.target(self.spec.inputs))
        return self.trace._replace(output=output)

    def _at_site(self, site: Site, x: Tensor, own: Map) -> Tensor:
        mode, name = self.spec.mode, site.name
        components = self.model[name]
        g = self.spec.importances[name]
        bias = 0.0 if site.bias is None else site.bias
        a = site.inner(x, components.V)
        w = a if mode.mask == "ones" else g * a
        if mode.delta == "off":
            y = w @ components.U + bias
        else:
            y = own(x)
            if mode.mask != "ones":
                y = y + (w - a) @ components.U
        self.trace.inner[name], self.trace.weight[name] = a, w
        self.trace.map_outputs[site.module] = y
        self.trace.order.append(("component", name))
        if self.spec.frozen:
            written = (w * self.spec.is_node(name, g)) @ components.U
            self._add_whole("rest", name, y - bias - written, y)
            self._add_whole("bias", name, y.new_zeros(()) + bias, y)
        return y

    def _at_module(self, module: nn.Module, own: Map) -> Map:
        def forward(x: Tensor) -> Tensor:
            y = own(x)
            if module in self.embeddings:
                spread = y.expand(len(self.spec.inputs), *y.shape[-2:])
                self._add_whole("embedding", self.embeddings[module], y, spread)
            elif self.spec.frozen and (bias := bias_of(module)) is not None:
                self._add_whole("bias", self.plain[module], bias, y)
            self.trace.norm_inputs[module], self.trace.map_outputs[module] = x, y
            return y

        return forward

    def _add_whole(self, kind: NodeKind, name: str, vectors: Tensor, like: Tensor) -> None:
        self.trace.whole[kind, name] = vectors.expand_as(like)
        self.trace.order.append((kind, name))


def trace(spec: GraphSpec) -> Trace:
    """Run prompts under a mode's masks; in frozen graphs rests and biases are layers too (A6)."""
    return _Recorder(spec).run()


def layers_of(run: Trace) -> list[Layer]:
    """Return the graphs' layers in forward order, like `autograd.cut_run`, but without leaves."""
    spec = run.spec
    layers = list[Layer]()
    for kind, name in run.order:
        if kind == "component":
            g = spec.importances[name].detach()
            layers.append(Layer(name, kind, None, run.inner[name], spec.is_node(name, g), g))
        else:
            size = run.whole[kind, name].norm(dim=-1, keepdim=True)
            every = torch.ones_like(size, dtype=torch.bool)
            layers.append(Layer(name, kind, None, size, every, whole=True))
    return [*layers, Layer("output", "output", None, run.output, spec.outputs(run.output))]
