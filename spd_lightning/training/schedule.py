"""Learning-rate schedules: pure functions of the step, without state to save."""

import math
from dataclasses import dataclass
from typing import Literal

from spd_lightning.errors import check_range


@dataclass(frozen=True)
class Schedule:
    """The change of a learning rate over training.

    Args:
        kind: constant, linear or cosine, from the peak rate to its final fraction.
        warmup: number of updates over which the rate first rises linearly, from 1/warmup of its
            peak.
        hold: fraction of training after which the rate begins to fall.
        final: fraction of the peak rate at the last update.
    """

    kind: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 0
    hold: float = 0.0
    final: float = 0.0

    def __post_init__(self):
        check_range("schedule", least=0, whole=True, warmup=self.warmup)
        check_range("schedule", least=0, most=1, hold=self.hold, final=self.final)

    def factor(self, step: int, steps: int) -> float:
        """Return the fraction of the peak rate at an update (L7).

        Args:
            step: the update, counted from 0.
            steps: number of updates of the training.
        """
        if step < self.warmup:
            return (step + 1) / self.warmup
        last = steps - 1
        start = max(self.warmup, self.hold * last)
        length = last - start
        progress = max(0.0, step - start) / length if length > 0 else 0.0
        match self.kind:
            case "constant":
                return 1.0
            case "linear":
                return 1 + (self.final - 1) * progress
            case "cosine":
                cosine = math.cos(math.pi * progress)
                return self.final + (1 - self.final) * 0.5 * (1 + cosine)
