"""Signs that a decomposition is collapsing, said as soon as they show: what was seen, at which
step, what to try.
"""

import logging
import math
from collections import deque
from collections.abc import Mapping
from statistics import fmean, median
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

log = logging.getLogger(__name__)

EXPLODED = 100.0
"""How many times its running median a gradient norm must be to count as exploded."""
REMEMBERED, ENOUGH = 100, 10  # gradient norms a running median is taken of: at most, at least
CLIFF, COST = 0.5, 0.1
"""The share of alive components that must be left, and the share recovered that may be lost,
between evaluations.
"""
IDLE, POINTLESS = 0.02, 0.05
"""The share of components in use, and the share recovered by them, below which importances count as
nearly all zero.
"""
WEAKER = 10.0
"""How many times more harm than the training's own adversary a fresh one may do."""


class CollapseMonitor(Callback):
    """Warns of exploding gradients, dying components, importances that are all zero, and an
    adversary gone soft.

    It looks at what is logged anyway, every `log_every` steps and at every evaluation, and says
    each thing once until it is over.
    """

    def __init__(self):
        self._norms: deque[float] = deque(maxlen=REMEMBERED)
        self._exploded, self._soft, self._seen = False, False, -1
        self._idle = False
        self._dead = set[str]()
        self._before: dict[str, float | int] = {}
        self._attacks: dict[str, list[float]] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        step, values = getattr(pl_module, "recorded", (-1, {}))
        if step <= self._seen:
            return
        self._seen = step
        told = self.gradient(step, values.get("gradient_norm/importance"))
        for name in adversarial(pl_module):
            if f"reconstruction/{name}" in values:
                self._attacks.setdefault(name, []).append(values[f"reconstruction/{name}"])
        self._tell(trainer, told)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        figures = getattr(pl_module, "figures", {})
        step = trainer.global_step
        fresh = {n: v for n, v in figures.items() if n.startswith("pgd/")}
        self._tell(trainer, self.alive(step, figures))
        self._tell(trainer, self.in_use(step, figures))
        self._tell(trainer, self.adversary(step, fresh))

    def _tell(self, trainer: Trainer, told: str | None) -> None:
        if told and trainer.is_global_zero:
            log.warning("%s", told)

    # ---- what is judged, on plain numbers --------------------------------------------------------

    def gradient(self, step: int, norm: float | None) -> str | None:
        """Whether the gradient of the importance functions is far above what it has been."""
        if norm is None:
            return None
        usual = median(self._norms) if len(self._norms) >= ENOUGH else 0.0
        exploded = not math.isfinite(norm) or (usual > 0 and norm > EXPLODED * usual)
        news = exploded and not self._exploded
        self._exploded = exploded
        if math.isfinite(norm):
            self._norms.append(norm)
        if not news:
            return None
        return (
            f"step {step}: importance gradients explode: norm {norm:.2g}, the median of the last "
            f"{len(self._norms)} "
            f"is {usual:.2g}; try optimizer.clip_importance {max(usual, 1e-6):.1g}, or a lower "
            "optimizer.importance_lr"
        )

    def alive(self, step: int, figures: Mapping[str, float | int]) -> str | None:
        """Whether components have died all at once, to the harm of the output, or a site has lost
        all of its own.
        """
        before = self._before
        self._before = dict(figures)
        sites = [name for name in figures if name.startswith("alive/") and name in before]
        then = sum(before[name] for name in sites)
        now = sum(figures[name] for name in sites)
        lost = before.get("recovered/ci", 0.0) - figures.get("recovered/ci", 0.0)
        dead = {
            name.removeprefix("alive/")
            for name in figures
            if name.startswith("alive/") and figures[name] == 0
        }
        gone = sorted(dead - self._dead)
        self._dead = dead
        remedy = (
            "try a lower coefficient of minimality, or a ramp of it (losses.minimality.ramp 0.1)"
        )
        if now < CLIFF * then and lost > COST:
            return (
                f"step {step}: components die all at once: {then:.0f} alive at the evaluation "
                f"before, now {now:.0f}, "
                f"and the share recovered under CI masks fell by {lost:.2f}; {remedy}"
            )
        if gone:
            return f"step {step}: no component of {', '.join(gone)} is alive; {remedy}"
        return None

    def in_use(self, step: int, figures: Mapping[str, float | int]) -> str | None:
        """Return a warning if importances are nearly all zero, and masks of them no better than
        zeros.
        """
        names = [name.removeprefix("alive/") for name in figures if name.startswith("alive/")]
        used = sum(figures.get(f"l0/{name}", 0.0) for name in names)
        there = sum(figures.get(f"nonzero/{name}", 0) for name in names)
        recovered = figures.get("recovered/ci", 0.0)  # absent if zero masks cost nothing
        idle = used < IDLE * there and recovered < POINTLESS
        news = idle and not self._idle
        self._idle = idle
        if not news:
            return None
        return (
            f"step {step}: importances are nearly all zero: {used:.2g} of {there:.0f} components "
            "are used and recover "
            f"{max(recovered, 0.0):.0%} of the output; try a lower losses.minimality.coeff, or a "
            "higher "
            "optimizer.importance_lr"
        )

    def adversary(self, step: int, fresh: Mapping[str, float]) -> str | None:
        """Whether the training's adversaries do far less harm than a fresh one does with the most
        ascents.
        """
        attacks = self._attacks
        self._attacks = {}
        own = {name: fmean(values) for name, values in attacks.items() if values}
        if not own or not fresh:
            return None
        worst = max(fresh, key=lambda figure: int(figure.removeprefix("pgd/")))
        name = max(own, key=lambda name: own[name])
        soft = fresh[worst] > WEAKER * own[name]
        news = soft and not self._soft
        self._soft = soft
        if not news:
            return None
        return (
            f"step {step}: the training's adversary has gone soft: reconstruction '{name}' is "
            f"{own[name]:.2g}, under a "
            f"fresh one ({worst}) {fresh[worst]:.2g}; try more ascents, a larger step_size, or a "
            "higher coefficient"
        )

    # ---- a resumed training goes on watching -----------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "norms": list(self._norms),
            "told": [self._exploded, self._soft],
            "seen": self._seen,
            "before": self._before,
            "attacks": self._attacks,
            "idle": self._idle,
            "dead": sorted(self._dead),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._norms.extend(state_dict["norms"])
        self._exploded, self._soft = state_dict["told"]
        self._seen = state_dict["seen"]
        self._before = state_dict["before"]
        self._attacks = state_dict["attacks"]
        self._idle = state_dict.get("idle", False)
        self._dead = set(state_dict.get("dead", ()))


def adversarial(module: LightningModule) -> list[str]:
    """The reconstructions of a decomposition that an adversary makes, and that are compared as its
    evaluation is.
    """
    losses = getattr(module, "losses", None)
    evaluation = getattr(module, "evaluation", None)
    if losses is None or evaluation is None:
        return []
    return [
        name
        for name, term in losses.reconstruction.items()
        if term.source in ("pgd", "persistent_pgd") and term.divergence == evaluation.divergence
    ]
