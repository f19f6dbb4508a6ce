"""One run of a decoder, with all that the closed forms of its graphs ask for (section A of docs/method.md)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spd_lightning.decomposition.attribution import Layer, Mode, OutputNodes
from spd_lightning.decomposition.components import Site
from spd_lightning.decomposition.model import ComponentModel, Map


def why_not(model: ComponentModel, mode: Mode) -> str | None:
    """What keeps a model's graphs from closed form; None where nothing does."""
    if not getattr(model.target, "closed_forms", False):
        return f"{type(model.target).__name__} is no decoder whose parts are known"
    if mode.delta == "flow" or mode.linearisation == "frozen":
        return "this mode takes more than Jacobians of known parts"
    known = {name for block in range(len(model.target.h)) for name in _maps(model.target, block)}  # pyright: ignore
    if missing := sorted(known - set(model.sites)):
        return f"'{missing[0]}' is not decomposed"
    if strange := sorted(set(model.sites) - known - {"wte", "lm_head"}):
        return f"'{strange[0]}' is decomposed"
    return None


def _maps(target: Any, block: int) -> list[str]:
    """The names of a block's maps."""
    mlp = [name for name in ("c_fc", "gate_proj", "up_proj", "down_proj") if hasattr(target.h[block].mlp, name)]
    return [f"h.{block}.attn.{x}_proj" for x in "qkvo"] + [f"h.{block}.mlp.{name}" for name in mlp]


# ---- one forward pass -----------------------------------------------------------------------------------------------


class Trace(NamedTuple):
    """What a batch of prompts did inside the model: inputs and outputs of parts, a = x V and w = m ∘ a of sites.

    order: embeddings that are no sites, and sites, as they came.
    """

    output: Tensor
    into: dict[nn.Module, Tensor]
    out: dict[nn.Module, Tensor]
    inner: dict[str, Tensor]
    weight: dict[str, Tensor]
    order: list[str]


def trace(model: ComponentModel, inputs: Tensor, importances: Mapping[str, Tensor], mode: Mode) -> Trace:
    """Runs a batch of prompts under a mode's masks."""
    target: Any = model.target
    found = Trace(inputs, {}, {}, {}, {}, [])
    sites = {site.module for site in model.sites.values()}
    norms = [norm for block in target.h for norm in (block.norm_1, block.norm_2)] + [target.norm_f]
    tables = {m: name for name, m in (("wte", target.wte), ("wpe", target.wpe)) if m is not None and m not in sites}

    def at_site(site: Site, x: Tensor, own: Map) -> Tensor:
        parts, g = model[site.name], importances[site.name]
        a = site.inner(x, parts.V)
        w = a if mode.mask == "ones" else g * a
        y = own(x) if mode.delta != "off" else (w @ parts.U if site.bias is None else w @ parts.U + site.bias)
        if mode.delta != "off" and mode.mask != "ones":
            y = y + (w - a) @ parts.U
        found.inner[site.name], found.weight[site.name] = a, w
        found.into[site.module], found.out[site.module] = x, y
        found.order.append(site.name)
        return y

    def at_module(module: nn.Module, own: Map) -> Map:
        def forward(x: Tensor) -> Tensor:
            y = own(x)
            if module in tables:
                found.order.append(tables[module])
                y = y.expand(len(inputs), *y.shape[-2:])
            found.into[module], found.out[module] = x, y
            return y

        return forward

    with torch.no_grad(), model.replaced(at_site, at_module, [*norms, *tables]):
        return found._replace(output=model.target(inputs))


def layers_of(
    model: ComponentModel, run: Trace, importances: Mapping[str, Tensor], threshold: float, output_nodes: OutputNodes
) -> list[Layer]:
    """The layers of the graphs, in forward order, as `attribution.cut_run` gives them, but no leaves."""
    layers = []
    for name in run.order:
        if name in model.sites:
            g = importances[name].detach()
            layers.append(Layer(name, "component", None, run.inner[name], g > threshold, g))
        else:
            size = run.out[model.target.get_submodule(name)].norm(dim=-1, keepdim=True)
            layers.append(Layer(name, "embedding", None, size, torch.ones_like(size, dtype=torch.bool), whole=True))
    return [*layers, Layer("output", "output", None, run.output, output_nodes(run.output))]
