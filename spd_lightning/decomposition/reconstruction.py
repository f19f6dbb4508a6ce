"""Reconstruction: the masked model should do what the target does (L5 of docs/method.md).

A reconstruction is a source × a route × a divergence: how the masks are made, where they act, what
is compared. All of them read one `LossContext`: a batch, its clean run, its importances and the
random draws of this step. What two need alike is computed once: the clean run, the importances, and
the stochastic masks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import log_softmax

from spd_lightning.decomposition.adversaries import (
    Adversary,
    Persistent,
    PersistentAdversary,
    pgd_sources,
    split,
)
from spd_lightning.decomposition.components import Mask
from spd_lightning.decomposition.importance import Importances
from spd_lightning.decomposition.masks import (
    RouteKind,
    Routes,
    Rows,
    SourceKind,
    Sources,
    decomposed_rows,
    draw_routes,
    fixed_masks,
    gathered,
    masks_from_sources,
    stochastic_sources,
    uniform,
    widened,
)
from spd_lightning.decomposition.model import Clean, ComponentModel
from spd_lightning.errors import BadInput, check_range, nearest


def position_mean(
    values: Float[Tensor, "..."], weights: Float[Tensor, " batch"] | None
) -> Float[Tensor, "..."]:
    """Mean over the batch (the first axis); weights say how many equal rows each row stands for."""
    if weights is None:
        return values.mean(0)
    return torch.tensordot(weights, values, dims=1) / weights.sum()


# ---- divergences ---------------------------------------------------------------------------------


def mse_rows(
    output: Float[Tensor, " batch *rest"], target: Float[Tensor, " batch *rest"]
) -> Float[Tensor, " batch"]:
    """Mean squared difference over the entries of each row of a batch."""
    return (output - target).square().flatten(1).mean(1)


def kl_rows(
    output: Float[Tensor, " batch *rest"], target: Float[Tensor, " batch *rest"]
) -> Float[Tensor, " batch"]:
    """KL(softmax target ‖ softmax output), mean over the positions of each row, in float32 or
    better.
    """
    dtype = torch.promote_types(output.dtype, torch.float32)
    p = log_softmax(target.to(dtype), -1)
    q = log_softmax(output.to(dtype), -1)
    per_position = (p.exp() * (p - q)).sum(-1)
    return per_position.flatten(1).mean(1) if per_position.ndim > 1 else per_position


def mse(
    output: Float[Tensor, " batch *rest"],
    target: Float[Tensor, " batch *rest"],
    weights: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared difference over all output entries."""
    return position_mean(mse_rows(output, target), weights)


def kl(
    output: Float[Tensor, " batch *rest"],
    target: Float[Tensor, " batch *rest"],
    weights: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """KL(softmax target ‖ softmax output), mean over positions, in float32 or better."""
    return position_mean(kl_rows(output, target), weights)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {"mse": mse, "kl": kl}
ROW_DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": mse_rows, "kl": kl_rows}


@dataclass(frozen=True)
class Reconstruction:
    """The masked model should do what the target does (L5): a source × a route × a divergence.

    Args:
        source: how far what is not needed is switched off; `mixed` is stochastic for some samples
            of a batch and persistent_pgd, routed everywhere, for the others.
        route: which sites and positions are decomposed in a pass.
        divergence: how outputs are compared.
        coeff: weight in the total loss; 0 switches it off.
        samples: draws to average over.
        adversary: settings of the `pgd` source.
        persistent: settings of the `persistent_pgd` and `mixed` sources.
        share: of the samples that the persistent adversary gets under `mixed`.
        probability: P(site and position decomposed) of the `static` route.
        threshold: τ of the `rounded` source.
        hidden: fnmatch patterns of sites whose inputs should be the target's too (L6).
        hidden_coeff: weight of that in the total loss.
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
                f"route '{self.route}' of a persistent_pgd reconstruction: it acts everywhere; "
                "take 'all'"
            )
        if self.source == "mixed" and self.route == "layerwise":
            raise BadInput(
                "route 'layerwise' of a mixed reconstruction: it has many passes; take subset or "
                "static"
            )

    @property
    def counts(self) -> bool:
        """Whether it adds anything to the total loss; its passes are skipped if it does not."""
        return bool(self.coeff or (self.hidden and self.hidden_coeff))

    def __call__(self, run: "LossContext", name: str = "") -> Float[Tensor, ""]:
        """Mean divergence over draws and over the passes of the route."""
        return self.terms(run, name)[0]

    def terms(
        self, run: "LossContext", name: str = ""
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""] | None]:
        """Return the mean divergence, and the hidden reconstruction error (L6) of the same passes
        or None.

        name: under which the run holds the persistent adversary of this reconstruction.
        """
        compared = [self._draw(run, name, n) for n in range(self.samples)]
        hidden = [h for _, h in compared if h is not None]
        return torch.stack([d for d, _ in compared]).mean(), torch.stack(
            hidden
        ).mean() if hidden else None

    def _draw(self, run: "LossContext", name: str, n: int) -> tuple[Tensor, Tensor | None]:
        routes = list(
            draw_routes(self.route, run.importances.lower, run.generator, self.probability)
        )
        if self.source == "mixed":
            like = next(iter(run.importances.lower.values()))
            return self._mixed(
                run, name, routes[0], uniform(like, like.shape[:1], run.generator) < self.share
            )
        rows = decomposed_rows(routes[0])
        g = gathered(run.importances.lower, rows)
        match self.source:
            case "pgd":
                self.adversary.check_start(run.model.delta, f"reconstruction '{name}'")
                sources = pgd_sources(
                    self.adversary,
                    g,
                    self._adversary_objective(run, g, routes, rows),
                    run.generator,
                )
                masks = masks_from_sources(g, sources, run.model.delta)
            case "persistent_pgd":
                masks = masks_from_sources(
                    g, self._persistent_sources(run, name, routes[0], rows, g), run.model.delta
                )
            case _:
                masks = (
                    run.fresh(self.source, g, self.threshold)
                    if rows
                    else run.masks(self.source, n, self.threshold)
                )
        return self._compare(run, masks, routes, rows)

    def _mixed(
        self, run: "LossContext", name: str, route: Routes, theirs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """One pass in which the persistent adversary has some samples, everywhere, and chance the
        others.
        """
        shapes = {n: g.shape[:-1] for n, g in run.importances.lower.items()}
        whole = {
            n: theirs.view(-1, *[1] * (len(shape) - 1)).expand(shape) for n, shape in shapes.items()
        }
        everywhere = dict[str, Tensor | None](whole)
        both = widened(route, theirs)
        rows = decomposed_rows(both)
        g = gathered(run.importances.lower, rows)
        drawn = stochastic_sources(g, run.generator, run.binomial)
        persistent = self._persistent_sources(run, name, everywhere, rows, g)
        picked = gathered({n: where.unsqueeze(-1) for n, where in whole.items()}, rows)
        sources = {
            n: (
                torch.where(picked[n], persistent[n][0], s),
                torch.where(picked[n][..., 0], persistent[n][1], s_delta),
            )
            for n, (s, s_delta) in drawn.items()
        }
        return self._compare(run, masks_from_sources(g, sources, run.model.delta), [both], rows)

    def _persistent_sources(
        self, run: "LossContext", name: str, climbed: Routes, rows: Rows, g: Mapping[str, Tensor]
    ) -> Sources:
        """The persistent adversary's sources for g at some rows, after its ascents on the route
        `climbed`.

        They take one more step after the backward pass (`PersistentAdversary.finish`).
        """
        adversary = run.adversaries[name]
        whole = run.importances.lower

        def sources(vectors: Mapping[str, Tensor], rows: Rows, g: Mapping[str, Tensor]) -> Sources:
            return split(gathered(adversary.spread(vectors, whole), rows), g)

        there = decomposed_rows(climbed)
        theirs = gathered(whole, there)
        damage = self._adversary_objective(run, theirs, [climbed], there)
        adversary.ascend(lambda vectors: damage(sources(vectors, there, theirs)), run.progress)
        return sources(adversary.leaves(self.coeff / self.samples), rows, g)

    def _adversary_objective(
        self, run: "LossContext", g: Mapping[str, Tensor], routes: list[Routes], rows: Rows
    ) -> Callable[[Sources], Tensor]:
        """The divergence as a function of the sources alone: routes, importances and components
        stand still.
        """
        fixed = {name: value.detach() for name, value in g.items()}

        def damage(sources: Sources) -> Tensor:
            return self._compare(
                run, masks_from_sources(fixed, sources, run.model.delta), routes, rows, detach=True
            )[0]

        return damage

    def _compare(
        self,
        run: "LossContext",
        masks: Mapping[str, Mask],
        routes: list[Routes],
        rows: Rows,
        detach: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Divergence and hidden error of the passes under given masks."""
        divergences = []
        hidden = []
        for route in routes:
            seen = None if detach or not self.hidden else dict[str, Tensor]()
            output = run.model.masked(
                run.batch, routed(masks, route, rows), run.clean, detach, seen=seen
            )
            divergences.append(DIVERGENCES[self.divergence](output, run.clean.output, run.weights))
            if seen is not None:
                hidden.append(hidden_error(run.clean.inputs, seen, self.hidden))
        return torch.stack(divergences).mean(), torch.stack(hidden).mean() if hidden else None


def hidden_error(
    inputs: Mapping[str, Tensor], seen: Mapping[str, Tensor], patterns: Sequence[str]
) -> Tensor:
    """Relative squared error of the inputs of the sites that fnmatch patterns name, mean over sites
    (L6).

    Raises:
        BadInput: they name no site with vectors for inputs.
    """
    vectors = [name for name, x in inputs.items() if x.is_floating_point()]
    named = [name for name in vectors if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not named:
        raise BadInput(f"hidden: {list(patterns)} match no site; {nearest(patterns[0], vectors)}")
    errors = [
        (seen[n] - inputs[n]).square().sum() / inputs[n].square().sum().clamp(min=1e-30)
        for n in named
    ]
    return torch.stack(errors).mean()


def routed(masks: Mapping[str, Mask], route: Routes, rows: Rows | None = None) -> dict[str, Mask]:
    """The masks of one pass: those of its sites, at its positions; `rows` where they hold no
    others.
    """
    at = rows or {}
    return {
        n: masks[n] if r is None else masks[n]._replace(route=r, rows=at.get(n))
        for n, r in route.items()
    }


@dataclass
class LossContext:
    """One batch on its way through the losses: what they share.

    weights [batch]: how many equal rows each row stands for (None: one each). adversaries: the
    persistent ones, by the name of their reconstruction. progress: fraction of training.
    frequencies: how often each component is important over the batch that this is a part of (None:
    it is whole).
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
        """Runs the target and the importance function on a batch; `sample` allows binomial
        importances (training).
        """
        clean = model.clean(batch)
        return cls(
            model,
            batch,
            clean,
            model.importances(clean, generator if sample else None),
            generator,
            weights,
        )

    def masks(self, source: SourceKind, n: int, threshold: float) -> dict[str, Mask]:
        """The n-th draw of a source, the same for every loss that asks for it."""
        key = (source, n, threshold if source == "rounded" else 0.0)
        if key not in self.drawn:
            self.drawn[key] = self.fresh(source, self.importances.lower, threshold)
        return self.drawn[key]

    def fresh(
        self, source: SourceKind, importances: Mapping[str, Tensor], threshold: float
    ) -> dict[str, Mask]:
        """A draw of a source for importances at some positions."""
        if source != "stochastic":
            return fixed_masks(source, importances, self.generator, threshold)
        sources = stochastic_sources(importances, self.generator, self.binomial)
        return masks_from_sources(importances, sources, self.model.delta)

    @property
    def binomial(self) -> bool:
        """Whether sources are drawn from {0, 1} (G5)."""
        return self.model.importance.sampling == "binomial"
