"""Reconstruction: the masked model should do what the target does (L5 of docs/method.md).

A reconstruction is a source × a route × a divergence: how the masks are made, where they act, what is compared. All of
them read one `Pass`: a batch, its clean run, its importances and the random draws of this step. What two need alike is
computed once: the clean run, the importances, and the stochastic masks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import log_softmax

from spd_lightning.decomposition.adversaries import Adversary, pgd_sources
from spd_lightning.decomposition.components import Mask
from spd_lightning.decomposition.importance import Importances
from spd_lightning.decomposition.masks import (
    RouteKind,
    Routes,
    SourceKind,
    Sources,
    draw_routes,
    fixed_masks,
    masks_from_sources,
    stochastic_sources,
)
from spd_lightning.decomposition.model import Clean, ComponentModel


def position_mean(values: Float[Tensor, "..."], weights: Float[Tensor, " batch"] | None) -> Float[Tensor, "..."]:
    """Mean over the batch (the first axis); weights say how many equal rows each row stands for."""
    if weights is None:
        return values.mean(0)
    return torch.tensordot(weights, values, dims=1) / weights.sum()


# ---- divergences ----------------------------------------------------------------------------------------------------


def mse_rows(output: Float[Tensor, "batch *rest"], target: Float[Tensor, "batch *rest"]) -> Float[Tensor, " batch"]:
    """Mean squared difference over the entries of each row of a batch."""
    return (output - target).square().flatten(1).mean(1)


def kl_rows(output: Float[Tensor, "batch *rest"], target: Float[Tensor, "batch *rest"]) -> Float[Tensor, " batch"]:
    """KL(softmax target ‖ softmax output), mean over the positions of each row, in float32 or better."""
    dtype = torch.promote_types(output.dtype, torch.float32)
    p, q = log_softmax(target.to(dtype), -1), log_softmax(output.to(dtype), -1)
    per_position = (p.exp() * (p - q)).sum(-1)
    return per_position.flatten(1).mean(1) if per_position.ndim > 1 else per_position


def mse(
    output: Float[Tensor, "batch *rest"],
    target: Float[Tensor, "batch *rest"],
    weights: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared difference over all output entries."""
    return position_mean(mse_rows(output, target), weights)


def kl(
    output: Float[Tensor, "batch *rest"],
    target: Float[Tensor, "batch *rest"],
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
