"""Evaluation of a decomposition over validation batches: sums in, figures of section E out.

Rows of a batch (sequences; vectors) are independent, positions of one sequence are not: standard
errors, `se/<figure>`, are taken over rows. All sums are additive, so that neither batches nor
devices change a figure.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lightning.decomposition.metrics import MASKINGS, Part, firings, masked_outputs, sizeable
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.decomposition.reconstruction import ROW_DIVERGENCES, LossContext
from spd_lightning.errors import BadInput, check_range, nearest

BINS = 50


@dataclass(frozen=True)
class Evaluation:
    """The figures to measure, and the known truth to compare with.

    Args:
        threshold: τ, the importance above which a component counts as needed.
        identity: sites where every input feature should have a component of its own.
        dense: sites where k components should serve all features together, with their k.
        groups: named sums of L0 over sites, each an fnmatch pattern of site names.
        pgd_steps: numbers of ascents at which a fresh adversary is scored, on the first rows of the
            first batch.
        pgd_rows: how many rows that are, on all devices together; as many as make 512 positions
            if omitted.
        restarts: adversaries that restart; each rung states the worst of them.
        divergence: how outputs are compared: mse or kl.
    """

    threshold: float = 0.1
    identity: tuple[str, ...] = ()
    dense: dict[str, int] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    pgd_steps: tuple[int, ...] = (20, 40, 80, 160)
    pgd_rows: int | None = None
    restarts: int = 1
    divergence: str = "mse"

    def __post_init__(self):
        if self.divergence not in ROW_DIVERGENCES:
            raise BadInput(
                f"evaluation: divergence '{self.divergence}'; "
                f"{nearest(self.divergence, ROW_DIVERGENCES)}"
            )
        check_range("evaluation", least=0, most=1, threshold=self.threshold)
        check_range(
            "evaluation", least=1, whole=True, pgd_steps=self.pgd_steps, pgd_rows=self.pgd_rows
        )
        check_range("evaluation", least=1, whole=True, restarts=self.restarts)
        for site, k in self.dense.items():
            check_range(f"evaluation.dense, site '{site}'", least=1, whole=True, k=k)


# ---- sums ----------------------------------------------------------------------------------------


@dataclass
class Totals:
    """Sums over validation batches, ready to be added up across devices."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, value: Tensor) -> None:
        """Adds to a sum, in float64."""
        self.sums[name] = self.sums.get(name, 0) + value.detach().double()

    def add_rows(self, name: str, values: Float[Tensor, " batch"]) -> None:
        """Adds one value a row: their sum, and that of their squares, for the standard error."""
        self.add(name, values.double().sum())
        self.add(f"squares/{name}", values.double().square().sum())

    def mean(self, name: str) -> Tensor:
        """The mean over positions."""
        return self.sums[name] / self.sums["positions"]

    def row_mean(self, name: str) -> float:
        """The mean over rows."""
        return float(self.sums[name] / self.sums["rows"])

    def standard_error(self, name: str) -> float | None:
        """Return the standard error of the mean over rows; None for a single row."""
        rows = float(self.sums["rows"])
        mean = self.row_mean(name)
        if rows < 2:
            return None
        variance = (float(self.sums[f"squares/{name}"]) - rows * mean**2) / (rows - 1)
        return math.sqrt(max(variance, 0.0) / rows)

    def stated(self, name: str, figure: str) -> dict[str, float]:
        """A mean over rows as the figure of that name, with its standard error."""
        error = self.standard_error(name)
        return {figure: self.row_mean(name)} | ({} if error is None else {f"se/{figure}": error})

    def over_devices(self) -> "Totals":
        """The sums of all devices together, in one exchange."""
        if not (
            self.sums and torch.distributed.is_available() and torch.distributed.is_initialized()
        ):
            return self
        flat = torch.cat([value.flatten() for value in self.sums.values()])
        torch.distributed.all_reduce(flat)
        pieces = flat.split([value.numel() for value in self.sums.values()])
        return Totals(
            {n: piece.view_as(v) for (n, v), piece in zip(self.sums.items(), pieces, strict=True)}
        )


def count(
    model: ComponentModel,
    run: LossContext,
    settings: Evaluation,
    totals: Totals,
    part: Part = Part(),  # noqa: B008  # a constant
) -> None:
    """Adds one validation batch, or a device's part of it, to the totals."""
    importances = run.importances.lower
    _count_importances(importances, settings, totals)
    compare = ROW_DIVERGENCES[settings.divergence]
    target = _task(model, run.batch, run.clean.output)
    totals.add_rows("task/target", target)
    for masking, output in masked_outputs(
        model, run.batch, run.clean, importances, run.generator, settings.threshold, part
    ):
        totals.add_rows(f"divergence/{masking}", compare(output, run.clean.output))
        totals.add_rows(f"task_difference/{masking}", _task(model, run.batch, output) - target)
    for site, (error, size) in hidden_squares(model, run).items():
        totals.add(f"hidden_error/{site}", error)
        totals.add(f"hidden_size/{site}", size)


def _count_importances(
    importances: Mapping[str, Tensor], settings: Evaluation, totals: Totals
) -> None:
    first = next(iter(importances.values()))
    totals.add("rows", first.new_tensor(len(first)))
    totals.add("positions", first.new_tensor(first[..., 0].numel()))
    per_row = {}
    for site, g in importances.items():
        fired = firings(g, settings.threshold)
        totals.add(f"fired/{site}", fired.flatten(0, -2).sum(0))
        totals.add(f"importance/{site}", g.flatten(0, -2).sum(0))
        totals.add(f"histogram/{site}", torch.histc(g.flatten().float(), BINS, 0, 1))
        per_row[site] = (
            fired.sum(-1).double().flatten(1).mean(1) if g.ndim > 2 else fired.sum(-1).double()
        )
        totals.add_rows(f"l0/{site}", per_row[site])
    for group, pattern in settings.groups.items():
        held = [value for site, value in per_row.items() if fnmatchcase(site, pattern)]
        totals.add_rows(
            f"l0/{group}", torch.stack(held).sum(0) if held else 0 * next(iter(per_row.values()))
        )


def _task(model: ComponentModel, batch: Tensor, output: Tensor) -> Float[Tensor, " batch"]:
    """The target's own loss of each row's output: the cross-entropy of a language model, a toy's
    squared error.
    """

    def score(row: Tensor, own: Tensor) -> Tensor:
        return model.target.score(row[None], own[None])  # pyright: ignore[reportCallIssue]

    if batch.is_floating_point():
        return torch.vmap(score)(output, batch)
    return torch.stack(
        [score(row, own) for row, own in zip(output, batch, strict=True)]
    )  # few rows, large ones


def hidden_squares(model: ComponentModel, run: LossContext) -> dict[str, tuple[Tensor, Tensor]]:
    """Per site: the squared error of its input inside the CI-masked model, and the square it is
    relative to.
    """
    seen: dict[str, Tensor] = {}
    model.masked(run.batch, run.masks("ci", 0, 0.0), seen=seen)
    inputs = {site: x for site, x in run.clean.inputs.items() if x.is_floating_point()}
    return {
        site: ((seen[site] - x).double().square().sum(), x.double().square().sum())
        for site, x in inputs.items()
    }


# ---- figures -------------------------------------------------------------------------------------


def figures_of(
    model: ComponentModel, totals: Totals, settings: Evaluation
) -> dict[str, float | int]:
    """The scalar figures of section E from summed totals.

    A component is alive if some input needs it and it is more than a remnant.
    """
    found: dict[str, float | int] = {}
    for site in model.sites:
        large = sizeable(model[site].V, model[site].U)
        found |= totals.stated(f"l0/{site}", f"l0/{site}")
        found[f"alive/{site}"] = int(((totals.sums[f"fired/{site}"] > 0) & large).sum())
        found[f"nonzero/{site}"] = int(large.sum())
        if f"hidden_size/{site}" in totals.sums:
            size = totals.sums[f"hidden_size/{site}"].clamp(min=1e-30)
            found[f"hidden/{site}"] = float(totals.sums[f"hidden_error/{site}"] / size)
    for group in settings.groups:
        found |= totals.stated(f"l0/{group}", f"l0/{group}")
    for masking in MASKINGS:
        found |= totals.stated(f"divergence/{masking}", f"{settings.divergence}/{masking}")
        found |= _recovered(totals, "divergence", masking, "recovered")
        found |= totals.stated(f"task_difference/{masking}", f"task_difference/{masking}")
        if (
            settings.divergence == "kl"
        ):  # outputs are logits, so that the task's loss is a cross-entropy
            found |= _recovered(totals, "task_difference", masking, "ce_recovered")
    return found | totals.stated("task/target", "task/target")


def _recovered(totals: Totals, measure: str, masking: str, name: str) -> dict[str, float]:
    """Return the share of the cost of masking everything that these masks avoid.

    There is no such share, and so no figure, if masking everything costs nothing or even helps.
    """
    cost = totals.row_mean(f"{measure}/zeros")
    if not cost > 0:
        return {}
    return {f"{name}/{masking}": 1 - totals.row_mean(f"{measure}/{masking}") / cost}


def counts(figure: str) -> bool:
    """Whether a figure is a number of things."""
    return figure.split("/")[0] in ("alive", "nonzero", "identity_error", "dense_error", "features")


def with_errors(figures: Mapping[str, float | int]) -> dict[str, str]:
    """Figures as people read them, those with a standard error as `0.123 ± 0.004`."""
    return {
        name: uncertain(value, figures.get(f"se/{name}"))
        for name, value in figures.items()
        if not name.startswith("se/")
    }


def uncertain(value: float | int, error: float | None) -> str:
    """A value to the last digit that its standard error leaves certain; to four where it has
    none.
    """
    if error is None or not error > 0 or not math.isfinite(error):
        return str(value) if isinstance(value, int) else f"{value:.4g}"
    digits = -math.floor(math.log10(error))
    digits += f"{error:e}".startswith("1")  # 0.0014 rather than 0.001
    if digits > 6 or digits < -3:
        return f"{value:.4g} ± {error:.1g}"
    return f"{round(value, digits):.{max(0, digits)}f} ± {round(error, digits):.{max(0, digits)}f}"
