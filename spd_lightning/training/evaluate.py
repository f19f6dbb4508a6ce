"""Evaluation of a decomposition: sums over validation batches, and the figures of section E.

Rows of a batch (sequences or vectors) are independent; positions of a sequence are not. Standard
errors (`se/<figure>`) are therefore taken over rows. All sums are additive, so a figure does not
depend on the batch size or the number of devices.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Protocol, runtime_checkable

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
        place = "evaluation"
        check_range(place, least=0, most=1, threshold=self.threshold)
        check_range(place, least=1, whole=True, pgd_steps=self.pgd_steps)
        check_range(place, least=1, whole=True, pgd_rows=self.pgd_rows)
        check_range(place, least=1, whole=True, restarts=self.restarts)
        for site, k in self.dense.items():
            place = f"evaluation.dense, site '{site}'"
            check_range(place, least=1, whole=True, k=k)


# ---- sums ----------------------------------------------------------------------------------------


@dataclass
class Totals:
    """Sums over validation batches."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, value: Tensor) -> None:
        """Add to a sum, in float64."""
        total = self.sums.get(name, 0)
        value = value.detach()
        self.sums[name] = total + value.double()

    def add_rows(self, name: str, values: Float[Tensor, " batch"]) -> None:
        """Add one value per row, and its square for the standard error."""
        values = values.double()
        squares = values.square()
        self.add(name, values.sum())
        self.add(f"squares/{name}", squares.sum())

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
        deviations = squares - rows * mean**2  # Σ (x − mean)² = Σ x² − n mean²
        variance = deviations / (rows - 1)
        variance = max(variance, 0.0)  # rounding can make it negative
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
        if not self.sums:
            return self
        if not (distributed.is_available() and distributed.is_initialized()):
            return self
        flattened = [value.flatten() for value in self.sums.values()]
        sizes = [len(value) for value in flattened]
        joined = torch.cat(flattened)
        distributed.all_reduce(joined)
        parts = joined.split(sizes)
        sums = {}
        for (name, value), part in zip(self.sums.items(), parts, strict=True):
            sums[name] = part.view_as(value)
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
    batch = run.batch
    clean_output = run.clean.output
    clean_loss = _task(model, batch, clean_output)
    totals.add_rows("task/target", clean_loss)
    outputs = masked_outputs(
        model, batch, run.clean, importances, run.generator, settings.threshold, share
    )
    for masking, output in outputs:
        divergence = compare(output, clean_output)
        totals.add_rows(f"divergence/{masking}", divergence)
        loss = _task(model, batch, output)
        totals.add_rows(f"task_difference/{masking}", loss - clean_loss)
    squares = hidden_squares(model, run)
    for site, (error, size) in squares.items():
        totals.add(f"hidden_error/{site}", error)
        totals.add(f"hidden_size/{site}", size)


def _count_importances(
    importances: Mapping[str, Tensor], settings: Evaluation, totals: Totals
) -> None:
    """Add the importances of a batch to the totals."""
    first = next(iter(importances.values()))
    batch, *positions, _ = first.shape
    n_positions = math.prod(positions, start=batch)
    totals.add("rows", first.new_tensor(batch))
    totals.add("positions", first.new_tensor(n_positions))
    l0 = dict[str, Tensor]()  # by site, for each row: needed components per position
    for site, g in importances.items():
        fired = firings(g, settings.threshold)  # [batch, (pos,) C]
        _count_components(site, g, fired, totals)
        l0[site] = _l0_of_rows(fired)
        totals.add_rows(f"l0/{site}", l0[site])
    nothing = 0 * next(iter(l0.values()))  # [batch]
    for group, pattern in settings.groups.items():
        members = [value for site, value in l0.items() if fnmatchcase(site, pattern)]
        total = nothing
        if members:
            total = torch.stack(members).sum(0)
        totals.add_rows(f"l0/{group}", total)


def _count_components(site: str, g: Tensor, fired: Tensor, totals: Totals) -> None:
    """Add the importances of the components of a site, and how often they fired, to the totals."""
    flat_g = g.flatten(0, -2)  # [positions, C]
    flat_fired = fired.flatten(0, -2)  # [positions, C]
    totals.add(f"fired/{site}", flat_fired.sum(0))
    totals.add(f"importance/{site}", flat_g.sum(0))
    entries = g.flatten().float()
    histogram = torch.histc(entries, BINS, 0, 1)
    totals.add(f"histogram/{site}", histogram)


def _l0_of_rows(fired: Tensor) -> Float[Tensor, " batch"]:
    """Return the number of components that fired in each row, averaged over its positions."""
    needed = fired.sum(-1).double()  # [batch] or [batch, pos]
    if needed.ndim == 1:
        return needed
    return needed.flatten(1).mean(1)


@runtime_checkable
class Scored(Protocol):
    """A target with a training loss that can score any output."""

    def score(self, output: Tensor, inputs: Tensor, /) -> Tensor:
        """Return the loss of an output on these inputs."""
        ...


def _task(model: ComponentModel, batch: Tensor, output: Tensor) -> Float[Tensor, " batch"]:
    """Return the target's training loss of each row's output.

    It is the cross-entropy of a language model and the squared error of a toy.
    """

    target = model.target
    assert isinstance(target, Scored)

    def loss_of_row(row: Tensor, inputs: Tensor) -> Tensor:
        outputs = row[None]  # a batch of one row
        return target.score(outputs, inputs[None])

    if batch.is_floating_point():
        loss_of_rows = torch.vmap(loss_of_row)
        return loss_of_rows(output, batch)
    losses = []  # one by one: a language model has few rows, but large ones
    for row, tokens in zip(output, batch, strict=True):
        loss = loss_of_row(row, tokens)
        losses.append(loss)
    return torch.stack(losses)


def hidden_squares(model: ComponentModel, run: LossContext) -> dict[str, tuple[Tensor, Tensor]]:
    """Return how far the inputs of sites move in the CI-masked model.

    Returns:
        By site: the squared error of its input, and the square of its clean input.
    """
    seen: dict[str, Tensor] = {}
    masks = run.masks("ci", 0, 0.0)
    model.masked(run.batch, masks, seen=seen)
    squares = {}
    for site, x in run.clean.inputs.items():
        if x.is_floating_point():
            change = seen[site] - x
            error = _sum_of_squares(change)
            size = _sum_of_squares(x)
            squares[site] = error, size
    return squares


def _sum_of_squares(x: Tensor) -> Float[Tensor, ""]:
    """Return the sum of squares of all entries, in float64."""
    squares = x.double().square()
    return squares.sum()


# ---- figures -------------------------------------------------------------------------------------


def figures_of(
    model: ComponentModel, totals: Totals, settings: Evaluation
) -> dict[str, float | int]:
    """Compute the scalar figures of section E from totals.

    A component is alive if an input needs it and its weights are not negligible.
    """
    figures: dict[str, float | int] = {}
    for site in model.sites:
        figures |= _site_figures(model, totals, site)
    for group in settings.groups:
        figures |= totals.stated(f"l0/{group}", f"l0/{group}")
    divergence = settings.divergence
    for masking in MASKINGS:
        difference = f"task_difference/{masking}"
        figures |= totals.stated(f"divergence/{masking}", f"{divergence}/{masking}")
        figures |= _recovered(totals, "divergence", masking, "recovered")
        figures |= totals.stated(difference, difference)
        if divergence == "kl":  # outputs are logits, and the task loss a cross-entropy
            figures |= _recovered(totals, "task_difference", masking, "ce_recovered")
    figures |= totals.stated("task/target", "task/target")
    return figures


def _site_figures(model: ComponentModel, totals: Totals, site: str) -> dict[str, float | int]:
    """Return the figures of one site."""
    figures: dict[str, float | int] = {}
    sums = totals.sums
    components = model[site]
    large = sizeable(components.V, components.U)  # [C]
    fired = sums[f"fired/{site}"] > 0  # [C]
    alive = fired & large  # [C]
    figures |= totals.stated(f"l0/{site}", f"l0/{site}")
    figures[f"alive/{site}"] = int(alive.sum())
    figures[f"nonzero/{site}"] = int(large.sum())
    if f"hidden_size/{site}" in sums:  # embeddings have none
        error = sums[f"hidden_error/{site}"]
        size = sums[f"hidden_size/{site}"]
        size = size.clamp(min=1e-30)
        figures[f"hidden/{site}"] = float(error / size)
    return figures


def _recovered(totals: Totals, measure: str, masking: str, name: str) -> dict[str, float]:
    """Return the share of the cost of masking everything that these masks avoid.

    The result is empty if masking everything costs nothing, or even helps.
    """
    full_cost = totals.row_mean(f"{measure}/zeros")
    if not full_cost > 0:
        return {}
    cost = totals.row_mean(f"{measure}/{masking}")
    share_lost = cost / full_cost
    return {f"{name}/{masking}": 1 - share_lost}


def counts(figure: str) -> bool:
    """Return whether a figure is a count."""
    kind = figure.split("/")[0]
    return kind in COUNTS
