"""The kind of a run, read from its JSON without torch, so that a verb can reject a run before it
loads anything.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spd_lightning.errors import BadInput
from spd_lightning.runs.folders import Run

DECODERS = ("gpt2", "llama", "mistral", "qwen2")
"""HuggingFace model types that our decoder computes too (`targets.conversion`)."""


@dataclass(frozen=True)
class Kind:
    """Facts about the model that a run decomposes. A fact that cannot be read is empty; loading the
    weights says why.

    Attributes:
        name: the run's name.
        target: the class of its target, without its module; empty if unknown.
        model_type: the type of a HuggingFace target; empty if it is none.
        counts: the components of each site; empty if unknown.
        data: the class of its data, without its module; empty if unknown.
    """

    name: str
    target: str = ""
    model_type: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    data: str = ""

    @property
    def decoder(self) -> bool:
        """Whether it may be a decoder whose parts are known."""
        if self.target == "HuggingFaceLM":
            return self.model_type in DECODERS
        return self.target not in ("TMS", "ResidualMLP", "InductionHead")

    @property
    def takes_text(self) -> bool:
        """Whether its prompts may be texts."""
        return self.data not in ("SparseFeatures", "InductionTokens")


def kind(run: Run) -> Kind:
    """Return the kind of a run.

    Raises:
        BadInput: it holds no decomposition.
    """
    described = run.path / "decomposition.json"
    if not described.exists() or not (run.path / "decomposition.safetensors").exists():
        raise BadInput(f"run '{run.path}': holds no decomposition (yet); let its fit finish")
    try:
        facts = json.loads(described.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        facts = None
    target = _map(facts, "target")
    sites = _map(facts, "sites")
    counts = {name: count for name in sites if isinstance(count := _map(sites, name).get("C"), int)}
    return Kind(
        run.name,
        _class(target),
        str(_map(_map(target, "init_args"), "config").get("model_type", "")),
        counts if len(counts) == len(sites) else {},
        _class(_map(run.config, "data")),
    )


def _map(value: Any, key: str) -> Mapping[str, Any]:
    found = value.get(key) if isinstance(value, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _class(value: Mapping[str, Any]) -> str:
    return str(value.get("class_path", "")).rpartition(".")[2]
