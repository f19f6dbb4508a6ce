"""Signals while Lightning is at work: its own handlers are put aside, and devices' processes stop
together.

Lightning notes a SIGTERM, ends without a word and with exit code 0, and talks to other devices from
within the handler.
"""

import contextlib
import subprocess
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from spd_lightning import stopping

GRACE = 60.0
"""Seconds that the processes of further devices have to save and end."""


class Interruption(Callback):
    """Handles signals as `stopping` does, in every stage of a trainer."""

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stopping.take_back()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stopping.take_back()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stopping.take_back()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stopping.take_back()

    def on_predict_batch_start(self, *_: Any, **__: Any) -> None:
        stopping.check()  # should a library have swallowed what the handler raised

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Passes a signal on to the processes of further devices that this one has started, and
        waits for them.
        """
        launcher = trainer.strategy.launcher
        if not isinstance(exception, stopping.Stopped) or launcher is None:
            return
        launcher.kill(exception.number)
        for process in getattr(launcher, "procs", ()):
            if isinstance(process, subprocess.Popen):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
            else:
                process.join(GRACE)
