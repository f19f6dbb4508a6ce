"""Checkpoints: everything Lightning needs to resume a training, as safetensors files.

A checkpoint (`checkpoints/last.safetensors`) is a tree of tensors and plain values. The tensors are
the file's own; the rest of the tree is JSON in the file's header.

Not here: the result of a training (`saved`).
"""

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

from spd_lightning import runs, stopping
from spd_lightning.errors import BadInput
from spd_lightning.files import make_folder, sync_folder
from spd_lightning.training.multi_step import MultiStepModule
from spd_lightning.training.tensor_files import read_tensors, write_tensors

log = logging.getLogger(__name__)

LAST = Path("checkpoints") / "last.safetensors"
NEXT = LAST.with_name("next.safetensors")
PREVIOUS = LAST.with_name("previous.safetensors")
"""A checkpoint that is not `last` yet, and the one that was before: where `last` cannot be read,
they are.
"""
SECONDS = 300.0
"""Most seconds between two checkpoints of a training."""
WORTH_KEEPING = 10.0
"""Seconds of training after which a checkpoint is due before an evaluation, or the end: both may
last long.
"""


# ---- trees of tensors ----------------------------------------------------------------------------


def pack(tree: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """A tree of tensors and plain values as JSON, its tensors set apart under their paths."""
    match tree:
        case Tensor():
            while path in tensors:  # keys may hold slashes, or differ only in type
                path += "'"
            tensors[path] = tree
            return {"tensor": path}
        case dict():
            return {"items": [[k, pack(v, tensors, f"{path}/{k}")] for k, v in tree.items()]}
        case list() | tuple():
            kind = "tuple" if isinstance(tree, tuple) else "list"
            return {kind: [pack(v, tensors, f"{path}/{k}") for k, v in enumerate(tree)]}
        case None | bool() | int() | float() | str():
            return tree
    raise TypeError(
        f"a checkpoint cannot hold {type(tree).__name__} at '{path}': make it a number, string or "
        "tensor"
    )


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `pack`."""
    match tree:
        case {"tensor": path}:
            return tensors[path]
        case {"items": items}:
            return {k: unpack(v, tensors) for k, v in items}
        case {"list": values}:
            return [unpack(v, tensors) for v in values]
        case {"tuple": values}:
            return tuple(unpack(v, tensors) for v in values)
    return tree


class SafetensorsIO(CheckpointIO):
    """Lightning's checkpoints as one safetensors file each, renamed into place when whole.

    Of a file called `last` the one before is kept as `previous`. Where `last` is missing or cannot
    be read, the newest other one is, and a line says so.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        path = Path(path)
        tensors = dict[str, Tensor]()
        header = {"tree": json.dumps(pack(checkpoint, tensors)), "training": _training(path)}
        with runs.writable(path):
            make_folder(path.parent)
        if path.name != LAST.name or not path.exists():
            write_tensors(tensors, path, header)
            return
        following = path.with_name(NEXT.name)
        write_tensors(tensors, following, header)
        with runs.writable(path):  # whoever is killed in between leaves two whole files
            os.replace(path, path.with_name(PREVIOUS.name))
            os.replace(following, path)
            sync_folder(path.parent)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        path = Path(path)
        others = (
            [path.with_name(other.name) for other in (NEXT, PREVIOUS)]
            if path.name == LAST.name
            else []
        )
        first, *rest = [path, *(other for other in others if other.exists())]
        for other in rest:
            try:
                return _opened(first)
            except BadInput as error:
                what, _, _ = str(error).rpartition("; ")
                log.warning("%s; resuming from '%s' instead", what, other.name)
            first = other
        return _opened(first)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def _opened(path: Path) -> dict[str, Any]:
    """A checkpoint as Lightning takes it.

    Raises:
        BadInput: it cannot be read, or is something else.
    """
    remedy = f"delete the folder '{path.parent.name}', and run the same fit again to start over"
    tensors, header = read_tensors(path, remedy)
    if "tree" not in header:
        raise BadInput(f"'{path}': not a checkpoint of this tool; {remedy}")
    if header.get("training") != _training(path):
        raise BadInput(f"'{path}': the checkpoint of another training; {remedy}")
    try:
        return unpack(json.loads(header["tree"]), tensors)
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"'{path}': damaged ({error}); {remedy}") from error


def _training(path: Path) -> str:
    """Return what identifies the training of a checkpoint: its run's settings and start, or its
    target's folder.

    It is empty for a checkpoint outside the folders of runs and targets.
    """
    folder = path.resolve().parent.parent
    if (folder / "run.json").exists():
        record = runs.Run(folder).record
        return f"{record.get('digest')} {record.get('started')}"
    return folder.name if folder.parent.name == "targets" else ""


def resumable(folder: Path) -> Path | None:
    """The checkpoint from which a training in this folder resumes; None if it has to begin."""
    held = any((folder / name).exists() for name in (LAST, NEXT, PREVIOUS))
    return folder / LAST if held else None


class Checkpoints(Callback):
    """Saves the newest state of a training, and ends it there when a signal asks for that.

    A checkpoint is due every `checkpoint_every` optimizer steps of its module, every few minutes,
    and before an evaluation or the last steps where training has gone on for a while: those may
    last long. It is written before a `training_step`, when all that belongs to the one before has
    been logged, and only if all weights and losses are finite. A killed training resumes from there
    as if nothing had been: what it had logged since is taken back, to be logged again.

    Args:
        folder: the run's folder.
        seconds: the most time between two checkpoints.
        worth_keeping: seconds of training after which an evaluation, or the end, is preceded by a
            checkpoint.
    """

    def __init__(
        self, folder: str | Path, seconds: float = SECONDS, worth_keeping: float = WORTH_KEEPING
    ):
        self.folder = Path(folder)
        self.seconds = seconds
        self.worth_keeping = worth_keeping
        self._saved, self._logged, self._since = 0, 0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved = trainer.global_step
        self._since = time.monotonic()
        if trainer.is_global_zero:
            runs.cut_metrics(self.folder, self._logged)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        assert isinstance(pl_module, MultiStepModule)
        agreed = trainer.strategy.reduce_boolean_decision
        stop = agreed(stopping.requested(), all=False)
        if stop or agreed(self._due(trainer, pl_module), all=False):
            self._save(trainer, pl_module)
        if stop:
            stopping.stop()
        stopping.hold()

    def _due(self, trainer: Trainer, module: MultiStepModule) -> bool:
        every = module.checkpoint_every
        seconds = time.monotonic() - self._since
        if trainer.global_step // every > self._saved // every or seconds > self.seconds:
            return True
        return seconds > self.worth_keeping and _last_before_long_work(trainer, module)

    def _save(self, trainer: Trainer, module: MultiStepModule) -> None:
        if trainer.global_step > self._saved:  # else it is there already
            module.check_losses()
            module.check_weights()
            trainer.save_checkpoint(self.folder / LAST)
        self._saved = trainer.global_step
        self._since = time.monotonic()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stopping.release()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            stopping.hold()  # what is logged from here on belongs to the next checkpoint

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stopping.release()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        stopping.let_go()
        if (
            isinstance(exception, stopping.Stopped)
            and trainer.state.fn == "fit"
            and trainer.global_step
        ):
            exception.place = f"at step {trainer.global_step}"
            if trainer.global_step > self._saved:
                exception.place += (
                    f" (saved at step {self._saved})" if self._saved else " (nothing saved yet)"
                )

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Lightning counts the coming training_step as begun; a resumed run would validate one too
        # early.
        total = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
        if total["started"] == total["completed"]:
            total["ready"] = total["completed"]

    def state_dict(self) -> dict[str, Any]:
        return {"logged": runs.metrics_size(self.folder)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._logged = state_dict["logged"]


def _last_before_long_work(trainer: Trainer, module: MultiStepModule) -> bool:
    """Whether the coming `training_step` is followed by an evaluation, or is the last."""
    if trainer.global_step + module.inner_steps >= trainer.max_steps:
        return True
    every = trainer.val_check_batch  # pyright: ignore[reportAttributeAccessIssue]  (Lightning's, not declared)
    return isinstance(every, int) and (trainer.fit_loop.total_batch_idx + 1) % every == 0
