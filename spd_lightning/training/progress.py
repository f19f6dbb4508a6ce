"""Progress bars: of training in optimizer steps, whatever a `training_step` holds; of evaluation;
of other long work.

An evaluation inside a training has a bar of its own below the training's, which says how far a long
batch is, too.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm.auto import tqdm

from spd_lightning.training.multi_step import MultiStepModule

INTERVAL = 0.2  # seconds between two drawings of a bar


class Progress(ProgressBar):
    """One line: how far, how fast, how long still, and the loss.

    Args:
        name: what is worked on.
    """

    def __init__(self, name: str = ""):
        super().__init__()
        self.name, self._enabled = name, True
        self._bar: Any = None  # of the training, or the harvest
        self._evaluation: Any = None
        self._drawn = 0.0  # when the evaluation's bar was drawn last

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def _open(self, what: str, done: int, total: int | None, unit: str) -> None:
        self._close()
        self._bar = self._made(what, done, total, unit)

    def _made(self, what: str, done: int, total: int | None, unit: str, keep: bool = True) -> Any:
        return tqdm(
            initial=done,
            total=total,
            unit=unit,
            desc=f"{what} {self.name}".strip(),
            disable=not self._enabled
            or not (keep or sys.stderr.isatty()),  # a bar that goes is for a terminal
            dynamic_ncols=True,
            mininterval=INTERVAL,
            leave=keep,
        )

    def _close(self) -> None:
        for bar in (self._evaluation, self._bar):
            if bar is not None:
                bar.close()
        self._evaluation = self._bar = None

    @contextmanager
    def stage(self, what: str, unit: str, total: int | None = None) -> Iterator[Any]:
        """A bar for other work, whose `update` is called after every unit of it; it is gone at the
        end.
        """
        bar = self._made(what, 0, total, unit, keep=False)
        try:
            yield bar
        finally:
            bar.close()

    # ---- training --------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open("fit", trainer.global_step, trainer.max_steps, "step")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        if self._bar is not None:
            if "loss" in trainer.progress_bar_metrics:
                self._bar.set_postfix_str(
                    f"loss={trainer.progress_bar_metrics['loss']:.3g}", refresh=False
                )
            self._bar.update(trainer.global_step - self._bar.n)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._close()

    # ---- evaluation, before, inside and after training -------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        counts = (
            trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        )
        total = sum(counts)
        known = int(total) if total != float("inf") else None
        self._evaluation = self._made("evaluate", 0, known, "batch", keep=False)
        if isinstance(pl_module, MultiStepModule):
            pl_module.say = self._say

    def _say(self, what: str) -> None:
        """Shows how far the current batch is, but not more often than bars are drawn."""
        if self._evaluation is not None and time.monotonic() - self._drawn > INTERVAL:
            self._drawn = time.monotonic()
            self._evaluation.set_postfix_str(what)

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        if self._evaluation is not None:
            self._evaluation.set_postfix_str("", refresh=False)
            self._evaluation.update(1)

    def on_validation_end(self, *_: Any, **__: Any) -> None:
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None

    # ---- harvests --------------------------------------------------------------------------------

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches = trainer.num_predict_batches[0]
        self._open("predict", 0, int(batches) if batches != float("inf") else None, "batch")

    def on_predict_batch_end(self, *_: Any, **__: Any) -> None:
        if self._bar is not None:
            self._bar.update(1)

    def on_predict_end(self, *_: Any, **__: Any) -> None:
        self._close()

    def on_exception(self, *_: Any, **__: Any) -> None:
        self._close()
