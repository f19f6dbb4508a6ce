"""Warnings when a decomposition starts to collapse: the observation, the step, what to try."""

import logging
import math
from collections import deque
from collections.abc import Mapping
from statistics import fmean, median
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

log = logging.getLogger(__name__)

EXPLODED = 100.0
"""A gradient norm has exploded if it exceeds this multiple of its running median."""
REMEMBERED, ENOUGH = 100, 10  # maximum and minimum number of gradient norms in a running median
CLIFF, COST = 0.5, 0.1
"""Components die all at once if, between two evaluations, the number of alive components falls
below the first share and the share recovered falls by more than the second.
"""
IDLE, POINTLESS = 0.02, 0.05
"""Importances are nearly all zero if the share of components in use is below the first number and
the share that they recover is below the second.
"""
WEAKER = 10.0
"""The training's adversary is too weak if a fresh one does more than this multiple of its harm."""


class CollapseMonitor(Callback):
    """Warns of exploding gradients, dying components, zero importances and weak adversaries.

    It reads the values that are logged anyway, every `log_every` steps and at every evaluation.
    Each problem is reported once until it is over.
    """

    def __init__(self):
        self._norms: deque[float] = deque(maxlen=REMEMBERED)
        self._exploded = False
        self._soft = False
        self._seen = -1  # the last logged step
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
        warning = self.gradient(step, values.get("gradient_norm/importance"))
        for name in adversarial(pl_module):
            loss = values.get(f"reconstruction/{name}")
            if loss is not None:
                self._attacks.setdefault(name, []).append(loss)
        self._warn(trainer, warning)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        figures = getattr(pl_module, "figures", {})
        step = trainer.global_step
        fresh = {name: value for name, value in figures.items() if name.startswith("pgd/")}
        warnings = (
            self.alive(step, figures),
            self.in_use(step, figures),
            self.adversary(step, fresh),
        )
        for warning in warnings:
            self._warn(trainer, warning)

    def _warn(self, trainer: Trainer, warning: str | None) -> None:
        if warning and trainer.is_global_zero:
            log.warning("%s", warning)

    # ---- the checks, on plain numbers ------------------------------------------------------------

    def gradient(self, step: int, norm: float | None) -> str | None:
        """Return a warning if the gradient norm of the importance functions jumps up."""
        if norm is None:
            return None
        usual = 0.0
        if len(self._norms) >= ENOUGH:
            usual = median(self._norms)
        far_above = usual > 0 and norm > EXPLODED * usual
        exploded = far_above or not math.isfinite(norm)
        news = exploded and not self._exploded
        self._exploded = exploded
        if math.isfinite(norm):
            self._norms.append(norm)
        if not news:
            return None
        bound = max(usual, 1e-6)
        return (
            f"step {step}: importance gradients explode: norm {norm:.2g}, the median of the last "
            f"{len(self._norms)} is {usual:.2g}; try optimizer.clip_importance {bound:.1g}, or a "
            "lower optimizer.importance_lr"
        )

    def alive(self, step: int, figures: Mapping[str, float | int]) -> str | None:
        """Return a warning if many components died at once and the output suffers.

        A site that has lost all its components is reported, too.
        """
        before = self._before
        self._before = dict(figures)
        then = 0
        now = 0
        dead = set[str]()
        for site in _sites(figures):
            name = f"alive/{site}"
            count = figures[name]
            if count == 0:
                dead.add(site)
            if name in before:
                then += before[name]
                now += count
        newly_dead = sorted(dead - self._dead)
        self._dead = dead
        recovered_before = before.get("recovered/ci", 0.0)
        recovered = figures.get("recovered/ci", 0.0)
        lost = recovered_before - recovered
        remedy = (
            "try a lower coefficient of minimality, or a ramp of it (losses.minimality.ramp 0.1)"
        )
        if now < CLIFF * then and lost > COST:
            return (
                f"step {step}: components die all at once: {then:.0f} alive at the evaluation "
                f"before, now {now:.0f}, and the share recovered under CI masks fell by "
                f"{lost:.2f}; {remedy}"
            )
        if newly_dead:
            sites = ", ".join(newly_dead)
            return f"step {step}: no component of {sites} is alive; {remedy}"
        return None

    def in_use(self, step: int, figures: Mapping[str, float | int]) -> str | None:
        """Return a warning if importances are nearly all zero and recover almost nothing."""
        used = 0.0
        total = 0
        for site in _sites(figures):
            used += figures.get(f"l0/{site}", 0.0)
            total += figures.get(f"nonzero/{site}", 0)
        recovered = figures.get("recovered/ci", 0.0)  # absent if zero masks cost nothing
        idle = used < IDLE * total and recovered < POINTLESS
        news = idle and not self._idle
        self._idle = idle
        if not news:
            return None
        return (
            f"step {step}: importances are nearly all zero: {used:.2g} of {total:.0f} components "
            f"are used and recover {max(recovered, 0.0):.0%} of the output; try a lower "
            "losses.minimality.coeff, or a higher optimizer.importance_lr"
        )

    def adversary(self, step: int, fresh: Mapping[str, float]) -> str | None:
        """Return a warning if the training's adversaries do far less harm than a fresh one.

        Args:
            step: the step of the evaluation.
            fresh: harm of fresh adversaries, as `pgd/<ascents>`; the one with most ascents counts.
        """
        attacks = self._attacks
        self._attacks = {}
        harm = {name: fmean(losses) for name, losses in attacks.items() if losses}
        if not harm or not fresh:
            return None
        strongest = max(fresh, key=lambda figure: int(figure.removeprefix("pgd/")))
        name = max(harm, key=lambda name: harm[name])
        soft = fresh[strongest] > WEAKER * harm[name]
        news = soft and not self._soft
        self._soft = soft
        if not news:
            return None
        return (
            f"step {step}: the training's adversary is too weak: reconstruction '{name}' is "
            f"{harm[name]:.2g}, under a fresh one ({strongest}) {fresh[strongest]:.2g}; try more "
            "ascents, a larger step_size, or a higher coefficient"
        )

    # ---- checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "norms": list(self._norms),
            "warned": [self._exploded, self._soft],
            "seen": self._seen,
            "before": self._before,
            "attacks": self._attacks,
            "idle": self._idle,
            "dead": sorted(self._dead),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._norms.extend(state_dict["norms"])
        self._exploded, self._soft = state_dict["warned"]
        self._seen = state_dict["seen"]
        self._before = state_dict["before"]
        self._attacks = state_dict["attacks"]
        self._idle = state_dict.get("idle", False)
        self._dead = set(state_dict.get("dead", ()))


def _sites(figures: Mapping[str, float | int]) -> list[str]:
    """Return the sites that figures of an evaluation are about."""
    prefix = "alive/"
    return [name.removeprefix(prefix) for name in figures if name.startswith(prefix)]


def adversarial(module: LightningModule) -> list[str]:
    """Return the names of a module's adversarial reconstructions that an evaluation can judge.

    These use the divergence of the evaluation.
    """
    losses = getattr(module, "losses", None)
    evaluation = getattr(module, "evaluation", None)
    if losses is None or evaluation is None:
        return []
    names = []
    for name, term in losses.reconstruction.items():
        is_adversarial = term.source in ("pgd", "persistent_pgd")
        if is_adversarial and term.divergence == evaluation.divergence:
            names.append(name)
    return names
