"""The PGD sweep: the harm that a fresh adversary does, by its number of ascents (section M)."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count

import torch
from torch import Tensor

from spd_lightning.decomposition.adversaries import Adversary, pgd_sources
from spd_lightning.decomposition.divergences import ROW_DIVERGENCES
from spd_lightning.decomposition.masks import Sources, masks_from_sources
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.decomposition.reconstruction import LossContext
from spd_lightning.training.evaluate import Evaluation, Totals

POSITIONS = 512
"""Default number of positions to attack. Attacking a whole batch would take too long."""


def pgd_sweep(
    model: ComponentModel,
    batch: Tensor,
    settings: Evaluation,
    say: Callable[[str], None] = lambda what: None,
) -> dict[str, float]:
    """Return the harm `pgd/<steps>` and its standard error for each number of ascents.

    An adversary has one vector of sources for all rows and devices. With several restarts, they
    start from different sources, and the worst result for each number of ascents is returned.

    Args:
        model: the decomposed model.
        batch: a batch, of which the first rows are attacked.
        settings: numbers of ascents, rows, restarts, and the divergence.
        say: called with the progress after every ascent.
    """
    if not settings.pgd_steps:
        return {}
    n_rows = settings.pgd_rows or _rows_of(batch, POSITIONS)
    rows, total = _first_rows(batch, n_rows)
    run = LossContext.from_batch(model, rows)
    ascents = count(1)
    all_ascents = max(settings.pgd_steps) * settings.restarts

    def report_ascent() -> None:
        ascent = next(ascents)
        say(f"adversary {ascent}/{all_ascents}")

    results = []
    for seed in range(settings.restarts):
        generator = torch.Generator(rows.device)
        generator.manual_seed(seed)
        figures = _climb(model, run, settings, total, generator, report_ascent)
        results.append(figures)
    return worst_of(results, settings.pgd_steps)


def worst_of(results: Sequence[Mapping[str, float]], pgd_steps: Iterable[int]) -> dict[str, float]:
    """Return the harm of the worst restart for each number of ascents, with its standard error.

    Harm that is not a number is the worst: the adversary has found sources that break the model.
    """
    worst: dict[str, float] = {}
    for steps in sorted(pgd_steps):
        figure = f"pgd/{steps}"
        error = f"se/{figure}"
        restart = max(results, key=lambda figures: _badness(figures[figure]))
        worst[figure] = restart[figure]
        if error in restart:
            worst[error] = restart[error]
    return worst


def _badness(harm: float) -> tuple[bool, float]:
    """Return a key that sorts harm, with nan above all numbers."""
    if math.isnan(harm):
        return True, 0.0
    return False, harm


def _climb(
    model: ComponentModel,
    run: LossContext,
    settings: Evaluation,
    total: int,
    generator: torch.Generator,
    report_ascent: Callable[[], None],
) -> dict[str, float]:
    """Return the harm of one adversary for each number of ascents.

    Args:
        model: the decomposed model.
        run: the attacked rows of this device.
        settings: numbers of ascents, and the divergence.
        total: number of attacked rows on all devices.
        generator: draws the initial sources.
        report_ascent: called after every ascent.
    """
    compare = ROW_DIVERGENCES[settings.divergence]
    batch = run.batch
    clean = run.clean
    figures = dict[str, float]()
    importances = {name: g.detach() for name, g in run.importances.lower.items()}

    def harm_by_row(sources: Sources) -> Tensor:
        masks = masks_from_sources(importances, sources, model.delta)
        output = model.masked(batch, masks, clean, detach=True)
        return compare(output, clean.output)  # [batch]

    def harm(sources: Sources) -> Tensor:
        report_ascent()
        by_row = harm_by_row(sources)
        return by_row.sum() / total

    sources = None
    ascents = 0
    for steps in sorted(settings.pgd_steps):  # each number continues the ascent of the previous
        adversary = Adversary(steps=steps - ascents)
        sources = pgd_sources(adversary, importances, harm, generator, sources)
        ascents = steps
        rows = len(batch)
        totals = Totals()
        totals.add("rows", batch.new_tensor(rows))
        totals.add_rows("pgd", harm_by_row(sources))
        totals = totals.over_devices()
        figures |= totals.stated("pgd", f"pgd/{steps}")
    return figures


def _rows_of(batch: Tensor, positions: int) -> int:
    """Return the number of rows that contain this many positions.

    A row of token ids has a position for each; a vector is a single position.
    """
    shape = batch.shape[1:]
    if batch.is_floating_point():
        shape = shape[:-1]  # without the features
    per_row = max(1, shape.numel())
    return math.ceil(positions / per_row)


def _first_rows(batch: Tensor, rows: int) -> tuple[Tensor, int]:
    """Return this device's share of the first rows of the joint batch, and their number."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        first = batch[:rows]
        return first, len(first)
    rank = distributed.get_rank()
    world = distributed.get_world_size()
    parts = [torch.empty_like(batch) for _ in range(world)]
    distributed.all_gather(parts, batch.contiguous())
    joint = torch.cat(parts)
    at_least_one_each = max(rows, world)
    first = joint[:at_least_one_each]
    shares = first.tensor_split(world)
    return shares[rank], len(first)
