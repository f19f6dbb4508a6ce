"""Evaluation of a decomposition over validation batches: sums in, figures of section E out."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lightning.decomposition.adversaries import Adversary, pgd_sources
from spd_lightning.decomposition.masks import draw_routes, masks_from_sources
from spd_lightning.decomposition.metrics import (
    MASKINGS,
    column_match,
    dense_error,
    firings,
    identity_error,
    masked_outputs,
    sizeable,
)
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.decomposition.reconstruction import DIVERGENCES, Pass, routed

PROBE = 0.75
BINS = 50


@dataclass(frozen=True)
class Evaluation:
    """What to measure, and what is known to be true.

    Args:
        threshold: τ, the importance above which a component counts as needed.
        identity: sites where every input feature should have a component of its own.
        dense: sites where k components should serve all features together, with their k.
        groups: named sums of L0 over sites, each an fnmatch pattern of site names.
        ladder: numbers of ascents at which a fresh adversary is scored, on the first rows of the first batch.
        divergence: how outputs are compared.
    """

    threshold: float = 0.1
    identity: tuple[str, ...] = ()
    dense: dict[str, int] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    ladder: tuple[int, ...] = (20, 40, 80, 160)
    divergence: str = "mse"


@dataclass
class Totals:
    """Sums over validation batches, ready to be added up across devices."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0) + value.detach().double()

    def mean(self, name: str) -> Tensor:
        return self.sums[name] / self.sums["positions"]


def count(model: ComponentModel, run: Pass, settings: Evaluation, totals: Totals) -> None:
    """Adds one validation batch to the totals."""
    importances = run.importances.lower
    positions = next(iter(importances.values()))[..., 0].numel()
    totals.add("positions", torch.tensor(positions, device=run.batch.device))
    for site, g in importances.items():
        flat = g.flatten(0, -2)
        totals.add(f"fired/{site}", firings(flat, settings.threshold).sum(0))
        totals.add(f"importance/{site}", flat.sum(0))
        totals.add(f"histogram/{site}", torch.histc(flat.float(), BINS, 0, 1))
    compare = DIVERGENCES[settings.divergence]
    outputs = masked_outputs(model, run.batch, run.clean, importances, run.generator, settings.threshold)
    for source, output in outputs.items():
        totals.add(f"output/{source}", compare(output, run.clean.output) * positions)
        totals.add(f"task/{source}", _task(model, run.batch, output) * positions)
    totals.add("task/target", _task(model, run.batch, run.clean.output) * positions)
    for site, error in hidden_errors(model, run).items():
        totals.add(f"hidden/{site}", error * positions)


def _task(model: ComponentModel, batch: Tensor, output: Tensor) -> Tensor:
    """The target's own loss of an output: the cross-entropy of a language model, a toy's squared error."""
    return model.target.score(output, batch)  # pyright: ignore[reportCallIssue]


def hidden_errors(model: ComponentModel, run: Pass) -> dict[str, Tensor]:
    """Relative squared error of every site's input inside the CI-masked model."""
    seen: dict[str, Tensor] = {}
    model.masked(run.batch, run.masks("ci", 0, 0.0), seen=seen)
    errors = {}
    for site, x in run.clean.inputs.items():
        if x.is_floating_point():
            errors[site] = (seen[site] - x).square().sum() / x.square().sum().clamp(min=1e-30)
    return errors


def adversarial_ladder(model: ComponentModel, run: Pass, settings: Evaluation) -> dict[int, Tensor]:
    """How badly a fresh adversary with this many steps can hurt the output (one vector of sources for the batch)."""
    compare, scores = DIVERGENCES[settings.divergence], {}
    fixed = {name: g.detach() for name, g in run.importances.lower.items()}
    (route,) = draw_routes("all", fixed, None)

    def loss(sources) -> Tensor:
        masks = routed(masks_from_sources(fixed, sources, model.delta), route)
        return compare(model.masked(run.batch, masks, run.clean, detach=True), run.clean.output)

    generator, sources, done = torch.Generator(run.batch.device).manual_seed(0), None, 0
    for steps in sorted(settings.ladder):  # every rung goes on from the one below
        sources = pgd_sources(Adversary(steps=steps - done), fixed, loss, generator, sources)
        scores[steps], done = loss(sources).detach(), steps
    return scores


def figures_of(model: ComponentModel, totals: Totals, settings: Evaluation) -> dict[str, float | int]:
    """The scalar figures of section E from summed totals.

    A component is alive if some input needs it and it is more than a remnant.
    """
    found: dict[str, float | int] = {}
    sites, divergence = list(model.sites), settings.divergence
    for site in sites:
        large = sizeable(model[site].V, model[site].U)
        found[f"l0/{site}"] = float(totals.mean(f"fired/{site}").sum())
        found[f"alive/{site}"] = int(((totals.sums[f"fired/{site}"] > 0) & large).sum())
        found[f"nonzero/{site}"] = int(large.sum())
        if f"hidden/{site}" in totals.sums:
            found[f"hidden/{site}"] = float(totals.mean(f"hidden/{site}"))
    for group, pattern in settings.groups.items():
        found[f"l0/{group}"] = sum(found[f"l0/{site}"] for site in sites if fnmatchcase(site, pattern))
    nothing = float(totals.mean("output/zeros"))
    for source in MASKINGS:
        value = float(totals.mean(f"output/{source}"))
        found[f"{divergence}/{source}"] = value
        found[f"recovered/{source}"] = 1 - value / nothing if nothing > 0 else 0.0
        found[f"task_difference/{source}"] = float(totals.mean(f"task/{source}") - totals.mean("task/target"))
    found["task/target"] = float(totals.mean("task/target"))
    return found


class LoneFeatures(NamedTuple):
    """What each site sees, and finds important, when every feature is fed alone at 0.75."""

    inputs: dict[str, Float[Tensor, "features d_in"]]
    importances: dict[str, Float[Tensor, "features C"]]


def lone_features(model: ComponentModel, n_features: int) -> LoneFeatures:
    """Feeds each feature alone: what the truth of toy models is judged by."""
    parameter = next(model.parameters())
    clean = model.clean(PROBE * torch.eye(n_features, dtype=parameter.dtype, device=parameter.device))
    return LoneFeatures(clean.inputs, model.importances(clean).lower)


def truth(model: ComponentModel, alone: LoneFeatures, settings: Evaluation) -> dict[str, float | int]:
    """How near a model on vectors comes to its known mechanism: MMCS, ML2R, identity and dense error.

    A site's columns are taken along the features as they reach it: for the first map of a TMS, the columns of W.
    """
    found: dict[str, float | int] = {}
    for name in settings.identity:
        X = alone.inputs[name] / PROBE
        cosine, ratio = column_match(model.sites[name].weight @ X.T, X @ model[name].V, model[name].U)
        found[f"mmcs/{name}"], found[f"ml2r/{name}"] = float(cosine), float(ratio)
        found[f"identity_error/{name}"] = identity_error(alone.importances[name])
    for name, k in settings.dense.items():
        found[f"dense_error/{name}"] = dense_error(alone.importances[name], k)
    return found


def counts(figure: str) -> bool:
    """Whether a figure is a number of things."""
    return figure.split("/")[0] in ("alive", "nonzero", "identity_error", "dense_error", "features")


def verdict(found: Mapping[str, float | int], settings: Evaluation, n_features: int) -> str | None:
    """Why a decomposition with known truth has ended in a local minimum, or None where it has not."""
    wrong = [
        f"{name}: {found[f'alive/{name}']:.0f} components for {n_features} features, identity error "
        f"{found[f'identity_error/{name}']:.0f}"
        for name in settings.identity
        if found[f"identity_error/{name}"] or found[f"alive/{name}"] != n_features
    ]
    wrong += [
        f"{name}: {found[f'alive/{name}']:.0f} components instead of {k}, dense error "
        f"{found[f'dense_error/{name}']:.0f}"
        for name, k in settings.dense.items()
        if found[f"dense_error/{name}"] or found[f"alive/{name}"] != k
    ]
    return "; ".join(wrong) or None
