"""Progress bars of training (in optimizer steps), evaluation and other long work.

An evaluation during training has a separate bar below that of the training. It also shows the
progress of a long batch.
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

INTERVAL = 0.2  # minimum seconds between two updates of a bar on the screen


class Progress(ProgressBar):
    """A progress bar of one line: progress, speed, remaining time and loss.

    Args:
        name: name of the work.
    """

    def __init__(self, name: str = ""):
        super().__init__()
        self.name = name
        self._enabled = True
        self._bar: Any = None  # of the training or the harvest
        self._evaluation: Any = None  # of the evaluation
        self._drawn = 0.0  # time of the last update of the evaluation's bar

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def _open(self, what: str, done: int, total: int | None, unit: str) -> None:
        self._close()
        self._bar = self._make(what, done, total, unit)

    def _make(self, what: str, done: int, total: int | None, unit: str, keep: bool = True) -> Any:
        visible = keep or sys.stderr.isatty()  # temporary bars make sense in a terminal only
        return tqdm(
            initial=done,
            total=total,
            unit=unit,
            desc=f"{what} {self.name}".strip(),
            disable=not (self._enabled and visible),
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
        """Show a temporary bar for other work; call its `update` after every unit of work."""
        bar = self._make(what, 0, total, unit, keep=False)
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
        if self._bar is None:
            return
        loss = trainer.progress_bar_metrics.get("loss")
        if loss is not None:
            self._bar.set_postfix_str(f"loss={loss:.3g}", refresh=False)
        self._bar.update(trainer.global_step - self._bar.n)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._close()

    # ---- evaluation, before, inside and after training -------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        counts = trainer.num_val_batches
        if trainer.sanity_checking:
            counts = trainer.num_sanity_val_batches
        total = _known(sum(counts))
        self._evaluation = self._make("evaluate", 0, total, "batch", keep=False)
        if isinstance(pl_module, MultiStepModule):
            pl_module.say = self._say

    def _say(self, progress: str) -> None:
        """Show the progress of the current batch, but at most once per interval."""
        if self._evaluation is None:
            return
        now = time.monotonic()
        if now - self._drawn > INTERVAL:
            self._drawn = now
            self._evaluation.set_postfix_str(progress)

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
        total = _known(trainer.num_predict_batches[0])
        self._open("predict", 0, total, "batch")

    def on_predict_batch_end(self, *_: Any, **__: Any) -> None:
        if self._bar is not None:
            self._bar.update(1)

    def on_predict_end(self, *_: Any, **__: Any) -> None:
        self._close()

    def on_exception(self, *_: Any, **__: Any) -> None:
        self._close()


def _known(batches: float | int) -> int | None:
    """Return a number of batches; None if it is infinite."""
    if batches == float("inf"):
        return None
    return int(batches)
