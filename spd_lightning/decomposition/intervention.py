"""Interventions: the output of a model with chosen components ablated, scaled, set, or kept.

1. *Name* components as graphs do: `layer:pos:component`, or `layer:component` for all positions.
2. *Run* the target with every site in its decomposed form (D3). Component c adds `w_c U[c]` to the
   output of its site, with `w = m ∘ a`, a = x V.
3. *Edit*: an edit of component c replaces w_c by `factor · w_c + value`. All later computation sees
   the change:

       y = w' U + b                        (base ci, or with `keep`)
       y = x Wᵀ + b + (w' − a) U           (base unmasked)

The base is the model without edits. In base `unmasked`, all masks are one and the delta component
is present, so that the output is the target's (D5). In base `ci`, the importances of the clean run
are the masks, and the delta component is absent.

Source: activation patching, with components as the units. This module does not compute
attributions; their checks, which hold all other sites fixed, are in `attribution.checks`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spd_lightning.decomposition import names
from spd_lightning.decomposition.components import Map, Site
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.decomposition.names import BASES, Base, Place
from spd_lightning.errors import BadInput, nearest


class Edit(NamedTuple):
    """A change to a component: its w = m a becomes `factor · w + value`.

    To ablate it, use factor 0. To set it, use factor 0 and a value.
    """

    place: Place
    factor: float = 0.0
    value: float = 0.0


class Intervened(NamedTuple):
    """Outputs [batch, (pos,) K] of the target, of the base, and of the base with edits."""

    target: Tensor
    base: Tensor
    edited: Tensor


# ---- names ---------------------------------------------------------------------------------------


def place(model: ComponentModel, name: str) -> Place:
    """Return the place that `layer:pos:component` or `layer:component` refers to.

    Raises:
        BadInput: the name has another form, or the site or component does not exist.
    """
    return names.parse_place(model.counts, name)


def places(model: ComponentModel, nodes: Iterable[str]) -> list[Place]:
    """Return the places of those nodes of a graph that are components.

    Inputs, outputs, rests and biases are skipped, and so are embeddings that are not sites.

    Raises:
        BadInput: a name does not refer to a node.
    """
    not_sites = {"input", "output"}
    for name, module in model.target.named_modules():
        if isinstance(module, nn.Embedding) and name not in model.sites:
            not_sites.add(name)
    components = []
    for node in nodes:
        stripped = node.strip()
        layer, *numbers = stripped.split(":")
        if layer in not_sites:
            continue
        if numbers and numbers[-1] in ("rest", "bias"):
            continue
        components.append(place(model, node))
    return components


def named_edits(
    model: ComponentModel,
    ablate: Iterable[str] = (),
    scale: Mapping[str, float] | None = None,
    set: Mapping[str, float] | None = None,
) -> list[Edit]:
    """Return edits from the names of their components.

    Raises:
        BadInput: a name does not refer to a component.
    """
    scale = scale or {}
    set = set or {}
    edits = list[Edit]()
    for name in ablate:
        location = place(model, name)
        edits.append(Edit(location))
    for name, factor in scale.items():
        location = place(model, name)
        edits.append(Edit(location, factor=float(factor)))
    for name, value in set.items():
        location = place(model, name)
        edits.append(Edit(location, value=float(value)))
    return edits


# ---- running -------------------------------------------------------------------------------------


def intervene(
    model: ComponentModel,
    inputs: Tensor,
    edits: Sequence[Edit] = (),
    keep: Sequence[Place] | None = None,
    base: Base = "unmasked",
) -> Intervened:
    """Run inputs through the target, through the base, and through the base with edits.

    Importances are those of the clean run (G1), whatever is edited.

    Args:
        model: the decomposed model.
        inputs: [batch, features] floating point, or [batch, pos] token ids.
        edits: edits of one component act in their order.
        keep: if given, all other components are ablated, and so is the delta component (D1).
        base: the model to edit.

    Raises:
        BadInput: the base, a site, a component or a position does not exist.
    """
    if base not in BASES:
        raise BadInput(f"base '{base}': not a base of interventions; {nearest(base, BASES)}")
    _check_places(model, edits, keep)
    with torch.no_grad():
        clean = model.clean(inputs)
        g = None
        base_output = clean.output
        if base == "ci":
            g = model.importances(clean).lower
            unedited = _EditedRun(model, g, [], None)
            base_output = unedited.run(inputs)
        edited = _EditedRun(model, g, edits, keep)
        output = edited.run(inputs)
        return Intervened(clean.output, base_output, output)


def _check_places(
    model: ComponentModel, edits: Sequence[Edit], keep: Sequence[Place] | None
) -> None:
    """Raise BadInput if a component that is edited or kept does not exist."""
    locations = [edit.place for edit in edits]
    if keep is not None:
        locations += keep
    for location in locations:
        names.check_known(model.counts, location)


class _EditedRun:
    """One forward pass with edits (steps 2 and 3).

    Args:
        model: the decomposed model.
        g: the masks, without a delta component; None means masks of one and the delta component.
        edits: the changes.
        keep: the components that are not ablated; None means all of them and the delta component.
    """

    def __init__(
        self,
        model: ComponentModel,
        g: Mapping[str, Tensor] | None,
        edits: Sequence[Edit],
        keep: Sequence[Place] | None,
    ):
        self.model = model
        self.g = g
        self.edits = edits
        self.keep = keep
        self.with_delta = g is None and keep is None

    def run(self, inputs: Tensor) -> Tensor:
        """Return the output."""
        model = self.model
        with model.replaced(self._at_site):
            return model.target(inputs)

    def _at_site(self, site: Site, x: Tensor, forward: Map) -> Tensor:
        """Return the output of a site with its edits."""
        edits = self._edits_of(site)
        if self.with_delta and not edits:
            return forward(x)
        components = self.model[site.name]
        a = site.inner(x, components.V)  # [..., C]
        w = a
        if self.g is not None:
            w = self.g[site.name] * a  # step 2
        w = self._edit(site, w, edits)  # step 3
        if self.with_delta:
            change = (w - a) @ components.U  # [..., d_out]
            return forward(x) + change
        y = w @ components.U  # [..., d_out]
        bias = site.bias
        if bias is None:
            return y
        return y + bias

    def _edits_of(self, site: Site) -> list[Edit]:
        """Return the edits of components of a site."""
        return [edit for edit in self.edits if edit.place.site == site.name]

    def _edit(
        self, site: Site, w: Float[Tensor, "... C"], edits: Sequence[Edit]
    ) -> Float[Tensor, "... C"]:
        """Return w' of a site."""
        by_position = _by_position(site, w)  # [..., pos, C]
        if self.keep is not None:
            mask = _keep_mask(site, by_position, self.keep)
            by_position = by_position * mask
        for edit in edits:
            by_position = _apply(by_position, edit)
        return by_position.reshape(w.shape)


def _by_position(site: Site, w: Float[Tensor, "... C"]) -> Float[Tensor, "... pos C"]:
    """Return w with a dimension of positions; a model on vectors has one position."""
    has_positions = w.ndim > 2 or site.kind == "embedding"
    if has_positions:
        return w
    return w.unsqueeze(-2)


def _index(location: Place, by_position: Float[Tensor, "... pos C"]) -> tuple:
    """Return the index of a place in values [..., pos, C]."""
    length = by_position.shape[-2]
    names.check_within(location, length)
    if location.positions is None:
        positions = slice(None)
    else:
        positions = list(location.positions)
    return (..., positions, location.component)


def _keep_mask(
    site: Site, by_position: Float[Tensor, "... pos C"], keep: Sequence[Place]
) -> Float[Tensor, "... pos C"]:
    """Return one where a component is kept, and zero elsewhere."""
    mask = torch.zeros_like(by_position)
    for location in keep:
        if location.site == site.name:
            index = _index(location, by_position)
            mask[index] = 1
    return mask


def _apply(by_position: Float[Tensor, "... pos C"], edit: Edit) -> Float[Tensor, "... pos C"]:
    """Return the values with one edit applied."""
    index = _index(edit.place, by_position)
    out = by_position.clone()
    w = out[index]
    out[index] = edit.factor * w + edit.value
    return out
