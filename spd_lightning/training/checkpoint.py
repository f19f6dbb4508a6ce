"""Checkpoints: everything Lightning needs to resume a training, as safetensors files.

A checkpoint (`checkpoints/last.safetensors`) is a tree of tensors and plain values. The tensors are
stored as such; the rest of the tree is JSON in the file's header.

The result of a training does not belong here (see `saved`).
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
"""The checkpoint about to become `last`, and the one before it.

Both are fallbacks for `last`. Still older ones are `previous-2.safetensors`, and so on.
"""
SECONDS = 300.0
"""Maximum seconds between two checkpoints of a training."""
WORTH_KEEPING = 10.0
"""Seconds of training that are worth a checkpoint before an evaluation or the last steps."""


# ---- trees of tensors ----------------------------------------------------------------------------


def pack(tree: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """Return a tree of tensors and plain values as JSON.

    Args:
        tree: the tree.
        tensors: filled with the tree's tensors by their paths.
        path: path of the tree itself.
    """
    match tree:
        case Tensor():
            while path in tensors:  # keys can contain slashes, or differ only in type
                path += "'"
            tensors[path] = tree
            return {"tensor": path}
        case dict():
            items = []
            for key, value in tree.items():
                items.append([key, pack(value, tensors, f"{path}/{key}")])
            return {"items": items}
        case list() | tuple():
            kind = "tuple" if isinstance(tree, tuple) else "list"
            values = []
            for index, value in enumerate(tree):
                values.append(pack(value, tensors, f"{path}/{index}"))
            return {kind: values}
        case None | bool() | int() | float() | str():
            return tree
    raise TypeError(
        f"a checkpoint cannot hold {type(tree).__name__} at '{path}': make it a number, string or "
        "tensor"
    )


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the tree that `pack` turned into JSON and tensors."""
    match tree:
        case {"tensor": path}:
            return tensors[path]
        case {"items": items}:
            return {key: unpack(value, tensors) for key, value in items}
        case {"list": values}:
            return [unpack(value, tensors) for value in values]
        case {"tuple": values}:
            return tuple(unpack(value, tensors) for value in values)
    return tree


class SafetensorsIO(CheckpointIO):
    """Writes each of Lightning's checkpoints as one safetensors file, atomically.

    When `last` is replaced, the old file is kept as `previous`. If `last` is missing or cannot be
    read, the newest other file is loaded instead, with a warning.
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
        with runs.writable(path):  # a kill in between leaves two complete files
            os.replace(path, path.with_name(PREVIOUS.name))
            os.replace(following, path)
            sync_folder(path.parent)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        path = Path(path)
        fallbacks = []
        if path.name == LAST.name:
            fallbacks = [path.with_name(NEXT.name), *_older(path.parent)]
        for fallback in fallbacks:
            if not fallback.exists():
                continue
            try:
                return _read(path)
            except BadInput as error:
                problem, _, _ = str(error).rpartition("; ")
                log.warning("%s; resuming from '%s' instead", problem, fallback.name)
            path = fallback
        return _read(path)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def _older(folder: Path) -> list[Path]:
    """Return the checkpoints before `last`, newest first."""
    previous = folder / PREVIOUS.name
    others = folder.glob(f"{PREVIOUS.stem}-*{PREVIOUS.suffix}")
    return [previous, *sorted(others, key=_age)]


def _age(path: Path) -> int:
    """Return n of a file `previous-n`; 1 for `previous` itself."""
    number = path.stem.rpartition("-")[2]
    return int(number) if number.isdecimal() else 1


def make_room(folder: Path, keep: int) -> None:
    """Rename older checkpoints so that there are `keep` after the next one, and remove the rest.

    The checkpoint `previous` is not removed, since it is the only fallback for `last`. The next
    checkpoint replaces it.
    """
    for path in reversed(_older(folder)):
        age = _age(path)
        if not path.exists():
            continue
        if age + 2 <= keep:
            path.rename(folder / f"{PREVIOUS.stem}-{age + 1}{PREVIOUS.suffix}")
        elif age > 1:
            path.unlink()


def _read(path: Path) -> dict[str, Any]:
    """Read a checkpoint in Lightning's form.

    Raises:
        BadInput: the file cannot be read, or is not a checkpoint of this training.
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
    """Return an identifier of the training that a checkpoint belongs to.

    It is made of the run's settings and start time, or is the name of the target's folder. It is
    empty for a checkpoint outside the folders of runs and targets.
    """
    folder = path.resolve().parent.parent
    if (folder / "run.json").exists():
        record = runs.Run(folder).record
        settings = record.get("digest")
        started = record.get("started")
        return f"{settings} {started}"
    if folder.parent.name == "targets":
        return folder.name
    return ""


def resumable(folder: Path) -> Path | None:
    """Return the checkpoint from which a training resumes; None if there is no checkpoint."""
    for name in (LAST, NEXT, PREVIOUS):
        if (folder / name).exists():
            return folder / LAST
    return None


class Checkpoints(Callback):
    """Saves the newest state of a training, and stops the training after a signal.

    A checkpoint is due every `checkpoint_every` optimizer steps of the module and every few
    minutes. It is also due before an evaluation or the last steps, which can take long, if training
    has run for `worth_keeping` seconds. It is written before a `training_step`, once the previous
    step has been logged, and only if all weights and losses are finite.

    A killed training resumes from its checkpoint. Metrics logged after the checkpoint are removed,
    and logged again.

    Args:
        folder: the run's folder.
        seconds: maximum time between two checkpoints.
        worth_keeping: seconds of training that are worth a checkpoint before an evaluation or the
            last steps.
    """

    def __init__(
        self, folder: str | Path, seconds: float = SECONDS, worth_keeping: float = WORTH_KEEPING
    ):
        self.folder = Path(folder)
        self.seconds = seconds
        self.worth_keeping = worth_keeping
        self._saved = 0  # the step of the last checkpoint
        self._logged = 0  # size of the metrics file at that step, in bytes
        self._since = 0.0  # time of the last checkpoint

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved = trainer.global_step
        self._since = time.monotonic()
        if trainer.is_global_zero:
            runs.cut_metrics(self.folder, self._logged)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        assert isinstance(pl_module, MultiStepModule)
        any_device = trainer.strategy.reduce_boolean_decision
        stop = any_device(stopping.requested(), all=False)
        if stop or any_device(self._due(trainer, pl_module), all=False):
            self._save(trainer, pl_module)
        if stop:
            stopping.stop()
        stopping.hold()

    def _due(self, trainer: Trainer, module: MultiStepModule) -> bool:
        every = module.checkpoint_every
        seconds = time.monotonic() - self._since
        step = trainer.global_step
        due_by_step = step // every > self._saved // every
        if due_by_step or seconds > self.seconds:
            return True
        return seconds > self.worth_keeping and _last_before_long_work(trainer, module)

    def _save(self, trainer: Trainer, module: MultiStepModule) -> None:
        if trainer.global_step > self._saved:  # otherwise it has been saved already
            module.check_losses()
            module.check_weights()
            if trainer.is_global_zero:
                make_room(self.folder / LAST.parent, module.keep_checkpoints)
            trainer.save_checkpoint(self.folder / LAST)
        self._saved = trainer.global_step
        self._since = time.monotonic()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stopping.release()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        in_training = trainer.state.fn == "fit"
        if in_training and not trainer.sanity_checking:
            stopping.hold()  # later metrics belong to the next checkpoint

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stopping.release()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        stopping.let_go()
        if not isinstance(exception, stopping.Stopped):
            return
        if trainer.state.fn != "fit" or not trainer.global_step:
            return
        exception.place = f"at step {trainer.global_step}"
        if trainer.global_step > self._saved:
            saved = f"saved at step {self._saved}" if self._saved else "nothing saved yet"
            exception.place += f" ({saved})"

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Lightning counts the next training_step as begun: a resumed run would validate one step
        # too early.
        fit_loop = checkpoint["loops"]["fit_loop"]
        total = fit_loop["epoch_loop.batch_progress"]["total"]
        if total["started"] == total["completed"]:
            total["ready"] = total["completed"]

    def state_dict(self) -> dict[str, Any]:
        return {"logged": runs.metrics_size(self.folder)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._logged = state_dict["logged"]


def _last_before_long_work(trainer: Trainer, module: MultiStepModule) -> bool:
    """Return whether the next `training_step` is the last, or the last before an evaluation."""
    if trainer.global_step + module.inner_steps >= trainer.max_steps:
        return True
    untyped: Any = trainer  # Lightning does not declare this attribute
    every = untyped.val_check_batch
    if not isinstance(every, int):
        return False
    batches = trainer.fit_loop.total_batch_idx + 1
    return batches % every == 0
