"""Interventions: what a model says when chosen components are set, scaled, switched off, or all
that is left.

1. *Name* components as graphs do: `layer:pos:component`, or `layer:component` at all positions.
2. *Run* the target with every site in its decomposed form (D3), where a component writes `w U` with
   `w = m a`; an edit changes w, everything behind it sees the change.

Two bases. `unmasked`: all masks one and the delta in place, so that without edits the output is the
target's (D5). `ci`: the importances of the clean run as masks, no delta. What does not belong here:
attributions, whose checks hold all other sites still (`checks`).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spd_lightning.decomposition import names
from spd_lightning.decomposition.components import Site
from spd_lightning.decomposition.model import ComponentModel, Map
from spd_lightning.decomposition.names import BASES, Base, Place
from spd_lightning.errors import BadInput, nearest


class Edit(NamedTuple):
    """A change to a component: its w = m a becomes `factor · w + value`.

    Ablating is factor 0; setting is factor 0 and a value.
    """

    place: Place
    factor: float = 0.0
    value: float = 0.0


class Intervened(NamedTuple):
    """Outputs [batch, (pos,) K] of the target as it is, of the base without edits, and with
    them.
    """

    target: Tensor
    base: Tensor
    edited: Tensor


# ---- names ---------------------------------------------------------------------------------------


def place(model: ComponentModel, name: str) -> Place:
    """Return the place that `layer:pos:component` or `layer:component` names (`names.place`).

    Raises:
        BadInput: the name has another form, or there is no such site or component.
    """
    return names.place(model.counts, name)


def places(model: ComponentModel, nodes: Iterable[str]) -> list[Place]:
    """The places that names of a graph's nodes mean; what is not a component (inputs, outputs,
    rests, biases) has none.

    Raises:
        BadInput: a name names nothing.
    """
    fixed = {n for n, m in model.target.named_modules() if isinstance(m, nn.Embedding)} - set(
        model.sites
    )
    fixed |= {"input", "output"}
    split = [(name, name.strip().split(":")) for name in nodes]
    return [
        place(model, name)
        for name, (layer, *at) in split
        if layer not in fixed and at[-1:] not in _NO_COMPONENT
    ]


_NO_COMPONENT = (["rest"], ["bias"])


def named_edits(
    model: ComponentModel,
    ablate: Iterable[str] = (),
    scale: Mapping[str, float] | None = None,
    set: Mapping[str, float] | None = None,
) -> list[Edit]:
    """Edits by the names of their components.

    Raises:
        BadInput: a name names nothing.
    """
    edits = [Edit(place(model, name)) for name in ablate]
    edits += [
        Edit(place(model, name), factor=float(factor)) for name, factor in (scale or {}).items()
    ]
    return edits + [
        Edit(place(model, name), value=float(value)) for name, value in (set or {}).items()
    ]


# ---- running -------------------------------------------------------------------------------------


def intervene(
    model: ComponentModel,
    inputs: Tensor,
    edits: Sequence[Edit] = (),
    keep: Sequence[Place] | None = None,
    base: Base = "unmasked",
) -> Intervened:
    """Runs inputs through the target, through the base, and through the base with edits.

    inputs: [batch, features] floating point, or [batch, pos] token ids. keep: where given, all
    components elsewhere are ablated, and so is the delta, which is one of them (D1). Edits of one
    component act in their order. Importances are those of the clean run (G1), whatever is edited.

    Raises:
        BadInput: no such base, site, component or position.
    """
    if base not in BASES:
        raise BadInput(f"base '{base}': no such run of the model; {nearest(base, BASES)}")
    for at in [*(edit.place for edit in edits), *(keep or ())]:
        names.known(model.counts, at)
    with torch.no_grad():
        clean = model.clean(inputs)
        g = model.importances(clean).lower if base == "ci" else None
        plain = clean.output if g is None else _run(model, inputs, g, [], None)
        return Intervened(clean.output, plain, _run(model, inputs, g, edits, keep))


def _run(
    model: ComponentModel,
    inputs: Tensor,
    g: Mapping[str, Tensor] | None,
    edits: Sequence[Edit],
    keep: Sequence[Place] | None,
) -> Tensor:
    """One forward pass; g as masks without a delta, or all masks one with it."""

    def at_site(site: Site, x: Tensor, own: Map) -> Tensor:
        mine = [edit for edit in edits if edit.place.site == site.name]
        whole = g is None and keep is None
        if whole and not mine:
            return own(x)
        a = site.inner(x, model[site.name].V)
        w = a if g is None else g[site.name] * a
        view = _by_position(site, w)
        if keep is not None:
            view = view * _kept(site, view, keep)
        for edit in mine:
            view = _edited(view, edit)
        w = view.reshape(w.shape)
        if whole:
            return own(x) + (w - a) @ model[site.name].U
        y = w @ model[site.name].U
        return y if site.bias is None else y + site.bias

    with model.replaced(at_site):
        return model.target(inputs)


def _by_position(site: Site, w: Float[Tensor, "... C"]) -> Float[Tensor, "... pos C"]:
    """With a dimension of positions; a model on vectors has one position."""
    return w if w.ndim > 2 or site.kind == "embedding" else w.unsqueeze(-2)


def _at(view: Tensor, at: Place) -> tuple:
    """Where a place lies in values [..., pos, C]."""
    names.within(at, view.shape[-2])
    return (..., slice(None) if at.positions is None else list(at.positions), at.component)


def _kept(
    site: Site, view: Float[Tensor, "... pos C"], keep: Sequence[Place]
) -> Float[Tensor, "... pos C"]:
    """One where a component is kept, zero elsewhere."""
    mask = torch.zeros_like(view)
    for at in keep:
        if at.site == site.name:
            mask[_at(view, at)] = 1
    return mask


def _edited(view: Float[Tensor, "... pos C"], edit: Edit) -> Float[Tensor, "... pos C"]:
    index = _at(view, edit.place)
    out = view.clone()
    out[index] = edit.factor * out[index] + edit.value
    return out
