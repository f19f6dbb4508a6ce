"""The losses that make a decomposition: faithful, minimal, and sufficient (section L of docs/method.md).

Every loss reads one `Pass`: a batch, its clean run, its importances and the random draws of this step. What two losses
need alike is computed once: the clean run, the importances, and the stochastic masks.

    total = Σ coeff · loss        faithfulness · minimality · frequency · smooth_l0 · reconstructions       (L7)

A reconstruction is a source × a route × a divergence: how the masks are made, where they act, what is compared.
Not here: the persistent adversary, hidden-activation reconstruction.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed.nn.functional as differentiable
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import log_softmax

from spd_lightning.decomposition.components import Mask
from spd_lightning.decomposition.importance import Importances
from spd_lightning.decomposition.masks import (
    Adversary,
    RouteKind,
    Routes,
    SourceKind,
    Sources,
    draw_routes,
    fixed_masks,
    masks_from_sources,
    pgd_sources,
    stochastic_sources,
)
from spd_lightning.decomposition.model import Clean, ComponentModel

EPSILON = 1e-12


def position_mean(values: Float[Tensor, "..."], weights: Float[Tensor, " batch"] | None) -> Float[Tensor, "..."]:
    """Mean over the batch (the first axis); weights say how many equal rows each row stands for."""
    if weights is None:
        return values.mean(0)
    return torch.tensordot(weights, values, dims=1) / weights.sum()


# ---- divergences ----------------------------------------------------------------------------------------------------


def mse(
    output: Float[Tensor, "batch *rest"],
    target: Float[Tensor, "batch *rest"],
    weights: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared difference over all output entries."""
    return position_mean((output - target).square().flatten(1).mean(1), weights)


def kl(
    output: Float[Tensor, "batch *rest"],
    target: Float[Tensor, "batch *rest"],
    weights: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """KL(softmax target ‖ softmax output), mean over positions, in float32 or better."""
    dtype = torch.promote_types(output.dtype, torch.float32)
    p, q = log_softmax(target.to(dtype), -1), log_softmax(output.to(dtype), -1)
    per_position = (p.exp() * (p - q)).sum(-1)
    return position_mean(per_position.flatten(1).mean(1) if per_position.ndim > 1 else per_position, weights)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {"mse": mse, "kl": kl}


# ---- penalties on weights and importances ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Faithfulness:
    """Components plus nothing should give the weights back (L1).

    Args:
        coeff: weight in the total loss.
        relative: mean over sites of ‖Δ‖²/‖W‖² instead of the mean squared entry of Δ.
    """

    coeff: float = 1.0
    relative: bool = False

    def __call__(self, model: ComponentModel) -> Float[Tensor, ""]:
        """`(1/N) Σ_l ‖Δ_l‖²`, N the number of decomposed weights, in the parameters' own precision."""
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            squares = [model.delta_weight(name).square().sum() for name in model.sites]
            if self.relative:
                shares = [s / site.weight.square().sum() for s, site in zip(squares, model.sites.values(), strict=True)]
                return torch.stack(shares).mean()
            return torch.stack(squares).sum() / sum(site.d_in * site.d_out for site in model.sites.values())


def anneal(start: float, final: float, progress: float, begin: float = 0.0, end: float = 1.0) -> float:
    """Linear from `start` to `final` between two fractions of training, constant outside."""
    share = (progress - begin) / (end - begin) if end > begin else float(progress >= end)
    return start + (final - start) * min(max(share, 0.0), 1.0)


@dataclass(frozen=True)
class Minimality:
    """As few components as possible should be important (L2).

    Args:
        coeff: weight in the total loss.
        p: exponent of `(ĝ + ε)^p`.
        p_final: exponent at the end of the annealing; p where left out.
        start: fraction of training at which p begins to move.
        end: fraction of training at which p has arrived.
        ramp: fraction of training over which the coefficient rises linearly from 0.
    """

    coeff: float = 1e-3
    p: float = 1.0
    p_final: float | None = None
    start: float = 0.0
    end: float = 1.0
    ramp: float = 0.0

    def coefficient(self, progress: float) -> float:
        """The coefficient at a fraction of training."""
        return self.coeff * anneal(0.0, 1.0, progress, end=self.ramp) if self.ramp > 0 else self.coeff

    def __call__(
        self, upper: Mapping[str, Tensor], progress: float, weights: Float[Tensor, " batch"] | None
    ) -> Float[Tensor, ""]:
        """`Σ_l Σ_c mean (ĝ + ε)^p`; not divided by the number of sites."""
        p = anneal(self.p, self.p if self.p_final is None else self.p_final, progress, self.start, self.end)
        return torch.stack([component_means(g, p, weights).sum() for g in upper.values()]).sum()


def component_means(
    g: Float[Tensor, "... C"], p: float, weights: Float[Tensor, " batch"] | None
) -> Float[Tensor, " C"]:
    """Per component, the mean of `(ĝ + ε)^p` over batch and positions."""
    powered = g + EPSILON if p == 1 else (g + EPSILON).square() if p == 2 else (g + EPSILON) ** p
    return position_mean(powered.flatten(1, -2).mean(1) if g.ndim > 2 else powered, weights)


@dataclass(frozen=True)
class Frequency:
    """A component should be important rarely, by how often it is over the whole batch (L3).

    Args:
        coeff: weight in the total loss; 0 switches it off.
        positions: the reference number of positions a in `f log2(1 + a f)`.
        p: exponent, as in the minimality loss.
    """

    coeff: float = 0.0
    positions: float = 1.0
    p: float = 1.0

    def __call__(self, upper: Mapping[str, Tensor], weights: Float[Tensor, " batch"] | None) -> Float[Tensor, ""]:
        """`Σ_l Σ_c f_c log2(1 + a f_c)`, f_c the mean over the batches of all devices."""
        f = torch.cat([component_means(g, self.p, weights) for g in upper.values()])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            f = differentiable.all_reduce(f) / torch.distributed.get_world_size()
        return (f * torch.log2(1 + self.positions * f)).sum()


@dataclass(frozen=True)
class SmoothL0:
    """A smooth count of important components, sharpening over training (L4).

    Args:
        coeff: weight in the total loss; 0 switches it off.
        gamma: width of the count at the start.
        gamma_final: width at the end of the annealing.
        end: fraction of training at which the width has arrived.
    """

    coeff: float = 0.0
    gamma: float = 1.0
    gamma_final: float = 0.01
    end: float = 0.9

    def __call__(
        self, lower: Mapping[str, Tensor], progress: float, weights: Float[Tensor, " batch"] | None
    ) -> Float[Tensor, ""]:
        """`Σ_l Σ_c mean g² / (g² + γ²)`."""
        gamma = anneal(self.gamma, self.gamma_final, progress, end=self.end)
        counts = {name: g.square() / (g.square() + gamma**2) for name, g in lower.items()}
        return torch.stack([component_means(count, 1.0, weights).sum() for count in counts.values()]).sum()


# ---- reconstruction -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reconstruction:
    """The masked model should do what the target does (L5): a source × a route × a divergence.

    Args:
        source: how far what is not needed is switched off.
        route: which sites and positions are decomposed in a pass.
        divergence: how outputs are compared.
        coeff: weight in the total loss.
        samples: draws to average over.
        adversary: settings of the `pgd` source.
        probability: P(site and position decomposed) of the `static` route.
        threshold: τ of the `rounded` source.
    """

    source: SourceKind = "stochastic"
    route: RouteKind = "all"
    divergence: Literal["mse", "kl"] = "mse"
    coeff: float = 1.0
    samples: int = 1
    adversary: Adversary = field(default_factory=Adversary)
    probability: float = 0.5
    threshold: float = 0.1

    def __call__(self, run: "Pass") -> Float[Tensor, ""]:
        """Mean divergence over draws and over the passes of the route."""
        return torch.stack([self._draw(run, n) for n in range(self.samples)]).mean()

    def _draw(self, run: "Pass", n: int) -> Tensor:
        importances = run.importances.lower
        routes = list(draw_routes(self.route, importances, run.generator, self.probability))
        if self.source == "pgd":
            return self._compare(run, self._worst_masks(run, routes), routes)
        return self._compare(run, run.masks(self.source, n, self.threshold), routes)

    def _compare(self, run: "Pass", masks: Mapping[str, Mask], routes: list[Routes], detach: bool = False) -> Tensor:
        divergence = DIVERGENCES[self.divergence]
        passes = [run.model.masked(run.batch, routed(masks, route), run.clean, detach) for route in routes]
        return torch.stack([divergence(output, run.clean.output, run.weights) for output in passes]).mean()

    def _worst_masks(self, run: "Pass", routes: list[Routes]) -> dict[str, Mask]:
        """The masks a fresh adversary finds while routes, importances and components stand still."""
        fixed = {name: g.detach() for name, g in run.importances.lower.items()}

        def loss(sources: Sources) -> Tensor:
            return self._compare(run, masks_from_sources(fixed, sources, run.model.delta), routes, detach=True)

        sources = pgd_sources(self.adversary, fixed, loss, run.generator)
        return masks_from_sources(run.importances.lower, sources, run.model.delta)


def routed(masks: Mapping[str, Mask], route: Routes) -> dict[str, Mask]:
    """The masks of one pass: those of its sites, at its positions."""
    return {n: masks[n] if where is None else masks[n]._replace(route=where) for n, where in route.items()}


@dataclass
class Pass:
    """One batch on its way through the losses: what they share.

    weights [batch]: how many equal rows each row stands for (None: one each).
    """

    model: ComponentModel
    batch: Tensor
    clean: Clean
    importances: Importances
    generator: torch.Generator | None
    weights: Float[Tensor, " batch"] | None = None
    drawn: dict[tuple[str, int, float], dict[str, Mask]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: ComponentModel,
        batch: Tensor,
        generator: torch.Generator | None = None,
        weights: Float[Tensor, " batch"] | None = None,
        sample: bool = False,
    ) -> "Pass":
        """Runs the target and the importance function on a batch; `sample` allows binomial importances (training)."""
        clean = model.clean(batch)
        return cls(model, batch, clean, model.importances(clean, generator if sample else None), generator, weights)

    def masks(self, source: SourceKind, n: int, threshold: float) -> dict[str, Mask]:
        """The n-th draw of a source, the same for every loss that asks for it."""
        key = (source, n, threshold if source == "rounded" else 0.0)
        if key not in self.drawn:
            if source == "stochastic":
                binomial = self.model.importance.sampling == "binomial"
                sources = stochastic_sources(self.importances.lower, self.generator, binomial)
                self.drawn[key] = masks_from_sources(self.importances.lower, sources, self.model.delta)
            else:
                lower, delta = self.importances.lower, self.model.delta
                self.drawn[key] = fixed_masks(source, lower, self.generator, threshold, delta)
        return self.drawn[key]


@dataclass(frozen=True)
class Losses:
    """All terms of the training loss.

    Args:
        faithfulness: components give the weights back.
        minimality: few components are important.
        frequency: each component is important rarely.
        smooth_l0: a smooth count of important components.
        reconstruction: named reconstructions, each a source × a route × a divergence.
    """

    faithfulness: Faithfulness = field(default_factory=Faithfulness)
    minimality: Minimality = field(default_factory=Minimality)
    frequency: Frequency = field(default_factory=Frequency)
    smooth_l0: SmoothL0 = field(default_factory=SmoothL0)
    reconstruction: dict[str, Reconstruction] = field(
        default_factory=lambda: {"all": Reconstruction(route="all"), "layerwise": Reconstruction(route="layerwise")}
    )

    def __call__(self, run: Pass, progress: float = 0.0) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The total (L7) and every term raw. progress: fraction of training, for what anneals."""
        terms: dict[str, tuple[float, Tensor]] = {}
        if self.faithfulness.coeff:
            terms["faithfulness"] = (self.faithfulness.coeff, self.faithfulness(run.model))
        if self.minimality.coeff:
            value = self.minimality(run.importances.upper, progress, run.weights)
            terms["minimality"] = (self.minimality.coefficient(progress), value)
        if self.frequency.coeff:
            terms["frequency"] = (self.frequency.coeff, self.frequency(run.importances.upper, run.weights))
        if self.smooth_l0.coeff:
            terms["smooth_l0"] = (self.smooth_l0.coeff, self.smooth_l0(run.importances.lower, progress, run.weights))
        for name, reconstruction in self.reconstruction.items():
            terms[f"reconstruction/{name}"] = (reconstruction.coeff, reconstruction(run))
        total = torch.stack([coeff * value for coeff, value in terms.values()]).sum()
        return total, {name: value.detach() for name, (_, value) in terms.items()}
