"""Saved decompositions: what a training leaves in its run's folder, and how to read it.

    decomposition.safetensors    components.<site>.V and .U, importance.*, target.*
    decomposition.json           the settings, and the digest of the weights

The target's weights are inside, so that a decomposition opens on a machine that has never seen the
target.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spd_lightning import json_files, runs
from spd_lightning.decomposition.components import find_sites
from spd_lightning.decomposition.importance import Importance
from spd_lightning.decomposition.importance_functions import importance_function
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.digests import digest
from spd_lightning.errors import BadInput
from spd_lightning.runs.shapes import RESTORE, Description
from spd_lightning.training.evaluate import Evaluation
from spd_lightning.training.multi_step import non_finite
from spd_lightning.training.networks import build, check_shapes
from spd_lightning.training.tensor_files import read_tensors, write_tensors

SCHEMA = 1


def save_decomposition(
    model: ComponentModel,
    settings: Mapping[str, Any],
    target_spec: Mapping[str, Any] | None,
    folder: Path,
) -> None:
    """Write `decomposition.safetensors` and `decomposition.json` into a folder.

    Args:
        model: the decomposed target.
        settings: the arguments it was built with.
        target_spec: how to build the target (`class_path`, `init_args`); None for a target given as
            an object.
        folder: the run's folder.
    """
    path = folder / "decomposition.safetensors"
    tensors = {f"importance.{k}": v for k, v in model.importance_function.state_dict().items()}
    tensors |= {f"target.{k}": v for k, v in model.target.state_dict().items()}
    for site in model.sites:
        if site not in model.tied:
            tensors |= {
                f"components.{site}.V": model[site].V,
                f"components.{site}.U": model[site].U,
            }
    write_tensors(tensors, path)
    shapes = {}
    for name, site in model.sites.items():
        shapes[name] = {"C": model.counts[name], "d_in": site.d_in, "d_out": site.d_out}
    plain = dict(settings)
    for name, value in settings.items():
        if is_dataclass(value) and not isinstance(value, type):
            plain[name] = asdict(value)
    description = {
        "schema": SCHEMA,
        "model": plain,
        "target": target_spec,
        "sites": shapes,
        "tied": model.tied,
        "digest": digest(path),
    }
    runs.write_json(folder / "decomposition.json", description)


@dataclass(frozen=True)
class SavedDecomposition:
    """A decomposition as its run's folder holds it: a description, and tensors that fit it.

    Args:
        folder: the run's folder.
        description: decomposition.json.
        tensors: decomposition.safetensors.
        settings: the arguments of the `Decomposition` to build, except for its target.
    """

    folder: Path
    description: Description
    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any]

    @classmethod
    def read(cls, reference: str | Path) -> "SavedDecomposition":
        """Read the decomposition of a run: its name, its folder, or `mlflow:…` / `wandb:…` in a
        tracker.

        Raises:
            BadInput: the run holds no decomposition, or one whose files are damaged.
        """
        folder = runs.find(str(reference)).path
        described = folder / "decomposition.json"
        weights = folder / "decomposition.safetensors"
        if not described.exists() or not weights.exists():
            if runs.Run(folder).state == "diverged":
                verdict = runs.Run(folder).summary["verdict"]
                raise BadInput(
                    f"run '{folder}': its training {verdict}; it holds no decomposition, fit again"
                )
            raise BadInput(f"run '{folder}': holds no decomposition (yet); let its fit finish")

        def check_schema(held: Mapping[str, Any]) -> None:
            if isinstance(schema := held.get("schema"), int) and schema > SCHEMA:
                raise BadInput(
                    f"'{described}': schema {schema} is newer than this tool's {SCHEMA}; upgrade "
                    "the tool"
                )

        description = json_files.read(described, Description, RESTORE, first=check_schema)
        settings = _settings(description, f"'{described}'")
        tensors, _ = read_tensors(weights)
        if digest(weights) != description["digest"]:
            raise BadInput(
                f"'{weights}': not the weights that decomposition.json describes; restore both "
                "from one copy"
            )
        return cls(folder, description, tensors, settings)

    @property
    def target_spec(self) -> dict[str, Any] | None:
        """How to build the target; None if it was given as an object."""
        spec = self.description["target"]
        return None if spec is None else dict(spec)

    @property
    def digest(self) -> str:
        """The digest of the weights, as decomposition.json has it."""
        return self.description["digest"]

    def network(self, target: nn.Module | None = None) -> nn.Module:
        """Return the target with its saved weights, in single precision at least.

        Args:
            target: a network like the decomposed one, to load the weights into; built from
                `target_spec` if omitted.

        Raises:
            BadInput: the target was an object and none is given, or the weights belong to another
                model.
        """
        spec = self.target_spec
        if target is None and spec is None:
            raise BadInput(
                f"'{self._weights}': its target was an object; use "
                "Decomposition.from_pretrained(path, target=…)"
            )
        weights = _below("target.", self.tensors)
        network = target or build(spec or {}, weights)
        _load(network, weights, self._weights)
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in network.parameters()):
            network.float()  # components are, and graphs multiply both
        self._check_sizes(network)
        return network

    def load_into(self, model: ComponentModel) -> None:
        """Load the weights of components and importance function into a model that was built with
        `settings`.

        Raises:
            BadInput: they belong to another model, or are not finite.
        """
        for site in model.sites:
            if site not in model.tied:
                _load(model[site], _below(f"components.{site}.", self.tensors), self._weights)
        _load(model.importance_function, _below("importance.", self.tensors), self._weights)
        if name := non_finite(dict(model.named_parameters())):
            raise BadInput(
                f"'{self._weights}': the weights '{name}' are not finite; fit again, at a lower "
                "learning rate"
            )

    @property
    def _weights(self) -> Path:
        return self.folder / "decomposition.safetensors"

    def _check_sizes(self, network: nn.Module) -> None:
        """Check that the components and the importance function are as large as their weights,
        before allocating them.

        Raises:
            BadInput: they are not.
        """
        place = f"'{self.folder / 'decomposition.json'}'"
        sites = find_sites(network, self.description["model"]["sites"])
        for name, (site, count) in sites.items():
            if name in self.description["model"]["tied"]:
                continue
            factors = (f"components.{name}.V", f"components.{name}.U")
            shapes = [list(self.tensors[key].shape) for key in factors if key in self.tensors]
            if shapes != [[site.d_in, count], [count, site.d_out]]:
                raise BadInput(
                    f"{place}: model.sites: {count} components of '{name}', and V and U of "
                    f"{shapes or 'no size'} in "
                    f"the weights: weights of another model; {RESTORE}"
                )
        importance = self.settings["importance"]
        check_shapes(
            lambda: importance_function(importance, sites),
            _below("importance.", self.tensors),
            place,
        )


def _settings(description: Description, place: str) -> dict[str, Any]:
    """Return the arguments of the `Decomposition` to build, each checked by its class.

    Raises:
        BadInput: a setting is not one of its class.
    """
    settings: dict[str, Any] = dict(description["model"])
    try:
        settings["importance"] = json_files.conform(
            settings["importance"], Importance, "model.importance"
        )
        settings["evaluation"] = json_files.conform(
            settings["evaluation"], Evaluation, "model.evaluation"
        )
    except ValueError as error:  # BadInput of their own checks among them
        raise BadInput(f"{place}: {error}; {RESTORE}") from error
    return settings


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, by the rest of their names."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _load(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        why = " ".join(str(error).split())[:200]
        raise BadInput(
            f"'{path}': weights of another model ({why}); name the run that belongs to this target"
        ) from error
