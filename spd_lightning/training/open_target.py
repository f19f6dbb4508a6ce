"""Opening a target by reference: one that a config has trained, or a HuggingFace model.

Training a target does not belong here (see `pretraining`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from spd_lightning import config as configs
from spd_lightning import json_files, runs
from spd_lightning.digests import digest
from spd_lightning.errors import BadInput
from spd_lightning.runs.shapes import TargetDescription
from spd_lightning.targets.language import LanguageModel
from spd_lightning.training.networks import build
from spd_lightning.training.tensor_files import read_tensors

KINDS = ("hf", "decoder")
"""Prefixes of references to HuggingFace models: as they are, and on our decoder."""


def is_trained_here(reference: str) -> bool:
    """Return whether a reference names a config that trains a target, not a HuggingFace model."""
    kind, _, name = reference.partition(":")
    is_huggingface = kind in KINDS and name != ""
    return not is_huggingface


def open_target(reference: str) -> tuple[nn.Module, dict[str, Any]]:
    """Open a target, and return it with a description from which a network like it can be built.

    Args:
        reference: a config whose target has been trained; `hf:<folder, GGUF file or hub name>` for
            any causal language model of HuggingFace; or `decoder:<…>` to load such a model into
            our decoder.

    Returns:
        The network, and its `class_path`, `init_args`, and the `seconds` of its training.

    Raises:
        BadInput: the target has not been trained, its files are damaged, or the model is not found.
    """
    if not is_trained_here(reference):
        return _open_huggingface(*reference.split(":", 1))
    try:
        folder = target_folder(reference, configs.load(reference))
    except BadInput as error:
        raise BadInput(f"target '{reference}': {error}") from error
    if not (folder / "target.json").exists():
        raise BadInput(
            f"target '{reference}': not trained yet; train it first: train_target('{reference}')"
        )
    description = described(folder)
    path = folder / "target.safetensors"
    remedy = _remedy(folder)
    tensors, _ = read_tensors(path, remedy)
    if digest(path) != description["digest"]:
        raise BadInput(f"'{path}': not the weights that target.json describes; {remedy}")
    spec = description["spec"]
    network = build(spec, tensors)
    network.load_state_dict(tensors)
    return network, {**spec, "seconds": description["seconds"]}


def target_folder(name: str, config: Mapping[str, Any], overrides: Sequence[str] = ()) -> Path:
    """Return the folder of the target that these settings train, whether or not it exists."""
    key = configs.digest([config, list(overrides)])
    folder = f"{Path(name).stem}-{key}"
    return runs.root() / "targets" / folder


def described(folder: Path) -> TargetDescription:
    """Read the description of a trained target.

    Raises:
        BadInput: its target.json is damaged.
    """
    path = folder / "target.json"
    return json_files.read(path, TargetDescription, _remedy(folder))


def _remedy(folder: Path) -> str:
    return f"delete the folder '{folder}', and the same fit trains it again"


def _open_huggingface(kind: str, name: str) -> tuple[LanguageModel, dict[str, Any]]:
    from spd_lightning.targets.conversion import decoder_from
    from spd_lightning.targets.huggingface import HuggingFaceLM

    if kind == "decoder":
        network = decoder_from(name)
    else:
        network = HuggingFaceLM.from_pretrained(name)
    description = {
        "class_path": f"spd_lightning.{type(network).__name__}",
        "init_args": network.init_args,
        "seconds": 0.0,
    }
    return network, description
