"""Weights on disk: safetensors and JSON, written whole, never a pickle.

Two kinds of files. A *checkpoint* (`checkpoints/last.safetensors`) is all that Lightning needs to go on; its tree of
numbers is JSON in the file's own header. A *decomposition* (`decomposition.safetensors` + `.json`) is the result, with
the target's weights inside, so that it opens on a machine that has never seen the target.
"""

import hashlib
import json
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

from spd_lightning import json_files, runs
from spd_lightning.decomposition.components import find_sites
from spd_lightning.decomposition.importance import Importance
from spd_lightning.decomposition.importance_functions import importance_function
from spd_lightning.digests import digest
from spd_lightning.errors import BadInput
from spd_lightning.runs.shapes import Description
from spd_lightning.training.blocks import BlockModule
from spd_lightning.training.decompose import Decomposition
from spd_lightning.training.evaluate import Evaluation
from spd_lightning.training.networks import build, check_shapes

SCHEMA = 1
LAST = Path("checkpoints") / "last.safetensors"


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


def read(path: Path, remedy: str = "restore it from a copy, or run the fit again") -> tuple[dict[str, Tensor], dict]:
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
        seen.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return seen.hexdigest()[:16]


class SafetensorsIO(CheckpointIO):
    """Lightning's checkpoints as one safetensors file each, renamed into place when whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        tensors: dict[str, Tensor] = {}
        tree = json.dumps(pack(checkpoint, tensors))
        with runs.writable(Path(path)):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        write(tensors, Path(path), {"tree": tree})

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        remedy = "delete it, and the same fit begins anew"
        tensors, header = read(Path(path), remedy)
        if "tree" not in header:
            raise BadInput(f"'{path}': not a checkpoint of this tool; {remedy}")
        return unpack(json.loads(header["tree"]), tensors)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class Checkpoints(Callback):
    """Saves the newest state of a training every `checkpoint_every` optimiser steps of its module.

    A killed training goes on from there as if nothing had been: what it had logged since is taken back, to be logged
    again. A checkpoint is written before a `training_step`, when all that belongs to the one before has been logged.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: str | Path):
        self.folder, self._saved, self._logged = Path(folder), 0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved = trainer.global_step
        if trainer.is_global_zero:
            runs.cut_metrics(self.folder, self._logged)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        assert isinstance(pl_module, BlockModule)
        every = pl_module.checkpoint_every
        if trainer.global_step // every > self._saved // every:
            self._saved = trainer.global_step
            trainer.save_checkpoint(self.folder / LAST)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Lightning counts the coming training_step as begun; a resumed run would validate one too early.
        total = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
        if total["started"] == total["completed"]:
            total["ready"] = total["completed"]

    def state_dict(self) -> dict[str, Any]:
        return {"logged": runs.metrics_size(self.folder)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._logged = state_dict["logged"]


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
        raise BadInput(f"run '{folder}': holds no decomposition (yet); let its fit finish")

    def this_schema(held: Mapping[str, Any]) -> None:
        if isinstance(schema := held.get("schema"), int) and schema > SCHEMA:
            raise BadInput(f"'{described}': schema {schema} is newer than this tool's {SCHEMA}; upgrade the tool")

    facts = json_files.read(described, Description, _RESTORE, first=this_schema)
    if target is None and facts["target"] is None:
        raise BadInput(f"'{weights}': its target was an object; use Decomposition.from_pretrained(path, target=…)")
    tensors, _ = read(weights)
    if digest(weights) != facts["digest"]:
        raise BadInput(f"'{weights}': not the weights that decomposition.json describes; restore both from one copy")
    module = _assembled(facts, tensors, target, weights)
    module.origin, module.digest = folder.resolve().name, facts["digest"]
    return module


_RESTORE = "restore it from a copy, or run the fit again"


def _assembled(facts: Description, tensors: dict[str, Tensor], target: nn.Module | None, path: Path) -> Decomposition:
    spec, settings = facts["target"], dict(facts["model"])
    place = f"'{path.with_suffix('.json')}'"
    try:
        importance = json_files.conform(settings["importance"], Importance, "model.importance")
        evaluation = json_files.conform(settings["evaluation"], Evaluation, "model.evaluation")
    except ValueError as error:  # BadInput of their own checks among them
        raise BadInput(f"{place}: {error}; {_RESTORE}") from error
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
                f"weights: weights of another model; {_RESTORE}"
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
