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
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.decomposition.reconstruction import LossContext, Reconstruction, position_mean
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
        device = next(model.parameters()).device.type
        with torch.autocast(device, enabled=False):
            squares = [model.delta_weight(name).square().sum() for name in model.sites]
            sites = model.sites.values()
            if self.relative:
                shares = []
                for square, site in zip(squares, sites, strict=True):
                    shares.append(square / site.weight.square().sum())
                return torch.stack(shares).mean()
            weights = sum(site.d_in * site.d_out for site in sites)
            return torch.stack(squares).sum() / weights


def anneal(
    start: float, final: float, progress: float, begin: float = 0.0, end: float = 1.0
) -> float:
    """Interpolate from `start` to `final` between two fractions of training, constant outside."""
    if end > begin:
        share = (progress - begin) / (end - begin)
    else:
        share = float(progress >= end)
    share = min(max(share, 0.0), 1.0)
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
        check_range("minimality", least=0, coeff=self.coeff)
        check_range("minimality", above=0, p=self.p, p_final=self.p_final)
        check_range("minimality", least=0, most=1, start=self.start, end=self.end, ramp=self.ramp)
        if self.start > self.end:
            raise BadInput(
                f"start {self.start} in minimality: it must be at most end, which is {self.end}"
            )

    def coefficient(self, progress: float) -> float:
        """Return the coefficient at a fraction of training."""
        if self.ramp <= 0:
            return self.coeff
        return self.coeff * anneal(0.0, 1.0, progress, end=self.ramp)

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
        return {name: component_means(g, p, weights) for name, g in upper.items()}

    def _exponent(self, progress: float) -> float:
        """Return p(t)."""
        p_final = self.p if self.p_final is None else self.p_final
        return anneal(self.p, p_final, progress, self.start, self.end)

    def __call__(self, means: "SiteMeans") -> Float[Tensor, ""]:
        """Return `Σ_l Σ_c mean (ĝ + ε)^p`, from `means`; not divided by the number of sites."""
        by_site = [site.sum() for site in means.values()]
        return torch.stack(by_site).sum()


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
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, powered = ctx.saved_tensors
        return (grad * ctx.p).mul_(powered).div_(x), None


def powered(g: Float[Tensor, "..."], p: float) -> Float[Tensor, "..."]:
    """Return `(ĝ + ε)^p`."""
    if p == 1:
        return g + EPSILON
    if p == 2:
        return (g + EPSILON).square()
    return _Power.apply(g + EPSILON, p)


def component_means(
    g: Float[Tensor, "... C"], p: float, weights: Float[Tensor, " batch"] | None
) -> Float[Tensor, " C"]:
    """Return the mean of `(ĝ + ε)^p` over batch and positions for each component."""
    costs = powered(g, p)  # [batch, ..., C]
    if g.ndim > 2:
        costs = costs.flatten(1, -2).mean(1)  # [batch, C]
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
        return self.coeff if progress <= self.until else 0.0

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
            f = whole + (f - f.detach())  # the value of the whole batch, the gradient of the part
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            f = differentiable.all_reduce(f) / torch.distributed.get_world_size()
        bits = torch.log2(1 + self.positions * f)  # [components]
        return (f * bits).sum()


def joined_means(means: SiteMeans) -> Float[Tensor, " components"]:
    """Return the means of all sites in one vector, in the order of the sites."""
    return torch.cat(list(means.values()))


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
        counts = [_smooth_count(g, gamma) for g in lower.values()]  # [..., C] each
        by_site = [component_means(count, 1.0, weights).sum() for count in counts]
        return torch.stack(by_site).sum()


def _smooth_count(g: Float[Tensor, "..."], gamma: float) -> Float[Tensor, "..."]:
    """Return g² / (g² + γ²)."""
    return g.square() / (g.square() + gamma**2)


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

    def check_adversaries(self, delta: bool) -> None:
        """Reject fresh adversaries that would not move from where they start.

        See `Adversary.check_start`.

        Raises:
            BadInput: one of them would not move.
        """
        for name, reconstruction in self.reconstruction.items():
            if reconstruction.source == "pgd":
                reconstruction.adversary.check_start(delta, f"reconstruction '{name}'")

    def __call__(
        self, run: LossContext, progress: float = 0.0
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Return the total (L7), and every term before its coefficient.

        Args:
            run: the batch and what the losses share.
            progress: fraction of training, for everything that is annealed.
        """
        terms: dict[str, tuple[float, Tensor]] = {}  # coefficient and value
        if self.faithfulness.coeff:  # step 1
            terms["faithfulness"] = (self.faithfulness.coeff, self.faithfulness(run.model))
        terms |= self._penalties(run, progress)  # step 2
        run.progress = progress
        for name, reconstruction in self.reconstruction.items():  # step 3
            if not reconstruction.counts:
                continue
            value, hidden = reconstruction.terms(run, name)
            terms[f"reconstruction/{name}"] = (reconstruction.coeff, value)
            if hidden is not None:
                terms[f"hidden/{name}"] = (reconstruction.hidden_coeff, hidden)
        weighted = [coeff * value for coeff, value in terms.values()]
        total = torch.stack(weighted).sum()
        return total, {name: value.detach() for name, (_, value) in terms.items()}

    def _penalties(self, run: LossContext, progress: float) -> dict[str, tuple[float, Tensor]]:
        """Return coefficient and value of the losses on importances (L2–L4)."""
        terms: dict[str, tuple[float, Tensor]] = {}
        if self.minimality.coeff or self.frequency.coeff:
            means = self.minimality.means(run.importances.upper, progress, run.weights)
            if self.minimality.coeff:
                coeff = self.minimality.coefficient(progress)
                terms["minimality"] = (coeff, self.minimality(means))
            if self.frequency.coeff:
                coeff = self.frequency.coefficient(progress)
                terms["frequency"] = (coeff, self.frequency(means, run.frequencies))
        if self.smooth_l0.coeff:
            value = self.smooth_l0(run.importances.lower, progress, run.weights)
            terms["smooth_l0"] = (self.smooth_l0.coeff, value)
        return terms
