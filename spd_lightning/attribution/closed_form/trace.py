"""One run of a decoder, with all that the closed forms of its graphs ask for (section A of docs/method.md)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spd_lightning.attribution.graph import Layer, Mode, NodeKind, Subject
from spd_lightning.decomposition.components import Site
from spd_lightning.decomposition.model import ComponentModel, Map


def why_not(model: ComponentModel, mode: Mode) -> str | None:
    """Return the reason why a model's graphs have no closed form, or None if they have."""
    if not getattr(model.target, "closed_forms", False):
        return f"{type(model.target).__name__} is not a supported decoder"
    if mode.delta == "flow":
        return "this mode lets delta carry gradient"
    if strange := sorted(set(model.sites) - set(_maps(model.target)) - {"wte", "lm_head"}):
        return f"'{strange[0]}' is decomposed"
    return None


def _maps(target: Any) -> dict[str, nn.Module]:
    """The maps of all blocks by name."""
    return {name: m for name, m in target.named_modules() if name.startswith("h.") and name.endswith(("_proj", "c_fc"))}


# ---- one forward pass -----------------------------------------------------------------------------------------------


Key = tuple[NodeKind, str]
"""A layer of the graph: what its nodes are, and its name."""


class Trace(NamedTuple):
    """One recorded forward pass of a batch: inputs of norms; outputs of maps; a = x V and w = m ∘ a of sites.

    output: what its output nodes stand for [batch, pos, K]. whole: what layers with one node a position write
    [batch, pos, d]. order: all layers but the output, as they came.
    """

    of: Subject
    output: Tensor
    into: dict[nn.Module, Tensor]
    out: dict[nn.Module, Tensor]
    inner: dict[str, Tensor]
    weight: dict[str, Tensor]
    whole: dict[Key, Tensor]
    order: list[Key]


def trace(of: Subject) -> Trace:
    """Runs a batch of prompts under a mode's masks; in frozen ones rests and biases are layers too (A6)."""
    model, inputs, mode = of.model, of.inputs, of.mode
    target: Any = model.target
    found = Trace(of, inputs, {}, {}, {}, {}, {}, [])
    sites = {site.module for site in model.sites.values()}
    norms = {m: n for n, m in target.named_modules() if n == "norm_f" or n.endswith(("norm_1", "norm_2"))}
    plain = norms | {m: name for name, m in _maps(target).items() if m not in sites}
    tables = {m: name for name, m in (("wte", target.wte), ("wpe", target.wpe)) if m is not None and m not in sites}

    def write(kind: NodeKind, name: str, vectors: Tensor, like: Tensor) -> None:
        found.whole[kind, name] = vectors.expand_as(like)
        found.order.append((kind, name))

    def at_site(site: Site, x: Tensor, own: Map) -> Tensor:
        parts, g, bias = model[site.name], of.importances[site.name], 0.0 if site.bias is None else site.bias
        a = site.inner(x, parts.V)
        w = a if mode.mask == "ones" else g * a
        y = own(x) if mode.delta != "off" else w @ parts.U + bias
        if mode.delta != "off" and mode.mask != "ones":
            y = y + (w - a) @ parts.U
        found.inner[site.name], found.weight[site.name] = a, w
        found.out[site.module] = y
        found.order.append(("component", site.name))
        if of.frozen:
            write("rest", site.name, y - bias - (w * of.held(site.name, g)) @ parts.U, y)
            write("bias", site.name, y.new_zeros(()) + bias, y)
        return y

    def at_module(module: nn.Module, own: Map) -> Map:
        def forward(x: Tensor) -> Tensor:
            y = own(x)
            if module in tables:
                write("embedding", tables[module], y, y.expand(len(inputs), *y.shape[-2:]))
            elif of.frozen and getattr(module, "bias", None) is not None:
                write("bias", plain[module], module.bias, y)  # pyright: ignore
            found.into[module], found.out[module] = x, y
            return y

        return forward

    with torch.no_grad(), model.replaced(at_site, at_module, [*plain, *tables]):
        return found._replace(output=of.reading(target(inputs)))


def layers_of(run: Trace) -> list[Layer]:
    """The layers of the graphs, in forward order, as `autograd.cut_run` gives them, but no leaves."""
    layers = []
    for kind, name in run.order:
        if kind == "component":
            g = run.of.importances[name].detach()
            layers.append(Layer(name, kind, None, run.inner[name], run.of.held(name, g), g))
        else:
            size = run.whole[kind, name].norm(dim=-1, keepdim=True)
            layers.append(Layer(name, kind, None, size, torch.ones_like(size, dtype=torch.bool), whole=True))
    return [*layers, Layer("output", "output", None, run.output, run.of.outputs(run.output))]
