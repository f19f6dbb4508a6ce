"""Learning rates over training, as pure functions of the step: nothing to save, nothing to
restore.
"""

import math
from dataclasses import dataclass
from typing import Literal

from spd_lightning.errors import check_range


@dataclass(frozen=True)
class Schedule:
    """How a learning rate moves over training.

    Args:
        kind: constant, linear or cosine, from the full rate to its final fraction.
        warmup: updates over which the rate first rises linearly, from 1/warmup of its full value.
        hold: fraction of training that has passed before the rate begins to fall.
        final: fraction of the full rate that the last update uses.
    """

    kind: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 0
    hold: float = 0.0
    final: float = 0.0

    def __post_init__(self):
        check_range("schedule", least=0, whole=True, warmup=self.warmup)
        check_range("schedule", least=0, most=1, hold=self.hold, final=self.final)

    def factor(self, step: int, steps: int) -> float:
        """The share of the full rate that update `step` of `steps` uses (both counted from 0;
        L7).
        """
        if step < self.warmup:
            return (step + 1) / self.warmup
        begin = max(self.warmup, self.hold * (steps - 1))
        fall = steps - 1 - begin
        progress = max(0.0, step - begin) / fall if fall > 0 else 0.0
        match self.kind:
            case "constant":
                return 1.0
            case "linear":
                return 1 + (self.final - 1) * progress
            case "cosine":
                return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))
