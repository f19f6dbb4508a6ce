"""Evaluation of a decomposition: sums over validation batches, and the figures of section E.

Rows of a batch (sequences or vectors) are independent; positions of a sequence are not. Standard
errors (`se/<figure>`) are therefore taken over rows. All sums are additive, so a figure does not
depend on the batch size or the number of devices.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lightning.decomposition.divergences import ROW_DIVERGENCES
from spd_lightning.decomposition.metrics import (
    MASKINGS,
    DeviceShare,
    firings,
    masked_outputs,
    sizeable,
)
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.decomposition.reconstruction import LossContext
from spd_lightning.errors import BadInput, check_range, nearest

BINS = 50
COUNTS = ("alive", "nonzero", "identity_error", "dense_error", "features")
"""Kinds of figures that are counts."""


@dataclass(frozen=True)
class Evaluation:
    """The figures to measure, and the ground truth to compare with.

    Args:
        threshold: τ, the importance above which a component counts as needed.
        identity: sites where each input feature should have its own component.
        dense: sites where k components together should serve all features, with their k.
        groups: sums of L0 over sites by name, each with an fnmatch pattern of site names.
        pgd_steps: numbers of ascents at which a fresh adversary is scored, on the first rows of the
            first batch.
        pgd_rows: number of these rows, on all devices together; 512 positions' worth if omitted.
        restarts: number of adversaries with different starts; the worst of them is reported.
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
            hint = nearest(self.divergence, ROW_DIVERGENCES)
            raise BadInput(f"evaluation: divergence '{self.divergence}'; {hint}")
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
    """Sums over validation batches."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, value: Tensor) -> None:
        """Add to a sum, in float64."""
        total = self.sums.get(name, 0)
        self.sums[name] = total + value.detach().double()

    def add_rows(self, name: str, values: Float[Tensor, " batch"]) -> None:
        """Add one value per row, and its square for the standard error."""
        values = values.double()
        self.add(name, values.sum())
        self.add(f"squares/{name}", values.square().sum())

    def mean(self, name: str) -> Tensor:
        """Return the mean over positions."""
        positions = self.sums["positions"]
        return self.sums[name] / positions

    def row_mean(self, name: str) -> float:
        """Return the mean over rows."""
        rows = self.sums["rows"]
        mean = self.sums[name] / rows
        return float(mean)

    def standard_error(self, name: str) -> float | None:
        """Return the standard error of the mean over rows; None for a single row."""
        rows = float(self.sums["rows"])
        if rows < 2:
            return None
        squares = float(self.sums[f"squares/{name}"])
        mean = self.row_mean(name)
        variance = (squares - rows * mean**2) / (rows - 1)
        variance = max(variance, 0.0)
        return math.sqrt(variance / rows)

    def stated(self, name: str, figure: str) -> dict[str, float]:
        """Return a mean over rows as a figure of this name, with its standard error."""
        figures = {figure: self.row_mean(name)}
        error = self.standard_error(name)
        if error is not None:
            figures[f"se/{figure}"] = error
        return figures

    def over_devices(self) -> "Totals":
        """Return the sums over all devices, with a single exchange."""
        distributed = torch.distributed
        if not (self.sums and distributed.is_available() and distributed.is_initialized()):
            return self
        values = list(self.sums.values())
        flat = torch.cat([value.flatten() for value in values])
        distributed.all_reduce(flat)
        pieces = flat.split([value.numel() for value in values])
        sums = {}
        for (name, value), piece in zip(self.sums.items(), pieces, strict=True):
            sums[name] = piece.view_as(value)
        return Totals(sums)


def count(
    model: ComponentModel,
    run: LossContext,
    settings: Evaluation,
    totals: Totals,
    share: DeviceShare = DeviceShare(),  # noqa: B008  # a constant
) -> None:
    """Add one validation batch, or a device's part of it, to the totals."""
    importances = run.importances.lower
    _count_importances(importances, settings, totals)
    compare = ROW_DIVERGENCES[settings.divergence]
    clean_output = run.clean.output
    clean_loss = _task(model, run.batch, clean_output)
    totals.add_rows("task/target", clean_loss)
    outputs = masked_outputs(
        model, run.batch, run.clean, importances, run.generator, settings.threshold, share
    )
    for masking, output in outputs:
        totals.add_rows(f"divergence/{masking}", compare(output, clean_output))
        loss = _task(model, run.batch, output)
        totals.add_rows(f"task_difference/{masking}", loss - clean_loss)
    for site, (error, size) in hidden_squares(model, run).items():
        totals.add(f"hidden_error/{site}", error)
        totals.add(f"hidden_size/{site}", size)


def _count_importances(
    importances: Mapping[str, Tensor], settings: Evaluation, totals: Totals
) -> None:
    """Add the importances of a batch to the totals."""
    first = next(iter(importances.values()))
    totals.add("rows", first.new_tensor(len(first)))
    totals.add("positions", first.new_tensor(first[..., 0].numel()))
    l0 = dict[str, Tensor]()  # by site, for each row: needed components per position
    for site, g in importances.items():
        fired = firings(g, settings.threshold)  # [batch, (pos,) C]
        totals.add(f"fired/{site}", fired.flatten(0, -2).sum(0))
        totals.add(f"importance/{site}", g.flatten(0, -2).sum(0))
        histogram = torch.histc(g.flatten().float(), BINS, 0, 1)
        totals.add(f"histogram/{site}", histogram)
        needed = fired.sum(-1).double()  # [batch] or [batch, pos]
        l0[site] = needed.flatten(1).mean(1) if g.ndim > 2 else needed
        totals.add_rows(f"l0/{site}", l0[site])
    for group, pattern in settings.groups.items():
        members = [value for site, value in l0.items() if fnmatchcase(site, pattern)]
        if members:
            total = torch.stack(members).sum(0)
        else:
            total = 0 * next(iter(l0.values()))
        totals.add_rows(f"l0/{group}", total)


def _task(model: ComponentModel, batch: Tensor, output: Tensor) -> Float[Tensor, " batch"]:
    """Return the target's training loss of each row's output.

    It is the cross-entropy of a language model and the squared error of a toy.
    """

    def loss_of_row(row: Tensor, inputs: Tensor) -> Tensor:
        return model.target.score(row[None], inputs[None])  # pyright: ignore[reportCallIssue]

    if batch.is_floating_point():
        return torch.vmap(loss_of_row)(output, batch)
    pairs = zip(output, batch, strict=True)  # a language model has few rows, but large ones
    return torch.stack([loss_of_row(*pair) for pair in pairs])


def hidden_squares(model: ComponentModel, run: LossContext) -> dict[str, tuple[Tensor, Tensor]]:
    """Return how far the inputs of sites move in the CI-masked model.

    Returns:
        By site: the squared error of its input, and the square of its clean input.
    """
    seen: dict[str, Tensor] = {}
    model.masked(run.batch, run.masks("ci", 0, 0.0), seen=seen)
    squares = {}
    for site, x in run.clean.inputs.items():
        if x.is_floating_point():
            error = (seen[site] - x).double().square().sum()
            size = x.double().square().sum()
            squares[site] = error, size
    return squares


# ---- figures -------------------------------------------------------------------------------------


def figures_of(
    model: ComponentModel, totals: Totals, settings: Evaluation
) -> dict[str, float | int]:
    """Compute the scalar figures of section E from totals.

    A component is alive if an input needs it and its weights are not negligible.
    """
    figures: dict[str, float | int] = {}
    sums = totals.sums
    for site in model.sites:
        large = sizeable(model[site].V, model[site].U)  # [C]
        fired = sums[f"fired/{site}"] > 0  # [C]
        figures |= totals.stated(f"l0/{site}", f"l0/{site}")
        figures[f"alive/{site}"] = int((fired & large).sum())
        figures[f"nonzero/{site}"] = int(large.sum())
        if f"hidden_size/{site}" in sums:
            error = sums[f"hidden_error/{site}"]
            size = sums[f"hidden_size/{site}"].clamp(min=1e-30)
            figures[f"hidden/{site}"] = float(error / size)
    for group in settings.groups:
        figures |= totals.stated(f"l0/{group}", f"l0/{group}")
    for masking in MASKINGS:
        figures |= totals.stated(f"divergence/{masking}", f"{settings.divergence}/{masking}")
        figures |= _recovered(totals, "divergence", masking, "recovered")
        figures |= totals.stated(f"task_difference/{masking}", f"task_difference/{masking}")
        if settings.divergence == "kl":  # outputs are logits, and the task loss a cross-entropy
            figures |= _recovered(totals, "task_difference", masking, "ce_recovered")
    return figures | totals.stated("task/target", "task/target")


def _recovered(totals: Totals, measure: str, masking: str, name: str) -> dict[str, float]:
    """Return the share of the cost of masking everything that these masks avoid.

    The result is empty if masking everything costs nothing, or even helps.
    """
    full_cost = totals.row_mean(f"{measure}/zeros")
    if not full_cost > 0:
        return {}
    cost = totals.row_mean(f"{measure}/{masking}")
    return {f"{name}/{masking}": 1 - cost / full_cost}


def counts(figure: str) -> bool:
    """Return whether a figure is a count."""
    kind = figure.split("/")[0]
    return kind in COUNTS


def with_errors(figures: Mapping[str, float | int]) -> dict[str, str]:
    """Format figures for people, such as `0.123 ± 0.004` if a standard error is known."""
    texts = {}
    for name, value in figures.items():
        if not name.startswith("se/"):
            error = figures.get(f"se/{name}")
            texts[name] = uncertain(value, error)
    return texts


def uncertain(value: float | int, error: float | None) -> str:
    """Format a value to its last certain digit; to four digits if its error is unknown."""
    if error is None or not error > 0 or not math.isfinite(error):
        return str(value) if isinstance(value, int) else f"{value:.4g}"
    digits = -math.floor(math.log10(error))
    if f"{error:e}".startswith("1"):
        digits += 1  # 0.0014 rather than 0.001
    if digits > 6 or digits < -3:
        return f"{value:.4g} ± {error:.1g}"
    places = max(0, digits)
    value = round(value, digits)
    error = round(error, digits)
    return f"{value:.{places}f} ± {error:.{places}f}"
