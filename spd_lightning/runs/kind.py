"""The kind of a run, read from its JSON files, so that a command can reject it without torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spd_lightning.errors import BadInput
from spd_lightning.runs.folders import Run

DECODERS = ("gpt2", "llama", "mistral", "qwen2")
"""HuggingFace model types that can be converted to our decoder (`targets.conversion`)."""


@dataclass(frozen=True)
class Kind:
    """Facts about the model that a run decomposes.

    A fact that cannot be read is empty. The reason is reported when the weights are loaded.

    Attributes:
        name: the run's name.
        target: the class of its target, without its module; empty if unknown.
        model_type: the type of a HuggingFace target; empty for other targets.
        counts: the number of components of each site; empty if unknown.
        data: the class of its data, without its module; empty if unknown.
    """

    name: str
    target: str = ""
    model_type: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    data: str = ""

    @property
    def decoder(self) -> bool:
        """Whether the target can be a decoder whose parts are known."""
        if self.target == "HuggingFaceLM":
            return self.model_type in DECODERS
        return self.target not in ("TMS", "ResidualMLP", "InductionHead")

    @property
    def takes_text(self) -> bool:
        """Whether the prompts can be texts."""
        return self.data not in ("SparseFeatures", "InductionTokens")


def kind(run: Run) -> Kind:
    """Return the kind of a run.

    Raises:
        BadInput: the run has no decomposition.
    """
    described = run.path / "decomposition.json"
    if not described.exists() or not (run.path / "decomposition.safetensors").exists():
        raise BadInput(f"run '{run.path}': holds no decomposition (yet); let its fit finish")
    try:
        facts = json.loads(described.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        facts = None
    target = _map(facts, "target")
    target_config = _map(_map(target, "init_args"), "config")
    return Kind(
        name=run.name,
        target=_class(target),
        model_type=str(target_config.get("model_type", "")),
        counts=_counts(_map(facts, "sites")),
        data=_class(_map(run.config, "data")),
    )


def _counts(sites: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of components of each site, or nothing if one of them is not a number."""
    counts = {}
    for name in sites:
        count = _map(sites, name).get("C")
        if not isinstance(count, int):
            return {}
        counts[name] = count
    return counts


def _map(value: Any, key: str) -> Mapping[str, Any]:
    """Return the object under a key, or an empty one if the key or the object is missing."""
    if not isinstance(value, Mapping):
        return {}
    entry = value.get(key)
    return entry if isinstance(entry, Mapping) else {}


def _class(value: Mapping[str, Any]) -> str:
    """Return the name of a class without its module."""
    class_path = str(value.get("class_path", ""))
    return class_path.rpartition(".")[2]
