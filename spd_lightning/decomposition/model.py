"""The target run under masks: activations and importances out.

1. A *clean* run of the frozen target gives its output and the input x of every site; a = x V
   follows (D2).
2. The importance function reads them and says which components are needed (G1).
3. A *masked* run replaces the output of chosen sites by their masked components (D3, D4).

A masked run repeats nothing the clean run of the same batch already knows: up to the first site
that it changes, every map answers from the clean run's record. (A target that changes tensors in
place is always run in full: its record would not be what its own code sees.) What does not belong
here: losses, schedules, where masks come from.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spd_lightning.decomposition.components import (
    Components,
    Mask,
    Site,
    TiedComponents,
    find_sites,
    masked_output,
)
from spd_lightning.decomposition.importance import Importance, Importances
from spd_lightning.decomposition.importance_functions import importance_function
from spd_lightning.decomposition.matmul import matmul
from spd_lightning.errors import BadInput, nearest

Map = Callable[[Tensor], Tensor]
Replacement = Callable[[Site, Tensor, Map], Tensor]
"""Given a site, its input and its own map: the output to go on with."""


class Inner(Mapping[str, Tensor]):
    """Inner activations a = x V of every site (D2), each computed when it is first asked for.

    Not every importance function reads them, and a masked run has use for few.
    """

    def __init__(self, compute: Callable[[str], Tensor], names: Iterable[str]):
        self._compute = compute
        self._names = list(names)
        self._known = dict[str, Tensor]()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._known:
            self._known[name] = self._compute(name)
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def known(self, name: str) -> bool:
        """Whether it has been computed."""
        return name in self._known


@dataclass
class Clean:
    """One clean run of the target: its output, and per site the input x, the output x Wᵀ + b, and a
    = x V.
    """

    output: Tensor
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    inner: Inner = field(init=False)
    record: dict[nn.Module, Tensor] = field(default_factory=dict)
    """Outputs of the parts of the target that hold no site."""
    masked: dict[str, tuple[Mask, Tensor]] = field(default_factory=dict)
    """Masked outputs on clean inputs already computed for this batch, to be shared by passes with
    the same mask.
    """
    matrices: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """V and U in autocast's precision, of sites that have been masked: cast once a batch, not at
    every use.
    """


class ComponentModel(nn.Module):
    """A frozen target with the components of its sites and their importance function.

    Args:
        target: the network to take apart; it is put in eval mode and its parameters are frozen
            (D6).
        sites: fnmatch patterns of module names, each with a number of components.
        tied: site → partner, where the site's weight is the transpose of its partner's (D9).
        importance: how causal importances are computed.
        delta: whether the delta component takes part in masked runs.

    Raises:
        BadInput: a pattern matches nothing or overlaps another; a tie of no site, or one that does
            not hold.
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
        found = find_sites(target, sites)
        self.sites = {name: site for name, (site, _) in found.items()}
        self.counts = {name: C for name, (_, C) in found.items()}
        self.tied = dict(tied or {})
        if unknown := set(self.tied) - set(self.sites):
            name = min(unknown)
            raise BadInput(f"tied: '{name}' is not a site; {nearest(name, self.sites)}")
        self.components = nn.ModuleDict()  # its keys cannot hold dots
        for name in sorted(self.sites, key=lambda n: n in self.tied):
            self.components[name.replace(".", "/")] = self._components(name)
        self.importance = importance or Importance()
        self.importance_function = importance_function(self.importance, found)
        self.delta = delta
        self._plain = self._modules_without_sites()
        self._in_place = False  # until a clean run shows that the target changes tensors in place
        self._places = torch.Size()  # of the run in progress: [batch] or [batch, pos]

    def _components(self, name: str) -> nn.Module:
        site = self.sites[name]
        partner = self.tied.get(name)
        if partner is None:
            return Components(site.d_in, site.d_out, self.counts[name])
        if partner not in self.sites:
            remedy = nearest(partner, self.sites)
            raise BadInput(f"tied: '{name}' is tied to '{partner}', which is not a site; {remedy}")
        if partner in self.tied:
            raise BadInput(
                f"tied: '{name}' is tied to '{partner}', which is tied itself; tie to a site that "
                "is not"
            )
        other = self.sites[partner]
        same = self.counts[name] == self.counts[partner] and (site.d_in, site.d_out) == (
            other.d_out,
            other.d_in,
        )
        if not same or not torch.equal(site.weight, other.weight.T):
            raise BadInput(
                f"tied: the weight of '{name}' is not the transpose of '{partner}'s; remove the tie"
            )
        return TiedComponents(self[partner])  # pyright: ignore[reportArgumentType]

    def __getitem__(self, site: str) -> Components | TiedComponents:
        """The components of a site, by its name."""
        return self.components[site.replace(".", "/")]  # pyright: ignore[reportReturnType]

    def train(self, mode: bool = True) -> "ComponentModel":
        """The target stays in eval mode whatever the rest does (D6)."""
        super().train(mode)
        self.target.eval()
        return self

    def delta_weight(self, site: str) -> Float[Tensor, "d_out d_in"]:
        """Δ = W − (V U)ᵀ of a site (D1)."""
        return self.sites[site].weight - matmul(self[site].V, self[site].U).T

    # ---- runs ------------------------------------------------------------------------------------

    def _modules_without_sites(self) -> list[nn.Module]:
        """The outermost modules with no site inside: the parts of the target whose clean output can
        be replayed.
        """
        sites = {site.module for site in self.sites.values()}
        inside = {m: any(s in sites for s in m.modules()) for m in self.target.modules()}
        holders = [m for m, holds in inside.items() if holds and m not in sites]
        return list(dict.fromkeys(c for m in holders for c in m.children() if not inside[c]))

    @contextmanager
    def replaced(
        self,
        replacement: Replacement,
        plain: Callable[[nn.Module, Map], Map] | None = None,
        modules: Iterable[nn.Module] | None = None,
    ) -> Iterator[None]:
        """While open, sites of the target give what `replacement` makes of them (D8 included).

        Some targets flatten batch and positions before a map, as OPT does. Replacements see both
        dimensions all the same.

        plain: what to put in place of the forward of other modules: of the outermost without sites,
        or of `modules`.
        """
        before: list[tuple[nn.Module, Map | None]] = []

        def patch(module: nn.Module, forward: Map) -> None:
            before.append((module, module.__dict__.get("forward")))
            module.forward = forward

        def noting(own: Map) -> Map:
            def forward(inputs: Tensor) -> Tensor:
                self._places = inputs.shape[:-1] if inputs.is_floating_point() else inputs.shape
                return own(inputs)

            return forward

        try:
            patch(self.target, noting(self.target.forward))
            if plain is not None:
                for module in self._plain if modules is None else modules:
                    patch(module, plain(module, module.forward))
            for site in self.sites.values():
                if site.kind != "identity":
                    patch(site.module, self._through(replacement, site, site.module.forward))
            for site in self.sites.values():
                if site.kind == "identity":
                    patch(site.module, self._before(replacement, site, site.module.forward))
            yield
        finally:
            for module, forward in reversed(before):
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward

    def _through(self, replacement: Replacement, site: Site, own: Map) -> Map:
        def forward(x: Tensor) -> Tensor:
            folded = self.folded(x)
            return flattened(replacement(site, folded, own), folded.ndim - x.ndim)

        return forward

    def _before(self, replacement: Replacement, site: Site, own: Map) -> Map:
        return lambda x: own(self._through(replacement, site, lambda y: y)(x))

    def folded(self, x: Tensor) -> Tensor:
        """Vectors [batch·pos, d], or token ids [batch·pos], with batch and positions apart; all
        else as it is.

        Of the run in progress, inside `replaced`.
        """
        flat = x.ndim == (2 if x.is_floating_point() else 1)
        if not flat or len(self._places) != 2 or len(x) != self._places.numel():
            return x
        return x.unflatten(0, self._places)

    def clean(self, batch: Tensor) -> Clean:
        """Runs the target as it is, recording site inputs, and computes inner activations with
        gradient to V.

        Raises:
            BadInput: the target uses a site twice, or not at all, or on some of the positions
                alone.
        """
        with (
            torch.inference_mode(False),
            torch.no_grad(),
        ):  # inference tensors do not tell whether they were changed
            batch = batch.clone() if batch.is_inference() else batch
            run, intact = self._recorded(batch)
            if not intact:
                self._in_place = True
                run, _ = self._recorded(batch)
        if unused := [name for name in self.sites if name not in run.inputs]:
            raise BadInput(
                f"sites: the target does not use '{unused[0]}' on its inputs; leave it out"
            )
        self._refuse_selections(run)
        run.inner = Inner(
            lambda name: self.sites[name].inner(run.inputs[name], self[name].V), self.sites
        )
        return run

    def _refuse_selections(self, run: Clean) -> None:
        """Raise BadInput if a site reads some positions of all prompts in one row, as the experts
        of a mixture do.
        """
        if len(self._places) != 2:
            return
        for name, x in run.inputs.items():
            places = x.shape if self.sites[name].kind == "embedding" else x.shape[:-1]
            if len(places) == 1 and places[0] not in (1, *self._places):
                raise BadInput(
                    f"sites: '{name}' reads {places[0]} vectors of a batch with "
                    f"{self._places.numel()} positions: a "
                    "selection, as an expert of a mixture does, and importances belong to "
                    "positions; leave it out"
                )

    def _recorded(self, batch: Tensor) -> tuple[Clean, bool]:
        """A clean run without inner activations, and whether what it recorded is still what it
        was.
        """
        run = Clean(batch)
        twice = set[nn.Module]()
        watched = list[tuple[Tensor, int]]()

        def kept(tensor: Tensor) -> Tensor:
            watched.append((tensor, tensor._version))
            return tensor.clone() if self._in_place else tensor

        def at_site(site: Site, x: Tensor, own: Map) -> Tensor:
            if site.name in run.inputs:
                raise BadInput(
                    f"sites: the target uses '{site.name}' twice in one run; leave it out"
                )
            run.inputs[site.name] = kept(x)
            out = own(x)
            run.outputs[site.name] = kept(out)
            return out

        def at_module(module: nn.Module, own: Map) -> Map:
            def forward(*args, **kwargs):
                watched.extend(
                    (t, t._version) for t in (*args, *kwargs.values()) if isinstance(t, Tensor)
                )
                out = own(*args, **kwargs)
                if module in run.record:
                    twice.add(module)
                elif isinstance(out, Tensor):
                    run.record[module] = kept(out)
                return out

            return forward

        with self.replaced(at_site, at_module):
            run.output = self.target(batch)
        run.record = {m: out for m, out in run.record.items() if m not in twice}
        return run, all(tensor._version == version for tensor, version in watched)

    def importances(self, clean: Clean, generator: torch.Generator | None = None) -> Importances:
        """Causal importances of every site on a clean run (G1); the generator is for binomial
        sampling only (G5).
        """
        return self.importance(self.importance_function(clean.inputs, clean.inner), generator)

    def masked(
        self,
        batch: Tensor,
        masks: Mapping[str, Mask],
        clean: Clean | None = None,
        detach: bool = False,
        seen: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The target's output with the masked sites in place; sites without a mask run as they are.

        clean: the clean run of this very batch, whose record is replayed up to the first masked
        site. detach: keep V, U out of the graph, for ascents that need a gradient to the masks
        alone. seen: where given, receives the input of every site in this run.
        """
        changed = clean is None or self._in_place

        def at_site(site: Site, x: Tensor, own: Map) -> Tensor:
            nonlocal changed
            mask = masks.get(site.name)
            x = x.clone() if self._in_place else x
            if seen is not None:
                seen[site.name] = x
            known = not changed or (
                clean is not None and x is clean.inputs[site.name]
            )  # nothing has moved it
            changed = changed or mask is not None
            if clean is not None and known:
                return (
                    clean.outputs[site.name]
                    if mask is None
                    else self._on_clean(site, mask, clean, detach)
                )
            if mask is None:
                return own(x)
            V, U = self._matrices(site.name, clean, detach)
            a = site.inner(x if mask.rows is None else _rows(site, x, mask.rows), V)
            return masked_output(None if mask.bare else own(x), site.bias, a, U, mask)

        def at_module(module: nn.Module, own: Map) -> Map:
            def forward(*args, **kwargs):
                known = clean.record.get(module) if clean and not changed else None
                return own(*args, **kwargs) if known is None else known

            return forward

        with self.replaced(at_site, at_module if clean else None):
            return self.target(batch)

    def _matrices(self, name: str, clean: Clean | None, detach: bool) -> tuple[Tensor, Tensor]:
        V = self[name].V
        U = self[name].U
        kind = V.device.type
        if clean is not None and torch.is_grad_enabled() and torch.is_autocast_enabled(kind):
            if name not in clean.matrices:
                dtype = torch.get_autocast_dtype(kind)
                clean.matrices[name] = (V.to(dtype), U.to(dtype))
            V, U = clean.matrices[name]
        return (V.detach(), U.detach()) if detach else (V, U)

    def _on_clean(self, site: Site, mask: Mask, clean: Clean, detach: bool) -> Tensor:
        """A site's masked output on its clean input, computed once for all passes that share the
        mask.
        """
        before = clean.masked.get(site.name)
        if before is not None and before[0] is mask and not detach:
            return before[1]
        V, U = self._matrices(site.name, clean, detach)
        a = self._inner_on_clean(site, mask.rows, clean, V, detach)
        out = masked_output(clean.outputs[site.name], site.bias, a, U, mask)
        if not detach:
            clean.masked[site.name] = (mask, out)
        return out

    def _inner_on_clean(
        self, site: Site, rows: Tensor | None, clean: Clean, V: Tensor, detach: bool
    ) -> Tensor:
        """a = x V on the clean input, of some rows or of all; what is known already is not computed
        again.
        """
        if rows is not None and not clean.inner.known(site.name):
            return site.inner(_rows(site, clean.inputs[site.name], rows), V)
        a = clean.inner[site.name].detach() if detach else clean.inner[site.name]
        return a if rows is None else a.flatten(0, -2).index_select(0, rows)


def flattened(x: Tensor, dimensions: int) -> Tensor:
    """Undo `ComponentModel.folded`, given the number of dimensions that it added."""
    return x.flatten(0, dimensions) if dimensions else x


def _rows(site: Site, x: Tensor, rows: Tensor) -> Tensor:
    """Some positions of a site's input, which holds token ids for embeddings and vectors for all
    else.
    """
    return (x.flatten() if site.kind == "embedding" else x.flatten(0, -2)).index_select(0, rows)
