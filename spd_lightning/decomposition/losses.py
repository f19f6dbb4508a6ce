"""The losses that make a decomposition: faithful, minimal, and sufficient (section L of
docs/method.md).

Every loss reads one `LossContext`: a batch, its clean run, its importances and the random draws of
this step. What two losses need alike is computed once: the clean run, the importances, and the
stochastic masks.

    total = Σ coeff · loss    (L7)

The sum is over faithfulness, minimality, frequency, smooth_l0 and the reconstructions.
A reconstruction is a source × a route × a divergence: how the masks are made, where they act, what
is compared.
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


# ---- penalties on weights and importances --------------------------------------------------------


@dataclass(frozen=True)
class Faithfulness:
    """Components plus nothing should give the weights back (L1).

    Args:
        coeff: weight in the total loss.
        relative: mean over sites of ‖Δ‖²/‖W‖² instead of the mean squared entry of Δ.
    """

    coeff: float = 1.0
    relative: bool = False

    def __post_init__(self):
        check_range("faithfulness", least=0, coeff=self.coeff)

    def __call__(self, model: ComponentModel) -> Float[Tensor, ""]:
        """`(1/N) Σ_l ‖Δ_l‖²`, N the number of decomposed weights, in the parameters' own
        precision.
        """
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            squares = [model.delta_weight(name).square().sum() for name in model.sites]
            if self.relative:
                shares = [
                    s / site.weight.square().sum()
                    for s, site in zip(squares, model.sites.values(), strict=True)
                ]
                return torch.stack(shares).mean()
            return torch.stack(squares).sum() / sum(
                site.d_in * site.d_out for site in model.sites.values()
            )


def anneal(
    start: float, final: float, progress: float, begin: float = 0.0, end: float = 1.0
) -> float:
    """Linear from `start` to `final` between two fractions of training, constant outside."""
    share = (progress - begin) / (end - begin) if end > begin else float(progress >= end)
    return start + (final - start) * min(max(share, 0.0), 1.0)


@dataclass(frozen=True)
class Minimality:
    """As few components as possible should be important (L2).

    Args:
        coeff: weight in the total loss.
        p: exponent of `(ĝ + ε)^p`, here and in the frequency loss.
        p_final: exponent at the end of the annealing; p if omitted.
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

    def __post_init__(self):
        check_range("minimality", least=0, coeff=self.coeff)
        check_range("minimality", above=0, p=self.p, p_final=self.p_final)
        check_range("minimality", least=0, most=1, start=self.start, end=self.end, ramp=self.ramp)
        if self.start > self.end:
            raise BadInput(
                f"start {self.start} in minimality: it must be at most end, which is {self.end}"
            )

    def coefficient(self, progress: float) -> float:
        """The coefficient at a fraction of training."""
        return (
            self.coeff * anneal(0.0, 1.0, progress, end=self.ramp) if self.ramp > 0 else self.coeff
        )

    def means(
        self, upper: Mapping[str, Tensor], progress: float, weights: Float[Tensor, " batch"] | None
    ) -> "SiteMeans":
        """Mean of `(ĝ + ε)^{p(t)}` for each component, by site: the sums that L2 and L3 share.

        Args:
            upper: upper-leaky importances ĝ [..., C] of every site.
            progress: t, the fraction of training.
            weights: how many equal rows each row of the batch stands for.
        """
        p_final = self.p if self.p_final is None else self.p_final
        p = anneal(self.p, p_final, progress, self.start, self.end)
        return {name: component_means(g, p, weights) for name, g in upper.items()}

    def __call__(self, means: "SiteMeans") -> Float[Tensor, ""]:
        """`Σ_l Σ_c mean (ĝ + ε)^p`, from `means`; not divided by the number of sites."""
        return torch.stack([site.sum() for site in means.values()]).sum()


SiteMeans = dict[str, Float[Tensor, " C"]]
"""For each site, the mean over batch and positions of what each component's importance costs."""


class _Power(torch.autograd.Function):
    """x^p of positive x, whose derivative p x^p / x takes no second power: the dearest operation of
    its size.
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
    """`(ĝ + ε)^p`, what one importance costs."""
    return (
        g + EPSILON
        if p == 1
        else (g + EPSILON).square()
        if p == 2
        else _Power.apply(g + EPSILON, p)
    )


def component_means(
    g: Float[Tensor, "... C"], p: float, weights: Float[Tensor, " batch"] | None
) -> Float[Tensor, " C"]:
    """Per component, the mean of `(ĝ + ε)^p` over batch and positions."""
    costs = powered(g, p)
    return position_mean(costs.flatten(1, -2).mean(1) if g.ndim > 2 else costs, weights)


@dataclass(frozen=True)
class Frequency:
    """A component should be important rarely, by how often it is over the whole batch (L3).

    The exponent of the means is minimality's, annealed alike: L3 has none of its own.

    Args:
        coeff: weight in the total loss; 0 switches it off.
        positions: the reference number of positions a in `f log2(1 + a f)`.
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
        """`Σ_l Σ_c f_c log2(1 + a f_c)`, where f_c is the mean over the batches of all devices.

        Args:
            means: f_c on this device's batch, or on one of its equal parts (`Minimality.means`).
            whole: f_c of the whole batch, if `means` are of one part. The gradients of all parts
                then have the same mean as the gradient of the whole batch.
        """
        f = joined_means(means)
        if whole is not None:
            f = whole + (f - f.detach())
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            f = differentiable.all_reduce(f) / torch.distributed.get_world_size()
        return (f * torch.log2(1 + self.positions * f)).sum()


def joined_means(means: SiteMeans) -> Float[Tensor, " components"]:
    """The means of the components of all sites, in the order of the sites."""
    return torch.cat(list(means.values()))


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

    def __post_init__(self):
        check_range("smooth_l0", least=0, coeff=self.coeff)
        check_range("smooth_l0", above=0, gamma=self.gamma, gamma_final=self.gamma_final)
        check_range("smooth_l0", least=0, most=1, end=self.end)

    def __call__(
        self, lower: Mapping[str, Tensor], progress: float, weights: Float[Tensor, " batch"] | None
    ) -> Float[Tensor, ""]:
        """`Σ_l Σ_c mean g² / (g² + γ²)`."""
        gamma = anneal(self.gamma, self.gamma_final, progress, end=self.end)
        counts = {name: g.square() / (g.square() + gamma**2) for name, g in lower.items()}
        return torch.stack(
            [component_means(count, 1.0, weights).sum() for count in counts.values()]
        ).sum()


# ---- the total -----------------------------------------------------------------------------------


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
        default_factory=lambda: {
            "all": Reconstruction(route="all"),
            "layerwise": Reconstruction(route="layerwise"),
        }
    )

    @property
    def persistent(self) -> dict[str, Persistent]:
        """The reconstructions with a persistent adversary, and how it climbs."""
        kinds = ("persistent_pgd", "mixed")
        return {name: r.persistent for name, r in self.reconstruction.items() if r.source in kinds}

    def check_adversaries(self, delta: bool) -> None:
        """Reject fresh adversaries that would start where they stay (see `Adversary.check_start`).

        Raises:
            BadInput: one of them would.
        """
        for name, reconstruction in self.reconstruction.items():
            if reconstruction.source == "pgd":
                reconstruction.adversary.check_start(delta, f"reconstruction '{name}'")

    def __call__(
        self, run: LossContext, progress: float = 0.0
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The total (L7) and every term raw. progress: fraction of training, for what anneals."""
        terms: dict[str, tuple[float, Tensor]] = {}
        if self.faithfulness.coeff:
            terms["faithfulness"] = (self.faithfulness.coeff, self.faithfulness(run.model))
        if self.minimality.coeff or self.frequency.coeff:
            means = self.minimality.means(run.importances.upper, progress, run.weights)
            if self.minimality.coeff:
                terms["minimality"] = (
                    self.minimality.coefficient(progress),
                    self.minimality(means),
                )
            if self.frequency.coeff:
                terms["frequency"] = (
                    self.frequency.coefficient(progress),
                    self.frequency(means, run.frequencies),
                )
        if self.smooth_l0.coeff:
            terms["smooth_l0"] = (
                self.smooth_l0.coeff,
                self.smooth_l0(run.importances.lower, progress, run.weights),
            )
        run.progress = progress
        for name, reconstruction in self.reconstruction.items():
            if not reconstruction.counts:
                continue
            value, hidden = reconstruction.terms(run, name)
            terms[f"reconstruction/{name}"] = (reconstruction.coeff, value)
            if hidden is not None:
                terms[f"hidden/{name}"] = (reconstruction.hidden_coeff, hidden)
        total = torch.stack([coeff * value for coeff, value in terms.values()]).sum()
        return total, {name: value.detach() for name, (_, value) in terms.items()}
