"""Saved decompositions: the files that a training leaves in its run's folder.

    decomposition.safetensors    components.<site>.V and .U, importance.*, target.*
    decomposition.json           the settings, and the digest of the weights

The files include the target's weights, so a decomposition can be opened on a machine that does not
have the target.
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
        settings: the arguments of the `Decomposition`, except for its target.
        target_spec: `class_path` and `init_args` of the target; None if it was given as an object.
        folder: the run's folder.
    """
    path = folder / "decomposition.safetensors"
    tensors = _with_prefix("importance.", model.importance_function.state_dict())
    tensors |= _with_prefix("target.", model.target.state_dict())
    for site in model.sites:
        if site not in model.tied:
            tensors[f"components.{site}.V"] = model[site].V
            tensors[f"components.{site}.U"] = model[site].U
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
    """A decomposition as read from its run's folder.

    Args:
        folder: the run's folder.
        description: the content of decomposition.json.
        tensors: the content of decomposition.safetensors.
        settings: the arguments of the `Decomposition` to build, except for its target.
    """

    folder: Path
    description: Description
    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any]

    @classmethod
    def read(cls, reference: str | Path) -> "SavedDecomposition":
        """Read the decomposition of a run.

        Args:
            reference: the run: its name, its folder, or `mlflow:…` / `wandb:…` in a tracker.

        Raises:
            BadInput: the run has no decomposition, or the files are damaged.
        """
        folder = runs.find(str(reference)).path
        described = folder / "decomposition.json"
        weights = folder / "decomposition.safetensors"
        if not described.exists() or not weights.exists():
            run = runs.Run(folder)
            if run.state == "diverged":
                verdict = run.summary["verdict"]
                raise BadInput(
                    f"run '{folder}': its training {verdict}; it holds no decomposition, fit again"
                )
            raise BadInput(f"run '{folder}': holds no decomposition (yet); let its fit finish")

        def check_schema(values: Mapping[str, Any]) -> None:
            schema = values.get("schema")
            if isinstance(schema, int) and schema > SCHEMA:
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
        """Class path and arguments of the target; None if it was given as an object."""
        spec = self.description["target"]
        return None if spec is None else dict(spec)

    @property
    def digest(self) -> str:
        """The digest of the weights in decomposition.json."""
        return self.description["digest"]

    def network(self, target: nn.Module | None = None) -> nn.Module:
        """Return the target with its saved weights, in float32 or better.

        Args:
            target: a network like the decomposed one, to load the weights into; built from
                `target_spec` if omitted.

        Raises:
            BadInput: `target` is omitted although the target was an object, or the weights belong
                to another model.
        """
        spec = self.target_spec
        if target is None and spec is None:
            raise BadInput(
                f"'{self._weights}': its target was an object; use "
                "Decomposition.from_pretrained(path, target=…)"
            )
        weights = _without_prefix("target.", self.tensors)
        network = target or build(spec or {}, weights)
        _load(network, weights, self._weights)
        types = {parameter.dtype for parameter in network.parameters()}
        if types & {torch.float16, torch.bfloat16}:
            network.float()  # components are in float32, and graphs multiply both
        self._check_sizes(network)
        return network

    def load_into(self, model: ComponentModel) -> None:
        """Load the weights of components and importance function into a model.

        Args:
            model: the model, built with `settings`.

        Raises:
            BadInput: the weights belong to another model, or are not finite.
        """
        for site in model.sites:
            if site not in model.tied:
                factors = _without_prefix(f"components.{site}.", self.tensors)
                _load(model[site], factors, self._weights)
        importance_weights = _without_prefix("importance.", self.tensors)
        _load(model.importance_function, importance_weights, self._weights)
        if name := non_finite(dict(model.named_parameters())):
            raise BadInput(
                f"'{self._weights}': the weights '{name}' are not finite; fit again, at a lower "
                "learning rate"
            )

    @property
    def _weights(self) -> Path:
        return self.folder / "decomposition.safetensors"

    def _check_sizes(self, network: nn.Module) -> None:
        """Check that components and importance function have the size of their weights.

        Nothing is allocated for that.

        Raises:
            BadInput: they have a different size.
        """
        place = f"'{self.folder / 'decomposition.json'}'"
        model = self.description["model"]
        sites = find_sites(network, model["sites"])
        for name, (site, count) in sites.items():
            if name in model["tied"]:
                continue
            factors = (f"components.{name}.V", f"components.{name}.U")
            shapes = [list(self.tensors[key].shape) for key in factors if key in self.tensors]
            expected = [[site.d_in, count], [count, site.d_out]]
            if shapes != expected:
                raise BadInput(
                    f"{place}: model.sites: {count} components of '{name}', and V and U of "
                    f"{shapes or 'no size'} in the weights: weights of another model; {RESTORE}"
                )
        importance = self.settings["importance"]
        check_shapes(
            lambda: importance_function(importance, sites),
            _without_prefix("importance.", self.tensors),
            place,
        )


def _settings(description: Description, place: str) -> dict[str, Any]:
    """Return the arguments of the `Decomposition` to build, each checked by its class.

    Raises:
        BadInput: a setting is invalid.
    """
    settings: dict[str, Any] = dict(description["model"])
    try:
        settings["importance"] = json_files.conform(
            settings["importance"], Importance, "model.importance"
        )
        settings["evaluation"] = json_files.conform(
            settings["evaluation"], Evaluation, "model.evaluation"
        )
    except ValueError as error:  # includes BadInput, which their own checks raise
        raise BadInput(f"{place}: {error}; {RESTORE}") from error
    return settings


def _with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with a prefix before their names."""
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def _without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, by the rest of their names."""
    selected = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            selected[name.removeprefix(prefix)] = tensor
    return selected


def _load(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load weights into a module.

    Raises:
        BadInput: the weights belong to another model.
    """
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        why = " ".join(str(error).split())[:200]
        raise BadInput(
            f"'{path}': weights of another model ({why}); name the run that belongs to this target"
        ) from error
