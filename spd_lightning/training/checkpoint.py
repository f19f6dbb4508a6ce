"""Weights on disk: safetensors and JSON, written whole, never a pickle.

Two kinds of files. A *checkpoint* (`checkpoints/last.safetensors`) is all that Lightning needs to go on; its tree of
numbers is JSON in the file's own header. A *decomposition* (`decomposition.safetensors` + `.json`) is the result, with
the target's weights inside, so that it opens on a machine that has never seen the target.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import CheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spd_lightning import json_files, runs, stopping
from spd_lightning.decomposition.components import find_sites
from spd_lightning.decomposition.importance import Importance
from spd_lightning.decomposition.importance_functions import importance_function
from spd_lightning.digests import digest
from spd_lightning.errors import BadInput
from spd_lightning.files import make_folder, sync_folder
from spd_lightning.runs.shapes import RESTORE, Description
from spd_lightning.training.blocks import BlockModule, non_finite
from spd_lightning.training.decompose import Decomposition
from spd_lightning.training.evaluate import Evaluation
from spd_lightning.training.networks import build, check_shapes

log = logging.getLogger(__name__)

SCHEMA = 1
LAST = Path("checkpoints") / "last.safetensors"
NEXT, PREVIOUS = LAST.with_name("next.safetensors"), LAST.with_name("previous.safetensors")
"""A checkpoint that is not `last` yet, and the one that was before: where `last` cannot be read, they are."""
SECONDS = 300.0
"""Most seconds between two checkpoints of a training."""
WORTH_KEEPING = 10.0
"""Seconds of training after which a checkpoint is due before an evaluation, or the end: both may last long."""


# ---- trees of tensors -----------------------------------------------------------------------------------------------


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
    raise TypeError(f"a checkpoint cannot hold {type(tree).__name__} at '{path}': make it a number, string or tensor")


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


def write(tensors: Mapping[str, Tensor], path: Path, header: dict[str, str] | None = None) -> None:
    """A safetensors file, whole or not at all; a header gets the digest of all that the file holds.

    Raises:
        BadInput: the disk refuses.
    """
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    if header:
        header = {**header, "digest": content_digest(header, own)}
    with runs.write_whole(path) as temporary:
        try:
            save_file(own, temporary, header)
        except SafetensorError as error:  # which is how safetensors tells of a full disk
            raise OSError(str(error)) from error


def read(path: Path, remedy: str = RESTORE) -> tuple[dict[str, Tensor], dict]:
    """Tensors and header of a safetensors file; the header's digest is checked.

    Raises:
        BadInput: it is missing, damaged, or no safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors, header = load_file(path), file.metadata() or {}
        rest = {key: value for key, value in header.items() if key != "digest"}
        if header and header.get("digest") != content_digest(rest, tensors):
            raise ValueError("its content does not fit the digest in its header")
        return tensors, rest
    except (SafetensorError, OSError, ValueError, OverflowError, MemoryError) as error:
        why = " ".join(str(error).split())[:200]
        raise BadInput(f"'{path}': cannot be read ({why}); {remedy}") from error


def content_digest(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Sixteen hex characters that stand for a header and every tensor's name, type, shape and bytes."""
    seen = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        seen.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        seen.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return seen.hexdigest()[:16]


class SafetensorsIO(CheckpointIO):
    """Lightning's checkpoints as one safetensors file each, renamed into place when whole.

    Of a file called `last` the one before is kept as `previous`. Where `last` is missing or cannot be read, the newest
    other one is, and a line says so.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path, tensors = Path(path), dict[str, Tensor]()
        tree = json.dumps(pack(checkpoint, tensors))
        with runs.writable(path):
            make_folder(path.parent)
        if path.name != LAST.name or not path.exists():
            write(tensors, path, {"tree": tree})
            return
        following = path.with_name(NEXT.name)
        write(tensors, following, {"tree": tree})
        with runs.writable(path):  # whoever is killed in between leaves two whole files
            os.replace(path, path.with_name(PREVIOUS.name))
            os.replace(following, path)
            sync_folder(path.parent)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(path)
        others = [path.with_name(other.name) for other in (NEXT, PREVIOUS)] if path.name == LAST.name else []
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
    tensors, header = read(path, remedy)
    if "tree" not in header:
        raise BadInput(f"'{path}': not a checkpoint of this tool; {remedy}")
    try:
        return unpack(json.loads(header["tree"]), tensors)
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"'{path}': damaged ({error}); {remedy}") from error


def resumable(folder: Path) -> Path | None:
    """The checkpoint from which a training in this folder resumes; None if it has to begin."""
    held = any((folder / name).exists() for name in (LAST, NEXT, PREVIOUS))
    return folder / LAST if held else None


class Checkpoints(Callback):
    """Saves the newest state of a training, and ends it there when a signal asks for that.

    A checkpoint is due every `checkpoint_every` optimiser steps of its module, every few minutes, and before an
    evaluation or the last steps where training has gone on for a while: those may last long. It is written before a
    `training_step`, when all that belongs to the one before has been logged, and only if all weights and losses are
    finite. A killed training resumes from there as if nothing had been: what it had logged since is taken back, to be
    logged again.

    Args:
        folder: the run's folder.
        seconds: the most time between two checkpoints.
        worth_keeping: seconds of training after which an evaluation, or the end, is preceded by a checkpoint.
    """

    def __init__(self, folder: str | Path, seconds: float = SECONDS, worth_keeping: float = WORTH_KEEPING):
        self.folder, self.seconds, self.worth_keeping = Path(folder), seconds, worth_keeping
        self._saved, self._logged, self._since = 0, 0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved, self._since = trainer.global_step, time.monotonic()
        if trainer.is_global_zero:
            runs.cut_metrics(self.folder, self._logged)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        assert isinstance(pl_module, BlockModule)
        agreed = trainer.strategy.reduce_boolean_decision
        stop = agreed(stopping.requested(), all=False)
        if stop or agreed(self._due(trainer, pl_module), all=False):
            self._save(trainer, pl_module)
        if stop:
            stopping.stop()
        stopping.hold()

    def _due(self, trainer: Trainer, module: BlockModule) -> bool:
        every, seconds = module.checkpoint_every, time.monotonic() - self._since
        if trainer.global_step // every > self._saved // every or seconds > self.seconds:
            return True
        return seconds > self.worth_keeping and _last_before_long_work(trainer, module)

    def _save(self, trainer: Trainer, module: BlockModule) -> None:
        if trainer.global_step > self._saved:  # else it is there already
            module.check_losses()
            module.check_weights()
            trainer.save_checkpoint(self.folder / LAST)
        self._saved, self._since = trainer.global_step, time.monotonic()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stopping.release()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            stopping.hold()  # what is logged from here on belongs to the next checkpoint

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stopping.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        stopping.let_go()
        if isinstance(exception, stopping.Stopped) and trainer.state.fn == "fit" and trainer.global_step:
            exception.place = f"at step {trainer.global_step}"
            if trainer.global_step > self._saved:
                exception.place += f" (saved at step {self._saved})" if self._saved else " (nothing saved yet)"

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Lightning counts the coming training_step as begun; a resumed run would validate one too early.
        total = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
        if total["started"] == total["completed"]:
            total["ready"] = total["completed"]

    def state_dict(self) -> dict[str, Any]:
        return {"logged": runs.metrics_size(self.folder)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._logged = state_dict["logged"]


def _last_before_long_work(trainer: Trainer, module: BlockModule) -> bool:
    """Whether the coming `training_step` is followed by an evaluation, or is the last."""
    if trainer.global_step + module.inner_steps >= trainer.max_steps:
        return True
    every = trainer.val_check_batch  # pyright: ignore[reportAttributeAccessIssue]  (Lightning's, not declared)
    return isinstance(every, int) and (trainer.fit_loop.total_batch_idx + 1) % every == 0


# ---- decompositions -------------------------------------------------------------------------------------------------


def save_decomposition(module: Decomposition, folder: Path) -> None:
    """Writes `decomposition.safetensors` (components.<site>.V and .U, importance.*, target.*) and its JSON."""
    model, path = module.model, folder / "decomposition.safetensors"
    tensors = {f"importance.{k}": v for k, v in model.importance_function.state_dict().items()}
    tensors |= {f"target.{k}": v for k, v in model.target.state_dict().items()}
    for site in model.sites:
        if site not in model.tied:
            tensors |= {f"components.{site}.V": model[site].V, f"components.{site}.U": model[site].U}
    write(tensors, path)
    runs.write_json(folder / "decomposition.json", {"schema": SCHEMA, **_description(module), "digest": digest(path)})


def _description(module: Decomposition) -> dict[str, Any]:
    model = module.model
    shapes = {n: {"C": model.counts[n], "d_in": s.d_in, "d_out": s.d_out} for n, s in model.sites.items()}
    settings = {k: asdict(v) if hasattr(v, "__dataclass_fields__") else v for k, v in module.settings.items()}
    return {"model": settings, "target": module.target_spec, "sites": shapes, "tied": model.tied}


def load_decomposition(reference: str | Path, target: nn.Module | None = None) -> Decomposition:
    """A decomposition from a run (see `Decomposition.from_pretrained`), its target in single precision at least."""
    folder = runs.find(str(reference)).path
    described, weights = folder / "decomposition.json", folder / "decomposition.safetensors"
    if not described.exists() or not weights.exists():
        if runs.Run(folder).state == "diverged":
            verdict = runs.Run(folder).summary["verdict"]
            raise BadInput(f"run '{folder}': its training {verdict}; it holds no decomposition, fit again")
        raise BadInput(f"run '{folder}': holds no decomposition (yet); let its fit finish")

    def this_schema(held: Mapping[str, Any]) -> None:
        if isinstance(schema := held.get("schema"), int) and schema > SCHEMA:
            raise BadInput(f"'{described}': schema {schema} is newer than this tool's {SCHEMA}; upgrade the tool")

    facts = json_files.read(described, Description, RESTORE, first=this_schema)
    if target is None and facts["target"] is None:
        raise BadInput(f"'{weights}': its target was an object; use Decomposition.from_pretrained(path, target=…)")
    tensors, _ = read(weights)
    if digest(weights) != facts["digest"]:
        raise BadInput(f"'{weights}': not the weights that decomposition.json describes; restore both from one copy")
    module = _assembled(facts, tensors, target, weights)
    if name := non_finite(dict(module.named_parameters())):
        raise BadInput(f"'{weights}': the weights '{name}' are not finite; fit again, at a lower learning rate")
    module.origin, module.digest = folder.resolve().name, facts["digest"]
    return module


def _assembled(facts: Description, tensors: dict[str, Tensor], target: nn.Module | None, path: Path) -> Decomposition:
    spec = facts["target"]
    settings: dict[str, Any] = dict(facts["model"])
    place = f"'{path.with_suffix('.json')}'"
    try:
        importance = json_files.conform(settings["importance"], Importance, "model.importance")
        evaluation = json_files.conform(settings["evaluation"], Evaluation, "model.evaluation")
    except ValueError as error:  # BadInput of their own checks among them
        raise BadInput(f"{place}: {error}; {RESTORE}") from error
    weights = _below("target.", tensors)
    network = target or build(spec or {}, weights)
    _load(network, weights, path)
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in network.parameters()):
        network.float()  # components are, and graphs multiply both
    _check_sizes(network, facts, importance, tensors, place)
    module = Decomposition(network, **settings | {"importance": importance, "evaluation": evaluation})
    module.target_spec = None if spec is None else dict(spec)
    for site in module.model.sites:
        if site not in module.model.tied:
            _load(module.model[site], _below(f"components.{site}.", tensors), path)
    _load(module.model.importance_function, _below("importance.", tensors), path)
    return module.eval()


def _check_sizes(
    network: nn.Module, facts: Description, importance: Importance, tensors: Mapping[str, Tensor], place: str
) -> None:
    """Numbers of components, and the importance function, are as large as their weights: before they are allocated.

    Raises:
        BadInput: they are not.
    """
    found = find_sites(network, facts["model"]["sites"])
    for name, (site, count) in found.items():
        if name in facts["model"]["tied"]:
            continue
        held = [list(tensors[key].shape) for key in _factors(name) if key in tensors]
        if held != [[site.d_in, count], [count, site.d_out]]:
            raise BadInput(
                f"{place}: model.sites: {count} components of '{name}', and V and U of {held or 'no size'} in the "
                f"weights: weights of another model; {RESTORE}"
            )
    check_shapes(lambda: importance_function(importance, found), _below("importance.", tensors), place)


def _factors(site: str) -> tuple[str, str]:
    return f"components.{site}.V", f"components.{site}.U"


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _load(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        why = " ".join(str(error).split())[:200]
        raise BadInput(
            f"'{path}': weights of another model ({why}); name the run that belongs to this target"
        ) from error
