"""The PGD ladder: how badly a fresh adversary can hurt the output, by how many ascents it is given
(section M).
"""

from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor

from spd_lightning.decomposition.adversaries import Adversary, pgd_sources
from spd_lightning.decomposition.masks import Sources, masks_from_sources
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.decomposition.reconstruction import ROW_DIVERGENCES, LossContext
from spd_lightning.training.evaluate import Evaluation, Totals

POSITIONS = 512
"""What an adversary gets where the settings do not say: 160 ascents on a whole batch would outlast
all else.
"""


def pgd_sweep(
    model: ComponentModel,
    batch: Tensor,
    settings: Evaluation,
    say: Callable[[str], None] = lambda what: None,
) -> dict[str, float]:
    """`pgd/<steps>` and its standard error for every rung: one vector of sources for all rows and
    devices.

    Several adversaries, where restarts are asked for, start from different sources; each rung
    states the worst.

    say: told after every ascent how far the work is.
    """
    if not settings.pgd_steps:
        return {}
    rows, total = _first_rows(batch, settings.pgd_rows or _rows_of(batch, POSITIONS))
    run = LossContext.from_batch(model, rows)
    worst: dict[str, float] = {}
    ascents = count(1)

    def climbed() -> None:
        say(f"adversary {next(ascents)}/{max(settings.pgd_steps) * settings.restarts}")

    for seed in range(settings.restarts):
        found = _climb(
            model, run, settings, total, torch.Generator(rows.device).manual_seed(seed), climbed
        )
        for steps in sorted(settings.pgd_steps):
            figure = f"pgd/{steps}"
            if not found[figure] <= worst.get(figure, -torch.inf):  # what is not a number is worst
                worst |= {name: found[name] for name in (figure, f"se/{figure}") if name in found}
    return worst


def _climb(
    model: ComponentModel,
    run: LossContext,
    settings: Evaluation,
    total: int,
    generator: torch.Generator,
    climbed: Callable[[], None],
) -> dict[str, float]:
    compare = ROW_DIVERGENCES[settings.divergence]
    found = dict[str, float]()
    fixed = {name: g.detach() for name, g in run.importances.lower.items()}

    def rows(sources: Sources) -> Tensor:
        masks = masks_from_sources(fixed, sources, model.delta)
        return compare(model.masked(run.batch, masks, run.clean, detach=True), run.clean.output)

    def harm(sources: Sources) -> Tensor:
        climbed()
        return rows(sources).sum() / total

    sources, done = None, 0
    for steps in sorted(settings.pgd_steps):  # every rung goes on from the one below
        adversary = Adversary(steps=steps - done)
        sources = pgd_sources(adversary, fixed, harm, generator, sources)
        totals = Totals()
        totals.add("rows", run.batch.new_tensor(len(run.batch)))
        totals.add_rows("pgd", rows(sources))
        found |= totals.over_devices().stated("pgd", f"pgd/{steps}")
        done = steps
    return found


def _rows_of(batch: Tensor, positions: int) -> int:
    """How many rows make so many positions: token ids have one in every place, vectors one each."""
    held = batch.shape[1:-1] if batch.is_floating_point() else batch.shape[1:]
    return -(-positions // max(1, held.numel()))


def _first_rows(batch: Tensor, rows: int) -> tuple[Tensor, int]:
    """This device's share of the first rows of the batch that all devices hold together, and how
    many those are.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return batch[:rows], min(rows, len(batch))
    rank = torch.distributed.get_rank()
    world = torch.distributed.get_world_size()
    parts = [torch.empty_like(batch) for _ in range(world)]
    torch.distributed.all_gather(parts, batch.contiguous())
    first = torch.cat(parts)[: max(rows, world)]  # at least one for each
    return first.tensor_split(world)[rank], len(first)
