"""Signals during Lightning's work: our handlers replace Lightning's, on all devices.

Lightning's handler of SIGTERM ends the command with exit code 0 and without a message, and
communicates with other devices from within the handler.
"""

import contextlib
import subprocess
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from spd_lightning import stopping

GRACE = 60.0
"""Maximum seconds in which the processes of further devices save and end."""


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
        stopping.check()  # in case a library has caught the handler's exception

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Pass a signal on to the processes that this one has started, and wait for them."""
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
