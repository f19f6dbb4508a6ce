"""The losses of a decomposition (section L of docs/method.md).

    total = Σ coeff · loss                                                                   (L7)

1. *Faithfulness*: the components add up to the weights                                     (L1)
2. *Minimality*, *frequency* and *smooth L0*: few components are important               (L2–L4)
3. *Reconstruction*: the masked model gives the outputs of the target (`reconstruction`) (L5, L6)

All losses read one `LossContext`: a batch, its clean run, its importances, and the random draws of
the training step. What several losses need is computed once.

Sources: SPD (Bushnaq et al., 2025, arXiv 2506.20790); VPD (Bushnaq et al., 2026) for the frequency
loss. This module does not update parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed.nn.functional as differentiable
from jaxtyping import Float
from torch import Tensor

from spd_lightning.decomposition.adversaries import Persistent
from spd_lightning.decomposition.divergences import position_mean
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.decomposition.reconstruction import LossContext, Reconstruction
from spd_lightning.errors import BadInput, check_range

EPSILON = 1e-12
"""ε in `(ĝ + ε)^p`."""


# ---- penalties on weights and importances --------------------------------------------------------


@dataclass(frozen=True)
class Faithfulness:
    """The components alone should add up to the weights (L1).

    Args:
        coeff: weight in the total loss.
        relative: mean over sites of ‖Δ‖²/‖W‖² instead of the mean squared entry of Δ.
    """

    coeff: float = 1.0
    relative: bool = False

    def __post_init__(self):
        check_range("faithfulness", least=0, coeff=self.coeff)

    def __call__(self, model: ComponentModel) -> Float[Tensor, ""]:
        """Return `(1/N) Σ_l ‖Δ_l‖²`, or the relative form, in the precision of the parameters.

        N is the number of decomposed weights.
        """
        parameter = next(model.parameters())
        with torch.autocast(parameter.device.type, enabled=False):
            if self.relative:
                return _relative_error(model)
            return _mean_square_error(model)


def _mean_square_error(model: ComponentModel) -> Float[Tensor, ""]:
    """Return `(1/N) Σ_l ‖Δ_l‖²`."""
    squares = []
    n_weights = 0
    for name, site in model.sites.items():
        square = _delta_square(model, name)
        squares.append(square)
        n_weights += site.d_in * site.d_out
    by_site = torch.stack(squares)  # [sites]
    return by_site.sum() / n_weights


def _relative_error(model: ComponentModel) -> Float[Tensor, ""]:
    """Return the mean over sites of `‖Δ_l‖² / ‖W_l‖²`."""
    shares = []
    for name, site in model.sites.items():
        delta_square = _delta_square(model, name)
        weight_square = site.weight.square().sum()
        share = delta_square / weight_square
        shares.append(share)
    by_site = torch.stack(shares)  # [sites]
    return by_site.mean()


def _delta_square(model: ComponentModel, name: str) -> Float[Tensor, ""]:
    """Return ‖Δ‖² of a site."""
    delta = model.delta_weight(name)  # [d_out, d_in]
    return delta.square().sum()


def anneal(
    start: float, final: float, progress: float, begin: float = 0.0, end: float = 1.0
) -> float:
    """Interpolate from `start` to `final` between two fractions of training, constant outside."""
    if progress >= end:
        return start + (final - start)  # rounded like the last line
    if progress <= begin:
        return start
    share = (progress - begin) / (end - begin)
    return start + (final - start) * share


@dataclass(frozen=True)
class Minimality:
    """As few components as possible should be important (L2).

    Args:
        coeff: weight in the total loss.
        p: exponent of `(ĝ + ε)^p`, here and in the frequency loss.
        p_final: exponent at the end of the annealing; p if omitted.
        start: fraction of training at which the annealing of p begins.
        end: fraction of training at which it ends.
        ramp: fraction of training over which the coefficient rises linearly from 0.
    """

    coeff: float = 1e-3
    p: float = 1.0
    p_final: float | None = None
    start: float = 0.0
    end: float = 1.0
    ramp: float = 0.0

    def __post_init__(self):
        start = self.start
        end = self.end
        check_range("minimality", least=0, coeff=self.coeff)
        check_range("minimality", above=0, p=self.p, p_final=self.p_final)
        check_range("minimality", least=0, most=1, start=start, end=end, ramp=self.ramp)
        if start > end:
            raise BadInput(f"start {start} in minimality: it must be at most end, which is {end}")

    def coefficient(self, progress: float) -> float:
        """Return the coefficient at a fraction of training."""
        if self.ramp <= 0:
            return self.coeff
        share = anneal(0.0, 1.0, progress, end=self.ramp)
        return self.coeff * share

    def means(
        self, upper: Mapping[str, Tensor], progress: float, weights: Float[Tensor, " batch"] | None
    ) -> "SiteMeans":
        """Return the mean of `(ĝ + ε)^{p(t)}` for each component, which L2 and L3 share.

        Args:
            upper: upper-leaky importances ĝ [..., C] of every site.
            progress: t, the fraction of training.
            weights: number of equal rows that each row of the batch represents.
        """
        p = self._exponent(progress)
        means: SiteMeans = {}
        for name, g in upper.items():
            means[name] = component_means(g, p, weights)
        return means

    def _exponent(self, progress: float) -> float:
        """Return p(t)."""
        p_final = self.p_final
        if p_final is None:
            return self.p
        return anneal(self.p, p_final, progress, self.start, self.end)

    def __call__(self, means: "SiteMeans") -> Float[Tensor, ""]:
        """Return `Σ_l Σ_c mean (ĝ + ε)^p`, from `means`; not divided by the number of sites."""
        costs = [by_component.sum() for by_component in means.values()]
        by_site = torch.stack(costs)  # [sites]
        return by_site.sum()


SiteMeans = dict[str, Float[Tensor, " C"]]
"""For each site, the mean over batch and positions of `(ĝ + ε)^p` of each component."""


class _Power(torch.autograd.Function):
    """x^p of positive x, with the derivative p x^p / x.

    This derivative needs no second power, which is the most expensive operation of its size.
    """

    @staticmethod
    def forward(ctx, x, p):
        ctx.p = p
        powered = x**p
        ctx.save_for_backward(x, powered)
        return powered

    @staticmethod
    def backward(ctx, *grad_outputs):
        (grad,) = grad_outputs
        x, powered = ctx.saved_tensors
        dx = grad * ctx.p
        dx.mul_(powered)
        dx.div_(x)
        return dx, None


def powered(g: Float[Tensor, "..."], p: float) -> Float[Tensor, "..."]:
    """Return `(ĝ + ε)^p`."""
    positive = g + EPSILON
    if p == 1:
        return positive
    if p == 2:
        return positive.square()
    return _Power.apply(positive, p)


def component_means(
    g: Float[Tensor, "... C"], p: float, weights: Float[Tensor, " batch"] | None
) -> Float[Tensor, " C"]:
    """Return the mean of `(ĝ + ε)^p` over batch and positions for each component."""
    costs = powered(g, p)  # [batch, ..., C]
    if g.ndim > 2:
        by_position = costs.flatten(1, -2)  # [batch, positions, C]
        costs = by_position.mean(1)  # [batch, C]
    return position_mean(costs, weights)


@dataclass(frozen=True)
class Frequency:
    """A component should rarely be important; its frequency is that in the whole batch (L3).

    The exponent of the means, and its annealing, are those of `Minimality`.

    Args:
        coeff: weight in the total loss; 0 switches it off.
        positions: the reference number of positions, a in `f log2(1 + a f)`.
        until: fraction of training after which the term is switched off.
    """

    coeff: float = 0.0
    positions: float = 1.0
    until: float = 1.0

    def __post_init__(self):
        check_range("frequency", least=0, coeff=self.coeff)
        check_range("frequency", above=0, positions=self.positions)
        check_range("frequency", least=0, most=1, until=self.until)

    def coefficient(self, progress: float) -> float:
        """Return the coefficient at a fraction of training."""
        if progress > self.until:
            return 0.0
        return self.coeff

    def __call__(
        self, means: SiteMeans, whole: Float[Tensor, " components"] | None = None
    ) -> Float[Tensor, ""]:
        """Return `Σ_l Σ_c f_c log2(1 + a f_c)`, with f_c the mean over the batches of all devices.

        Args:
            means: f_c on this device's batch, or on one of its equal parts (`Minimality.means`).
            whole: f_c of the whole batch if `means` are those of one part. The gradients of all
                parts then have the same mean as the gradient of the whole batch.
        """
        f = joined_means(means)
        if whole is not None:
            gradient_only = f - f.detach()  # zero, with the gradient of the part
            f = whole + gradient_only
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            total = differentiable.all_reduce(f)
            f = total / distributed.get_world_size()
        uses = self.positions * f  # expected number among the reference positions
        bits = torch.log2(1 + uses)
        costs = f * bits  # [components]
        return costs.sum()


def joined_means(means: SiteMeans) -> Float[Tensor, " components"]:
    """Return the means of all sites in one vector, in the order of the sites."""
    vectors = list(means.values())  # [C] each
    return torch.cat(vectors)


@dataclass(frozen=True)
class SmoothL0:
    """A smooth count of the important components, which becomes sharper in training (L4).

    Args:
        coeff: weight in the total loss; 0 switches it off.
        gamma: width of the count at the start.
        gamma_final: width at the end of the annealing.
        end: fraction of training at which the annealing ends.
    """

    coeff: float = 0.0
    gamma: float = 1.0
    gamma_final: float = 0.01
    end: float = 0.9

    def __post_init__(self):
        check_range("smooth_l0", least=0, coeff=self.coeff)
        check_range("smooth_l0", above=0, gamma=self.gamma, gamma_final=self.gamma_final)
        check_range("smooth_l0", least=0, most=1, end=self.end)

    def __call__(
        self, lower: Mapping[str, Tensor], progress: float, weights: Float[Tensor, " batch"] | None
    ) -> Float[Tensor, ""]:
        """Return `Σ_l Σ_c mean g² / (g² + γ²)`."""
        gamma = anneal(self.gamma, self.gamma_final, progress, end=self.end)
        importances = list(lower.values())
        counts = [_smooth_count(g, gamma, weights) for g in importances]
        by_site = torch.stack(counts)  # [sites]
        return by_site.sum()


def _smooth_count(
    g: Float[Tensor, "... C"], gamma: float, weights: Float[Tensor, " batch"] | None
) -> Float[Tensor, ""]:
    """Return `Σ_c mean g² / (g² + γ²)` of a site."""
    square = g.square()
    counts = square / (square + gamma**2)  # [..., C]
    means = component_means(counts, 1.0, weights)  # [C]
    return means.sum()


# ---- the total -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Losses:
    """All terms of the training loss.

    Args:
        faithfulness: the components add up to the weights.
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
        default_factory=lambda: {
            "all": Reconstruction(route="all"),
            "layerwise": Reconstruction(route="layerwise"),
        }
    )

    @property
    def persistent(self) -> dict[str, Persistent]:
        """The settings of the persistent adversaries, by the name of their reconstruction."""
        settings = {}
        for name, reconstruction in self.reconstruction.items():
            if reconstruction.source in ("persistent_pgd", "mixed"):
                settings[name] = reconstruction.persistent
        return settings

    def check_adversaries(self, delta: bool, micro_batches: int) -> None:
        """Reject adversaries that cannot work.

        These are fresh ones that would not move from where they start (`Adversary.check_start`),
        and pools of particles on batches that are processed in parts.

        Raises:
            BadInput: one of them cannot work.
        """
        for name, adversary in self.persistent.items():
            if adversary.particles and micro_batches > 1:
                raise BadInput(
                    f"micro_batches {micro_batches} with particles in reconstruction '{name}': a "
                    "pool of particles needs whole batches; omit particles, or micro_batches"
                )
        for name, reconstruction in self.reconstruction.items():
            if reconstruction.source == "pgd":
                place = f"reconstruction '{name}'"
                reconstruction.adversary.check_start(delta, place)

    def __call__(
        self, run: LossContext, progress: float = 0.0
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Return the total (L7), and every term before its coefficient.

        Args:
            run: the batch and what the losses share.
            progress: fraction of training, for everything that is annealed.

        Raises:
            BadInput: every coefficient is 0.
        """
        run.progress = progress
        terms: WeightedTerms = {}
        faithfulness = self.faithfulness
        if faithfulness.coeff:  # step 1
            value = faithfulness(run.model)
            terms["faithfulness"] = (faithfulness.coeff, value)
        terms |= self._penalties(run, progress)  # step 2
        terms |= self._reconstructions(run)  # step 3
        weighted = []
        values = {}
        for name, (coeff, value) in terms.items():
            weighted.append(coeff * value)
            values[name] = value.detach()
        if not weighted:
            raise BadInput("losses: every coefficient is 0; give at least one of them a value")
        total = torch.stack(weighted).sum()
        return total, values

    def _penalties(self, run: LossContext, progress: float) -> "WeightedTerms":
        """Return the losses on importances (L2–L4)."""
        minimality = self.minimality
        frequency = self.frequency
        smooth_l0 = self.smooth_l0
        terms: WeightedTerms = {}
        if minimality.coeff or frequency.coeff:
            means = minimality.means(run.importances.upper, progress, run.weights)
            if minimality.coeff:
                value = minimality(means)
                terms["minimality"] = (minimality.coefficient(progress), value)
            if frequency.coeff:
                value = frequency(means, run.frequencies)
                terms["frequency"] = (frequency.coefficient(progress), value)
        if smooth_l0.coeff:
            value = smooth_l0(run.importances.lower, progress, run.weights)
            terms["smooth_l0"] = (smooth_l0.coeff, value)
        return terms

    def _reconstructions(self, run: LossContext) -> "WeightedTerms":
        """Return the reconstruction losses and the hidden errors of their passes (L5, L6)."""
        terms: WeightedTerms = {}
        for name, reconstruction in self.reconstruction.items():
            if not reconstruction.counts:
                continue
            value, hidden = reconstruction.terms(run, name)
            terms[f"reconstruction/{name}"] = (reconstruction.coeff, value)
            if hidden is not None:
                terms[f"hidden/{name}"] = (reconstruction.hidden_coeff, hidden)
        return terms


WeightedTerms = dict[str, tuple[float, Tensor]]
"""The coefficient and the value of terms of the total, by name."""
