"""A progress bar that counts optimiser steps, whatever a `training_step` holds."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm.auto import tqdm


class Progress(ProgressBar):
    """One line: how far, how fast, how long still, and the loss.

    Args:
        name: what is worked on.
    """

    def __init__(self, name: str = ""):
        super().__init__()
        self.name, self._bar, self._enabled = name, None, True

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def _open(self, what: str, done: int, total: int | None, unit: str) -> None:
        self._close()
        self._bar = tqdm(
            initial=done,
            total=total,
            unit=unit,
            desc=f"{what} {self.name}".strip(),
            disable=not self._enabled,
            dynamic_ncols=True,
            mininterval=0.2,
        )

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open("fit", trainer.global_step, trainer.max_steps, "step")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        if self._bar is not None:
            if "loss" in trainer.progress_bar_metrics:
                self._bar.set_postfix_str(f"loss={trainer.progress_bar_metrics['loss']:.3g}", refresh=False)
            self._bar.update(trainer.global_step - self._bar.n)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._close()

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
