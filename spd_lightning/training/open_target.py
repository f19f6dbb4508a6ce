"""Targets opened by reference: one that a config has trained, or a HuggingFace model.

Not here: training one (`pretraining`).
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
    """Whether a reference names a config that trains a target, rather than a HuggingFace model."""
    kind, _, name = reference.partition(":")
    return not (kind in KINDS and name)


def open_target(reference: str) -> tuple[nn.Module, dict[str, Any]]:
    """Open a target, and return it with a description from which a network like it can be built.

    Args:
        reference: a config whose target has been trained; `hf:<folder or hub name>`, any causal
            language model of HuggingFace as it is; or `decoder:<folder or hub name>`, one on our
            decoder.

    Returns:
        The network, and its `class_path`, `init_args`, and the `seconds` that its training took.

    Raises:
        BadInput: the target has not been trained, its files are damaged, or there is no such model.
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
    facts = described(folder)
    path = folder / "target.safetensors"
    remedy = _remedy(folder)
    tensors, _ = read_tensors(path, remedy)
    if digest(path) != facts["digest"]:
        raise BadInput(f"'{path}': not the weights that target.json describes; {remedy}")
    network = build(facts["spec"], tensors)
    network.load_state_dict(tensors)
    return network, {**facts["spec"], "seconds": facts["seconds"]}


def target_folder(name: str, config: Mapping[str, Any], overrides: Sequence[str] = ()) -> Path:
    """Return the folder of the target that these settings train, whether or not it exists."""
    key = configs.digest([config, list(overrides)])
    return runs.root() / "targets" / f"{Path(name).stem}-{key}"


def described(folder: Path) -> TargetDescription:
    """Read what is known of a trained target.

    Raises:
        BadInput: its target.json is damaged.
    """
    return json_files.read(folder / "target.json", TargetDescription, _remedy(folder))


def _remedy(folder: Path) -> str:
    return f"delete the folder '{folder}', and the same fit trains it again"


def _open_huggingface(kind: str, name: str) -> tuple[LanguageModel, dict[str, Any]]:
    from spd_lightning.targets.conversion import decoder_from
    from spd_lightning.targets.huggingface import HuggingFaceLM

    network = decoder_from(name) if kind == "decoder" else HuggingFaceLM.from_pretrained(name)
    spec = {"class_path": f"spd_lightning.{type(network).__name__}", "init_args": network.init_args}
    return network, spec | {"seconds": 0.0}
