"""Reconstruction losses: the masked model should give the outputs of the target (L5, L6).

    loss = mean over draws and passes of D(masked output, target output)

A reconstruction loss is a source × a route × a divergence D: how the masks are made, where they
act, and how outputs are compared. For each draw:

1. Draw the route: the forward passes, and the sites and positions that each of them decomposes.
2. Make the sources. Constant and stochastic sources are functions of the importances. An adversary
   climbs the divergence against the drawn route.
3. Build the masks, `m = g + (1 − g) · s`.
4. Run the masked model once for each pass, and compare its output with the target's. If `hidden` is
   set, compare the inputs of some sites too (L6).

With the source `mixed`, a random share of the samples belongs to the persistent adversary and is
decomposed everywhere. The other samples have stochastic sources and follow the route. Both are
computed in one forward pass.

Sources: SPD (Bushnaq et al., 2025, arXiv 2506.20790); VPD (Bushnaq et al., 2026) for adversaries.
All losses of a training step share one `LossContext`, so that the clean run, the importances and
the stochastic masks are computed once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spd_lightning.decomposition.adversaries import (
    Adversary,
    Persistent,
    PersistentAdversary,
    pgd_sources,
    split,
)
from spd_lightning.decomposition.components import Mask
from spd_lightning.decomposition.divergences import DIVERGENCES
from spd_lightning.decomposition.importance import Importances
from spd_lightning.decomposition.masks import (
    RouteKind,
    Routes,
    Rows,
    SourceKind,
    Sources,
    choose_sources,
    decomposed_rows,
    draw_routes,
    fixed_masks,
    gathered,
    masks_from_sources,
    stochastic_sources,
    uniform,
    widened,
)
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.decomposition.replay import Clean
from spd_lightning.errors import BadInput, check_range, nearest


class RoutedImportances(NamedTuple):
    """The importances at the positions that a route decomposes.

    Attributes:
        rows: flat indices of the positions at each site; empty if they are all positions.
        g: importances of each site, [rows, C] there, or [..., C] at all positions.
    """

    rows: Rows
    g: dict[str, Tensor]


Terms = tuple[Float[Tensor, ""], Float[Tensor, ""] | None]
"""The divergence, and the hidden reconstruction error (L6) or None."""


@dataclass(frozen=True)
class Reconstruction:
    """A reconstruction loss (L5): a source × a route × a divergence.

    Args:
        source: how far unimportant components are switched off; `mixed` is persistent_pgd, routed
            everywhere, for some samples of a batch and stochastic for the others.
        route: which sites and positions are decomposed in a pass.
        divergence: how outputs are compared.
        coeff: weight in the total loss; 0 switches it off.
        samples: number of draws to average over.
        adversary: settings of the `pgd` source.
        persistent: settings of the `persistent_pgd` and `mixed` sources.
        share: expected share of the samples that belong to the persistent adversary with `mixed`.
        probability: P(site and position decomposed) of the `static` route.
        threshold: τ of the `rounded` source.
        hidden: fnmatch patterns of sites whose inputs are compared too (L6).
        hidden_coeff: weight of that comparison in the total loss.
    """

    source: SourceKind = "stochastic"
    route: RouteKind = "all"
    divergence: Literal["mse", "kl"] = "mse"
    coeff: float = 1.0
    samples: int = 1
    adversary: Adversary = field(default_factory=Adversary)
    persistent: Persistent = field(default_factory=Persistent)
    share: float = 0.5
    probability: float = 0.5
    threshold: float = 0.1
    hidden: tuple[str, ...] = ()
    hidden_coeff: float = 1.0

    def __post_init__(self):
        check_range("reconstruction", least=0, coeff=self.coeff, hidden_coeff=self.hidden_coeff)
        check_range("reconstruction", least=1, whole=True, samples=self.samples)
        check_range("reconstruction", least=0, most=1, share=self.share, threshold=self.threshold)
        check_range("reconstruction", above=0, most=1, probability=self.probability)
        if self.source == "persistent_pgd" and self.route != "all":
            raise BadInput(
                f"route '{self.route}' of a persistent_pgd reconstruction: the adversary acts "
                "everywhere; take 'all'"
            )
        if self.source == "mixed" and self.route == "layerwise":
            raise BadInput(
                "route 'layerwise' of a mixed reconstruction: it has many passes; take 'subset' or "
                "'static'"
            )

    @property
    def counts(self) -> bool:
        """Whether the loss adds anything to the total; if not, its passes are skipped."""
        if self.coeff:
            return True
        if self.hidden:
            return bool(self.hidden_coeff)
        return False

    def __call__(self, run: "LossContext", name: str = "") -> Float[Tensor, ""]:
        """Return the mean divergence over draws and over the passes of the route."""
        divergence, _ = self.terms(run, name)
        return divergence

    def terms(self, run: "LossContext", name: str = "") -> Terms:
        """Return the mean divergence, and the hidden error (L6) of the same passes or None.

        Args:
            run: the batch and what the losses share.
            name: the name of this loss; `run.adversaries` has its persistent adversary under it.
        """
        draws = []
        for n in range(self.samples):
            terms = self._draw(run, name, n)
            draws.append(terms)
        return _mean_terms(draws)

    def _draw(self, run: "LossContext", name: str, n: int) -> Terms:
        """Return the terms of the n-th draw."""
        lower = run.importances.lower
        passes = draw_routes(self.route, lower, run.generator, self.probability)
        routes = list(passes)  # step 1
        if self.source == "mixed":
            adversarial = self._adversarial_samples(run)
            return self._mixed_terms(run, name, routes[0], adversarial)
        at_route = routed_importances(lower, routes[0])
        masks = self._masks(run, name, n, routes, at_route)
        return self._compare(run, masks, routes, at_route.rows)

    def _adversarial_samples(self, run: "LossContext") -> Bool[Tensor, " batch"]:
        """Draw the samples that belong to the persistent adversary."""
        importances = iter(run.importances.lower.values())
        like = next(importances)
        numbers = uniform(like, like.shape[:1], run.generator)  # [batch]
        return numbers < self.share

    def _masks(
        self,
        run: "LossContext",
        name: str,
        n: int,
        routes: list[Routes],
        at_route: RoutedImportances,
    ) -> dict[str, Mask]:
        """Return the masks of the n-th draw (steps 2 and 3)."""
        g = at_route.g
        delta = run.model.delta
        if self.source == "pgd":
            self.adversary.check_start(delta, f"reconstruction '{name}'")
            objective = self._adversary_objective(run, routes, at_route)
            sources = pgd_sources(self.adversary, g, objective, run.generator)
            return masks_from_sources(g, sources, delta)
        if self.source == "persistent_pgd":
            adversary = run.adversaries[name]
            self._ascend(run, adversary, routes[0])
            sources = self._persistent_sources(run, adversary, at_route)
            return masks_from_sources(g, sources, delta)
        if at_route.rows:
            return run.fresh(self.source, g, self.threshold)
        return run.masks(self.source, n, self.threshold)

    def _mixed_terms(
        self, run: "LossContext", name: str, route: Routes, adversarial: Bool[Tensor, " batch"]
    ) -> Terms:
        """Return the terms of one pass whose samples are partly adversarial, partly stochastic.

        `adversarial` is True for the samples that belong to the persistent adversary. They are
        decomposed everywhere; the other samples follow `route`.
        """
        lower = run.importances.lower
        attacked: Routes = {}  # site → [batch, ...]: the positions of the adversarial samples
        attacked_columns = {}  # site → [batch, ..., 1]
        for site, g in lower.items():
            positions = g.shape[:-1]
            ones = [1] * (len(positions) - 1)
            where = adversarial.view(-1, *ones).expand(positions)
            attacked[site] = where
            attacked_columns[site] = where.unsqueeze(-1)
        union = widened(route, adversarial)  # all positions that this pass decomposes
        at_union = routed_importances(lower, union)

        # step 2: both kinds of sources, at the positions of the union
        random = stochastic_sources(at_union.g, run.generator, run.binomial)
        adversary = run.adversaries[name]
        self._ascend(run, adversary, attacked)
        persistent = self._persistent_sources(run, adversary, at_union)

        chosen = gathered(attacked_columns, at_union.rows)  # site → [rows, 1]
        sources = choose_sources(chosen, persistent, random)
        masks = masks_from_sources(at_union.g, sources, run.model.delta)  # step 3
        return self._compare(run, masks, [union], at_union.rows)

    def _ascend(self, run: "LossContext", adversary: PersistentAdversary, route: Routes) -> None:
        """Let a persistent adversary climb against a route (step 2)."""
        lower = run.importances.lower
        at_route = routed_importances(lower, route)
        objective = self._adversary_objective(run, [route], at_route)

        def damage(vectors: Mapping[str, Tensor]) -> Tensor:
            sources = _sources_of(adversary, vectors, run, at_route)
            return objective(sources)

        adversary.ascend(damage, run.progress)

    def _persistent_sources(
        self, run: "LossContext", adversary: PersistentAdversary, at_route: RoutedImportances
    ) -> Sources:
        """Return the sources of a persistent adversary at some positions.

        The backward pass of the training loss leaves its gradient in them, for one more climb
        (`PersistentAdversary.finish`).
        """
        coeff = self.coeff / self.samples  # weight of one draw in the total
        vectors = adversary.leaves(coeff)
        return _sources_of(adversary, vectors, run, at_route)

    def _adversary_objective(
        self, run: "LossContext", routes: list[Routes], at_route: RoutedImportances
    ) -> Callable[[Sources], Tensor]:
        """Return the divergence as a function of the sources alone.

        Routes, importances and components are constants in it.
        """
        delta = run.model.delta
        rows = at_route.rows
        constant_g = {}
        for name, g in at_route.g.items():
            constant_g[name] = g.detach()

        def objective(sources: Sources) -> Tensor:
            masks = masks_from_sources(constant_g, sources, delta)
            divergence, _ = self._compare(run, masks, routes, rows, detach=True)
            return divergence

        return objective

    def _compare(
        self,
        run: "LossContext",
        masks: Mapping[str, Mask],
        routes: list[Routes],
        rows: Rows,
        detach: bool = False,
    ) -> Terms:
        """Run the passes of a draw, and return their terms (step 4).

        The masks have values for `rows` only. If `detach`, gradients are computed for them alone.
        """
        compare = DIVERGENCES[self.divergence]
        target = run.clean.output
        passes = []
        for route in routes:
            pass_masks = routed(masks, route, rows)
            seen = None
            if self.hidden and not detach:
                seen = dict[str, Tensor]()
            output = run.model.masked(run.batch, pass_masks, run.clean, detach, seen=seen)
            divergence = compare(output, target, run.weights)
            hidden = None
            if seen is not None:
                hidden = hidden_error(run.clean.inputs, seen, self.hidden)
            passes.append((divergence, hidden))
        return _mean_terms(passes)


def routed_importances(lower: Mapping[str, Tensor], route: Routes) -> RoutedImportances:
    """Return the importances at the positions that a route decomposes."""
    rows = decomposed_rows(route)
    g = gathered(lower, rows)
    return RoutedImportances(rows, g)


def _sources_of(
    adversary: PersistentAdversary,
    vectors: Mapping[str, Tensor],
    run: "LossContext",
    at_route: RoutedImportances,
) -> Sources:
    """Return the sources that vectors of a persistent adversary give at some positions."""
    everywhere = adversary.spread(vectors, run.importances.lower)  # [batch, ..., C + 1]
    at_rows = gathered(everywhere, at_route.rows)  # [rows, C + 1]
    return split(at_rows, at_route.g)


def _mean_terms(runs: Sequence[Terms]) -> Terms:
    """Return the mean divergence and the mean hidden error; None if there are no hidden errors."""
    divergences = []
    hidden_errors = []
    for divergence, hidden in runs:
        divergences.append(divergence)
        if hidden is not None:
            hidden_errors.append(hidden)
    mean_divergence = torch.stack(divergences).mean()
    if not hidden_errors:
        return mean_divergence, None
    mean_error = torch.stack(hidden_errors).mean()
    return mean_divergence, mean_error


def hidden_error(
    inputs: Mapping[str, Tensor], seen: Mapping[str, Tensor], patterns: Sequence[str]
) -> Tensor:
    """Return the relative squared error of site inputs, averaged over sites (L6).

    Args:
        inputs: x [..., d_in] of every site in the clean run.
        seen: x of every site in the masked run.
        patterns: fnmatch patterns of the sites to compare.

    Raises:
        BadInput: the patterns match no site whose inputs are vectors.
    """
    vectors = [name for name, x in inputs.items() if x.is_floating_point()]
    names = [name for name in vectors if _matches(name, patterns)]
    if not names:
        raise BadInput(f"hidden: {list(patterns)} match no site; {nearest(patterns[0], vectors)}")
    errors = []
    for name in names:
        x = inputs[name]
        change = seen[name] - x
        square = change.square().sum()
        size = x.square().sum()
        size = size.clamp(min=1e-30)
        errors.append(square / size)
    by_site = torch.stack(errors)  # [sites]
    return by_site.mean()


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether one of the patterns matches a name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def routed(masks: Mapping[str, Mask], route: Routes, rows: Rows | None = None) -> dict[str, Mask]:
    """Return the masks of one pass: those of its sites, with the route at each site.

    Args:
        masks: the masks of every site.
        route: the sites and positions that the pass decomposes.
        rows: the positions that the masks have values for; empty or None for all positions.
    """
    rows = rows or {}
    pass_masks = {}
    for name, where in route.items():
        mask = masks[name]
        if where is not None:
            mask = mask._replace(route=where, rows=rows.get(name))
        pass_masks[name] = mask
    return pass_masks


# ---- what losses share ---------------------------------------------------------------------------


@dataclass
class LossContext:
    """One batch, and everything that the losses share.

    Attributes:
        model: the decomposed model.
        batch: the inputs.
        clean: the clean run of the batch.
        importances: the causal importances on the clean run.
        generator: draws masks and routes.
        weights: number of equal rows that each row represents [batch]; one each if None.
        drawn: the stochastic and constant masks made so far.
        adversaries: the persistent adversaries, by the name of their reconstruction loss.
        progress: fraction of training.
        frequencies: for each component, the mean of `(ĝ + ε)^p` over the whole batch, if `batch` is
            a part of it; else None.
    """

    model: ComponentModel
    batch: Tensor
    clean: Clean
    importances: Importances
    generator: torch.Generator | None
    weights: Float[Tensor, " batch"] | None = None
    drawn: dict[tuple[str, int, float], dict[str, Mask]] = field(default_factory=dict)
    adversaries: Mapping[str, PersistentAdversary] = field(default_factory=dict)
    progress: float = 0.0
    frequencies: Tensor | None = None

    @classmethod
    def from_batch(
        cls,
        model: ComponentModel,
        batch: Tensor,
        generator: torch.Generator | None = None,
        weights: Float[Tensor, " batch"] | None = None,
        sample: bool = False,
    ) -> "LossContext":
        """Run the target and the importance function on a batch.

        `sample` allows binomial importances (G5), as in training.
        """
        clean = model.clean(batch)
        sampler = generator if sample else None
        importances = model.importances(clean, sampler)
        return cls(model, batch, clean, importances, generator, weights)

    def masks(self, source: SourceKind, n: int, threshold: float) -> dict[str, Mask]:
        """Return the n-th draw of a source, which all losses share."""
        if source != "rounded":
            threshold = 0.0  # the other sources do not use it
        key = (source, n, threshold)
        if key not in self.drawn:
            lower = self.importances.lower
            self.drawn[key] = self.fresh(source, lower, threshold)
        return self.drawn[key]

    def fresh(
        self, source: SourceKind, importances: Mapping[str, Tensor], threshold: float
    ) -> dict[str, Mask]:
        """Draw masks of a constant or stochastic source for the given importances."""
        generator = self.generator
        if source != "stochastic":
            return fixed_masks(source, importances, generator, threshold)
        sources = stochastic_sources(importances, generator, self.binomial)
        return masks_from_sources(importances, sources, self.model.delta)

    @property
    def binomial(self) -> bool:
        """Whether component sources are drawn from {0, 1} (G5)."""
        importance = self.model.importance
        return importance.sampling == "binomial"
