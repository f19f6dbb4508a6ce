"""The decomposed model: a frozen target that can run under masks.

1. A *clean* run of the target gives its output, and the input x and output of every site. The inner
   activations a = x V follow (D2).
2. The importance function reads them and returns the causal importance of every component (G1).
3. A *masked* run replaces the output of chosen sites by their masked components (D3, D4):

       y = (m ∘ a) U + m_Δ (x Δᵀ) + b      at the sites and positions of the route
       y = x Wᵀ + b                        everywhere else

   Up to the first site that it changes, a masked run takes the outputs from the clean run of the
   same batch (see `replay`).

Source: SPD (Bushnaq et al., 2025, arXiv 2506.20790). Losses, schedules and the choice of masks do
not belong here.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spd_lightning.decomposition.components import (
    Components,
    Map,
    Mask,
    Site,
    TiedComponents,
    find_sites,
    masked_output,
)
from spd_lightning.decomposition.importance import Importance, Importances
from spd_lightning.decomposition.importance_functions import importance_function
from spd_lightning.decomposition.matmul import matmul
from spd_lightning.decomposition.replay import Clean, Inner, Recorder, Replay
from spd_lightning.errors import BadInput, nearest

Replacement = Callable[[Site, Tensor, Map], Tensor]
"""A function of a site, its input and its original map, which returns the output to use."""


class ComponentModel(nn.Module):
    """A frozen target with the components of its sites and their importance function.

    Args:
        target: the network to decompose; it is put in eval mode and its parameters are frozen (D6).
        sites: fnmatch patterns of module names, each with a number of components.
        tied: site → partner, if the weight of the site is the transpose of its partner's (D9).
        importance: how causal importances are computed.
        delta: whether the delta component takes part in masked runs.

    Raises:
        BadInput: a pattern matches nothing or overlaps another; a name in `tied` is not a site; the
            weights of tied sites are not transposes.

    Examples:
        >>> import torch
        >>> from spd_lightning import TMS, ComponentModel
        >>> model = ComponentModel(TMS(5, 2), sites={"linear*": 20})
        >>> model["linear1"].V.shape, model["linear1"].U.shape
        (torch.Size([5, 20]), torch.Size([20, 2]))
        >>> clean = model.clean(torch.rand(8, 5))
        >>> model.importances(clean).lower["linear1"].shape
        torch.Size([8, 20])
    """

    def __init__(
        self,
        target: nn.Module,
        sites: Mapping[str, int],
        tied: Mapping[str, str] | None = None,
        importance: Importance | None = None,
        delta: bool = True,
    ):
        super().__init__()
        self.target = target.eval().requires_grad_(False)
        sites_and_counts = find_sites(target, sites)
        self.sites: dict[str, Site] = {}
        self.counts: dict[str, int] = {}
        for name, (site, C) in sites_and_counts.items():
            self.sites[name] = site
            self.counts[name] = C
        self.tied = dict(tied or {})
        unknown = set(self.tied) - set(self.sites)
        if unknown:
            name = min(unknown)
            raise BadInput(f"tied: '{name}' is not a site; {nearest(name, self.sites)}")
        self.components = nn.ModuleDict()
        partners_first = sorted(self.sites, key=lambda name: name in self.tied)
        for name in partners_first:
            key = _key(name)
            self.components[key] = self._components(name)
        self.importance = importance or Importance()
        self.importance_function = importance_function(self.importance, sites_and_counts)
        self.delta = delta
        self._plain = self._modules_without_sites()
        self._in_place = False  # True after a clean run in which the target changed a tensor
        self._places = torch.Size()  # [batch] or [batch, pos] of the current run

    def _components(self, name: str) -> nn.Module:
        """Return the components of a site, which can be tied."""
        partner = self.tied.get(name)
        if partner is None:
            site = self.sites[name]
            return Components(site.d_in, site.d_out, self.counts[name])
        self._check_tie(name, partner)
        components = self[partner]
        assert isinstance(components, Components)  # the partner is not tied itself
        return TiedComponents(components)

    def _check_tie(self, name: str, partner: str) -> None:
        """Raise BadInput if a site cannot be tied to its partner."""
        if partner not in self.sites:
            remedy = nearest(partner, self.sites)
            raise BadInput(f"tied: '{name}' is tied to '{partner}', which is not a site; {remedy}")
        if partner in self.tied:
            raise BadInput(
                f"tied: '{name}' is tied to '{partner}', which is tied itself; tie to a site that "
                "is not"
            )
        site = self.sites[name]
        other = self.sites[partner]
        same_count = self.counts[name] == self.counts[partner]
        transposed = (site.d_in, site.d_out) == (other.d_out, other.d_in)
        if not (same_count and transposed and torch.equal(site.weight, other.weight.T)):
            raise BadInput(
                f"tied: the weight of '{name}' is not the transpose of '{partner}'s; remove the tie"
            )

    def __getitem__(self, site: str) -> Components | TiedComponents:
        """Return the components of a site."""
        key = _key(site)
        components = self.components[key]
        assert isinstance(components, Components | TiedComponents)
        return components

    def train(self, mode: bool = True) -> "ComponentModel":
        """Switch between training and evaluation; the target stays in eval mode (D6)."""
        super().train(mode)
        self.target.eval()
        return self

    def delta_weight(self, site: str) -> Float[Tensor, "d_out d_in"]:
        """Return Δ = W − (V U)ᵀ of a site (D1)."""
        components = self[site]
        product = matmul(components.V, components.U)  # [d_in, d_out]
        weight = self.sites[site].weight
        return weight - product.T

    # ---- runs ------------------------------------------------------------------------------------

    def _modules_without_sites(self) -> list[nn.Module]:
        """Return the outermost modules without sites, whose clean outputs can be replayed."""
        site_modules = {site.module for site in self.sites.values()}
        plain = dict[nn.Module, None]()  # an ordered set
        for module in self.target.modules():
            if module in site_modules:
                continue
            if not _contains(module, site_modules):
                continue
            for child in module.children():
                if not _contains(child, site_modules):
                    plain[child] = None
        return list(plain)

    @contextmanager
    def replaced(
        self,
        replacement: Replacement,
        plain: Callable[[nn.Module, Map], Map] | None = None,
        modules: Iterable[nn.Module] | None = None,
    ) -> Iterator[None]:
        """Replace the output of sites by that of `replacement` inside a `with` block (D8 included).

        Some targets, such as OPT, flatten batch and positions before a map. Replacements see both
        dimensions in any case.

        Args:
            replacement: is called in place of the forward pass of every site.
            plain: returns a new forward pass for a module; None to leave modules as they are.
            modules: the modules that `plain` is applied to; the outermost modules without sites if
                omitted.
        """
        if modules is None:
            modules = self._plain
        patches = _Patches()
        try:
            forward = self._noting_places(self.target.forward)
            patches.apply(self.target, forward)
            if plain is not None:
                for module in modules:
                    forward = plain(module, module.forward)
                    patches.apply(module, forward)
            for site in self.sites.values():
                if site.kind != "identity":
                    forward = self._through(replacement, site, site.module.forward)
                    patches.apply(site.module, forward)
            for site in self.sites.values():  # identity sites wrap what is there by now
                if site.kind == "identity":
                    forward = self._before(replacement, site, site.module.forward)
                    patches.apply(site.module, forward)
            yield
        finally:
            patches.undo()

    def _noting_places(self, original: Map) -> Map:
        """Return a forward pass of the target that notes the shape [batch] or [batch, pos]."""

        def forward(inputs: Tensor) -> Tensor:
            places = inputs.shape
            if inputs.is_floating_point():  # vectors, not token ids
                places = inputs.shape[:-1]
            self._places = places
            return original(inputs)

        return forward

    def _through(self, replacement: Replacement, site: Site, original: Map) -> Map:
        """Return a forward pass of a site that calls the replacement."""

        def forward(x: Tensor) -> Tensor:
            folded = self.folded(x)
            out = replacement(site, folded, original)
            added = folded.ndim - x.ndim
            return flattened(out, added)

        return forward

    def _before(self, replacement: Replacement, site: Site, original: Map) -> Map:
        """Return a forward pass of a module that calls the replacement on its input (D8)."""
        identity = self._through(replacement, site, lambda x: x)

        def forward(x: Tensor) -> Tensor:
            replaced = identity(x)
            return original(replaced)

        return forward

    def folded(self, x: Tensor) -> Tensor:
        """Return x with batch and positions as two dimensions if the target has flattened them.

        Vectors [batch * pos, d] and token ids [batch * pos] are changed, and everything else is
        returned as it is. Valid inside `replaced`.
        """
        places = self._places
        if len(places) != 2:
            return x
        flat_dimensions = 2 if x.is_floating_point() else 1
        if x.ndim != flat_dimensions:
            return x
        if len(x) != places.numel():
            return x
        return x.unflatten(0, places)

    def clean(self, batch: Tensor) -> Clean:
        """Run the target as it is, and record the inputs and outputs of its sites (step 1).

        The inner activations of the result have a gradient to V.

        Raises:
            BadInput: the target uses a site twice, not at all, or only on some of the positions.
        """
        with torch.inference_mode(False), torch.no_grad():  # inference tensors have no `_version`
            if batch.is_inference():
                batch = batch.clone()
            run, intact = self._recorded(batch)
            if not intact and not self._in_place:
                # The recorded tensors have changed since, so the run is repeated with copies. All
                # later runs record copies from the start: their record is right at once.
                self._in_place = True
                run, _ = self._recorded(batch)
        unused = [name for name in self.sites if name not in run.inputs]
        if unused:
            raise BadInput(
                f"sites: the target does not use '{unused[0]}' on its inputs; leave it out"
            )
        self._reject_selections(run)

        def inner(name: str) -> Tensor:
            x = run.inputs[name]
            V = self[name].V
            return self.sites[name].inner(x, V)

        run.inner = Inner(inner, self.sites)
        return run

    def _recorded(self, batch: Tensor) -> tuple[Clean, bool]:
        """Return a clean run without inner activations, and whether its record is intact."""
        recorder = Recorder(batch, copies=self._in_place)
        with self.replaced(recorder.at_site, recorder.at_module):
            output = self.target(batch)
        run = recorder.finish(output)
        return run, recorder.intact()

    def _reject_selections(self, run: Clean) -> None:
        """Raise BadInput if a site reads only some positions of all prompts, as experts do."""
        places = self._places
        if len(places) != 2:
            return
        expected = (1, *places)
        for name, x in run.inputs.items():
            dimensions = x.ndim
            if self.sites[name].kind != "embedding":
                dimensions -= 1  # the last one is d_in
            if dimensions == 1 and len(x) not in expected:
                raise BadInput(
                    f"sites: '{name}' reads {len(x)} vectors of a batch with "
                    f"{places.numel()} positions: a selection, like an expert of a mixture, "
                    "but importances need every position; leave it out"
                )

    def importances(self, clean: Clean, generator: torch.Generator | None = None) -> Importances:
        """Return the causal importances of every site on a clean run (step 2).

        The generator is used for binomial sampling only (G5).
        """
        z = self.importance_function(clean.inputs, clean.inner)
        return self.importance(z, generator)

    def masked(
        self,
        batch: Tensor,
        masks: Mapping[str, Mask],
        clean: Clean | None = None,
        detach: bool = False,
        seen: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the output of the target with masked sites (step 3).

        Args:
            batch: the inputs.
            masks: the masks by site; a site without a mask runs as in the target.
            clean: the clean run of this batch. Its record is replayed up to the first masked site.
            detach: whether V and U are constants, for adversaries, which need a gradient to the
                masks only.
            seen: if given, receives the input of every site in this run.
        """
        replay = Replay(None if self._in_place else clean)

        def at_site(site: Site, x: Tensor, original: Map) -> Tensor:
            if self._in_place:
                x = x.clone()
            if seen is not None:
                seen[site.name] = x
            clean_output = replay.lookup(site, x)
            mask = masks.get(site.name)
            if mask is None:
                if clean_output is None:
                    return original(x)
                return clean_output
            replay.leave()
            if clean is not None and clean_output is not None:
                return self._masked_on_clean(site, mask, clean, detach)
            V, U = self._matrices(site.name, clean, detach)
            return _masked(site, x, original, V, U, mask)

        at_module = replay.at_module if clean else None
        with self.replaced(at_site, at_module):
            return self.target(batch)

    def _matrices(self, name: str, clean: Clean | None, detach: bool) -> tuple[Tensor, Tensor]:
        """Return V and U of a site, cast to the precision of autocast once per batch."""
        components = self[name]
        V = components.V
        U = components.U
        device = V.device.type
        if clean is not None and torch.is_grad_enabled() and torch.is_autocast_enabled(device):
            if name not in clean.matrices:
                dtype = torch.get_autocast_dtype(device)
                clean.matrices[name] = (V.to(dtype), U.to(dtype))
            V, U = clean.matrices[name]
        if detach:
            return V.detach(), U.detach()
        return V, U

    def _masked_on_clean(self, site: Site, mask: Mask, clean: Clean, detach: bool) -> Tensor:
        """Return the masked output of a site on its clean input.

        It is computed once for all passes that share the mask.
        """
        name = site.name
        if name in clean.masked and not detach:
            known_mask, known_output = clean.masked[name]
            if known_mask is mask:
                return known_output
        V, U = self._matrices(name, clean, detach)
        a = self._inner_on_clean(site, mask.rows, clean, V, detach)
        target_output = clean.outputs[name]
        out = masked_output(target_output, site.bias, a, U, mask)
        if not detach:
            clean.masked[name] = (mask, out)
        return out

    def _inner_on_clean(
        self, site: Site, rows: Tensor | None, clean: Clean, V: Tensor, detach: bool
    ) -> Tensor:
        """Return a = x V on the clean input, [rows, C] or [..., C]; known values are used again."""
        name = site.name
        if rows is not None and not clean.inner.known(name):
            x = clean.inputs[name]
            selected = _rows(site, x, rows)  # [rows, d_in]
            return site.inner(selected, V)
        a = clean.inner[name]  # [..., C]
        if detach:
            a = a.detach()
        if rows is None:
            return a
        flat = a.flatten(0, -2)  # [positions, C]
        return flat.index_select(0, rows)


class _Patches:
    """Forward passes set on modules, and what to restore."""

    def __init__(self):
        self._before = list[tuple[nn.Module, Map | None]]()

    def apply(self, module: nn.Module, forward: Map) -> None:
        """Set the forward pass of a module."""
        previous = module.__dict__.get("forward")
        self._before.append((module, previous))
        module.forward = forward

    def undo(self) -> None:
        """Restore every module, the last patch first."""
        for module, forward in reversed(self._before):
            if forward is None:
                del module.forward  # the method of its class
            else:
                module.forward = forward


def _contains(module: nn.Module, sites: set[nn.Module]) -> bool:
    """Return whether a module is a site or contains one."""
    return any(inside in sites for inside in module.modules())


def _masked(
    site: Site, x: Tensor, original: Map, V: Tensor, U: Tensor, mask: Mask
) -> Float[Tensor, "... d_out"]:
    """Return the masked output of a site on an input that differs from the clean one."""
    selected = x
    if mask.rows is not None:
        selected = _rows(site, x, mask.rows)
    a = site.inner(selected, V)  # [..., C] or [rows, C]
    target_output = None
    if not mask.bare:
        target_output = original(x)  # [..., d_out]
    return masked_output(target_output, site.bias, a, U, mask)


def flattened(x: Tensor, dimensions: int) -> Tensor:
    """Undo `ComponentModel.folded`, given the number of dimensions that it added."""
    if dimensions == 0:
        return x
    return x.flatten(0, dimensions)


def _rows(site: Site, x: Tensor, rows: Tensor) -> Tensor:
    """Return some positions of a site's input: token ids at embeddings, vectors elsewhere."""
    if site.kind == "embedding":
        flat = x.flatten()  # [positions]
    else:
        flat = x.flatten(0, -2)  # [positions, d_in]
    return flat.index_select(0, rows)


def _key(site: str) -> str:
    """Return the name of a site without dots, which a ModuleDict does not allow in keys."""
    return site.replace(".", "/")
