"""Destinations for the copy of a run: an MLflow store, Weights & Biases, or another of Lightning's
loggers.

Each speaks to one tracker and lets its errors pass; `copies` decides when to try, and what to do
about an error.
"""

import json
import os
import re
import secrets
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spd_lightning import classes, runs
from spd_lightning.errors import BadInput, without_passwords

EXPERIMENT = "spd_lightning"
SPEED = 1e6  # bytes a second that an upload has at least

Row = tuple[int, Mapping[str, float]]
"""A step and what was logged at it."""


class Tracker(ABC):
    """Where a copy of a run goes. Any method may be called again after it failed.

    Each tracker has a thread and a file of its own in the run's folder, and is the only writer of
    that file.

    Attributes:
        library: the module that speaks to it.
        address: what it is called in messages; it holds no password.
        remedy: what to do if it can never work.
    """

    library: str
    address: str
    remedy = "choose another tracker, or none: --trainer.logger false"

    def __init__(self, folder: Path):
        self.folder = folder
        self.allow: Callable[[int], None] = lambda size: (
            None
        )  # called before so many bytes are sent

    def start(self) -> int:
        """Return the byte of the metrics file from which on the tracker may not have it."""
        return 0

    @abstractmethod
    def connect(self) -> None:
        """Reach the tracker; nothing is written there yet."""

    @abstractmethod
    def begin(self, settings: Mapping[str, Any] | None) -> None:
        """Open the run's record, and send its settings."""

    @abstractmethod
    def metrics(self, rows: Sequence[Row], position: int) -> None:
        """Send metrics.

        Args:
            rows: in the order of the file.
            position: where they end in the file, in bytes.
        """

    @abstractmethod
    def files(self, names: Sequence[str]) -> None:
        """Send files and folders of the run."""

    @abstractmethod
    def close(self, status: str) -> None:
        """Close the record: `success` or `failed`."""

    def trouble(self, error: Exception) -> BadInput:
        """Return what went wrong as one line."""
        return runs.trouble(error, self.address, self.remedy)


class MLflow(Tracker):
    """A run of an MLflow store.

    No value is logged twice: per metric the store knows the last step that it has, and steps are
    sent in order. After a failure, when it is unknown what arrived, it is asked again.

    Args:
        folder: the run's folder, whose `mlflow.json` holds the id of its record.
        given: the arguments of Lightning's MLFlowLogger.
        number: which of the run's MLflow stores it is; the second one has `mlflow-2.json`.
    """

    library = "mlflow"
    remedy = "set MLFLOW_TRACKING_URI to a server, or unset it, or add --trainer.logger false"

    def __init__(self, folder: Path, given: Mapping[str, Any], number: int = 1):
        super().__init__(folder)
        self._record = _numbered(folder / "mlflow.json", number)
        self.uri = _with_password(given.get("tracking_uri") or runs.tracking_uri())
        self.address = without_passwords(self.uri)
        self._given = given
        self._client: Any = None
        self._steps: dict[str, int] | None = None  # the last step that the store has, by metric
        self.run_id: str | None = given.get("run_id")

    @property
    def _store(self) -> str:
        """The store's name in the record's file: its address, or "embedded", which stays true if
        the runs are moved.
        """
        return "embedded" if self.uri == runs.embedded_uri() else self.address

    def connect(self) -> None:
        client = runs.mlflow_client(self.uri)
        known = runs.read_json(self._record, dict[str, str])
        if not self.run_id and known.get("uri") in (self._store, self.uri):
            self.run_id = str(known.get("run_id"))
        if self.run_id:
            try:
                client.get_run(self.run_id)
            except Exception as error:
                remedy = (
                    f"bring the record back, or delete '{self._record}' to begin a new one there"
                )
                raise runs.trouble(error, self.uri, remedy) from None
        self._client = client

    def begin(self, settings: Mapping[str, Any] | None) -> None:
        if not self.run_id:
            self.run_id = self._new_record()
        runs.write_json(self._record, {"uri": self._store, "run_id": self.run_id})
        if settings:
            self._hyperparameters(flat(acceptable(settings)))

    def _new_record(self) -> str:
        from mlflow.tracking.context.registry import resolve_tags

        name = self._given.get("run_name") or self.folder.name
        tags = resolve_tags(dict(self._given.get("tags") or {}) | {"mlflow.runName": name})
        return self._client.create_run(self._experiment(), tags=tags, run_name=name).info.run_id

    def _experiment(self) -> str:
        """The id of the experiment, which another process may make at the same time."""
        from mlflow.exceptions import MlflowException

        name = self._given.get("experiment_name")
        if name in (None, "lightning_logs"):  # Lightning's default
            name = EXPERIMENT
        place = self._given.get("artifact_location")
        if not place and self._store == "embedded":
            place = runs.artifact_location()
        if found := self._client.get_experiment_by_name(name):
            return found.experiment_id
        try:
            return self._client.create_experiment(name, artifact_location=place)
        except MlflowException:
            if found := self._client.get_experiment_by_name(name):
                return found.experiment_id
            raise

    def _hyperparameters(self, settings: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        known = self._client.get_run(self.run_id).data.params
        fresh = [Param(key, value[:250]) for key, value in settings.items() if key not in known]
        for first in range(0, len(fresh), 100):  # MLflow takes no more at once
            self._client.log_batch(self.run_id, params=fresh[first : first + 100])

    def metrics(self, rows: Sequence[Row], position: int) -> None:
        from mlflow.entities import Metric

        if self._steps is None:
            data = self._client.get_run(self.run_id).data
            self._steps = {metric.key: metric.step for metric in data._metric_objs}
        steps = dict(self._steps)
        now = int(time.time() * 1000)
        fresh = []
        for step, values in rows:
            for name, value in values.items():
                key = self._key(name)
                if step > steps.get(key, -1):
                    steps[key] = step
                    fresh.append(Metric(key, value, now, step))
        self._steps = None  # until all have arrived
        for first in range(0, len(fresh), 1000):  # MLflow takes no more at once
            self._client.log_batch(self.run_id, metrics=fresh[first : first + 1000])
        self._steps = steps

    def _key(self, name: str) -> str:
        """A metric's name as MLflow takes it."""
        prefix = self._given.get("prefix")
        return re.sub(r"[^a-zA-Z0-9_/. -]+", "", f"{prefix}-{name}" if prefix else name)

    def files(self, names: Sequence[str]) -> None:
        def before(path: Path) -> None:
            self.allow(path.stat().st_size)

        runs.log_artifacts(self.folder, str(self.run_id), names, self.uri, before)

    def close(self, status: str) -> None:
        self._client.set_terminated(self.run_id, "FINISHED" if status == "success" else "FAILED")

    def trouble(self, error: Exception) -> BadInput:
        return runs.trouble(error, self.uri, self.remedy)


class Lightning(Tracker):
    """A logger of Lightning, or of a user.

    It cannot be asked which rows it has, so the run's `sent-<class>.json` records that.

    Args:
        folder: the run's folder.
        class_path: where its class is.
        given: its arguments.
        number: which of the run's loggers of that class it is; the second one has
            `sent-<class>-2.json`.
    """

    def __init__(self, folder: Path, class_path: str, given: Mapping[str, Any], number: int = 1):
        super().__init__(folder)
        self.library, _, self.address = class_path.rpartition(".")
        self._class_path, self._given, self._number = class_path, given, number
        self._sent = _numbered(folder / f"sent-{self.address}.json", number)
        self.logger: Any = None

    def start(self) -> int:
        path = self._sent
        if self._number == 1 and not path.exists():
            path = self.folder / "sent.json"  # older runs have one file for all loggers
        sent = runs.read_json(path, dict[str, int]).get(self.address, 0)
        return sent if isinstance(sent, int) else 0

    def connect(self) -> None:
        self.logger = _object(self._class_path, self._given)

    def begin(self, settings: Mapping[str, Any] | None) -> None:
        if settings:
            self.logger.log_hyperparams(acceptable(settings))

    def metrics(self, rows: Sequence[Row], position: int) -> None:
        for step, values in rows:
            self.logger.log_metrics(values, step)
        if rows:
            self.logger.save()
            runs.write_json(self._sent, {self.address: position})

    def files(self, names: Sequence[str]) -> None:
        """Loggers of other libraries have no place for them."""

    def close(self, status: str) -> None:
        self.logger.finalize(status)


class Wandb(Lightning):
    """A run of Weights & Biases, offline unless WANDB_MODE says otherwise.

    The run's `wandb.json` holds its id; that of a second one is in `wandb-2.json`.
    """

    remedy = "log in with `wandb login`, or set WANDB_MODE=offline, and `wandb sync` later"

    def __init__(self, folder: Path, class_path: str, given: Mapping[str, Any], number: int = 1):
        path = _numbered(folder / "wandb.json", number)
        known = runs.read_json(path, dict[str, str])
        if "id" not in known:
            known = {"id": secrets.token_hex(4)}
            runs.write_json(path, known)
        save_dir = given.get("save_dir", ".")
        if save_dir == ".":  # Lightning's default
            save_dir = str(folder)
        place = {
            "name": given.get("name") or folder.name,
            "project": given.get("project") or os.environ.get("WANDB_PROJECT", EXPERIMENT),
            "version": given.get("version") or given.get("id") or known["id"],
            "save_dir": save_dir,
        }
        super().__init__(folder, class_path, {**given, **place}, number)

    def connect(self) -> None:
        os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "120")
        if os.environ.setdefault("WANDB_MODE", "offline") == "online":
            runs.reachable(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"), self.remedy)
        super().connect()

    def begin(self, settings: Mapping[str, Any] | None) -> None:
        _ = self.logger.experiment
        super().begin(settings)

    def files(self, names: Sequence[str]) -> None:
        """A whole run is one artifact, and so is each harvest."""
        import wandb

        bundles = {name.replace("/", "-"): [name] for name in names}
        if names is runs.MIRRORED:
            bundles = {"run": list(names)}
        for title, held in bundles.items():
            artifact = wandb.Artifact(f"{self.folder.name}-{title}", type="spd")
            for name in held:
                path = self.folder / name
                if path.is_dir():
                    artifact.add_dir(str(path), name=name)
                elif path.exists():
                    artifact.add_file(str(path), name=name)
            self.allow(artifact.size)
            self.logger.experiment.log_artifact(artifact)

    def close(self, status: str) -> None:
        super().close(status)
        self.allow(int(os.environ["WANDB_FINISH_TIMEOUT"]) * int(SPEED))
        self.logger.experiment.finish(exit_code=0 if status == "success" else 1)


def trackers(chosen: Any, folder: Path) -> list[Tracker]:
    """Return the trackers that a config's `trainer.logger` chooses: MLflow if it says nothing, none
    if it is false.

    A run that is resumed, or harvested, goes on in its own record.
    """
    if chosen is False:
        return []
    if chosen in (None, True):
        chosen = {"class_path": "MLFlowLogger"}
    alike: Counter[str] = Counter()
    return [
        _tracker(each, folder, alike) for each in (chosen if isinstance(chosen, list) else [chosen])
    ]


def _tracker(chosen: Any, folder: Path, alike: Counter[str]) -> Tracker:
    """Return a tracker, and count it among those of its class."""
    if not isinstance(chosen, Mapping) or "class_path" not in chosen:
        raise BadInput(f"config: trainer.logger: '{chosen}' is not a logger; give its class_path")
    path = str(chosen["class_path"])
    path = path if "." in path else f"lightning.pytorch.loggers.{path}"  # the short form
    classes.check(path)
    given = {**(chosen.get("init_args") or {}), **(chosen.get("dict_kwargs") or {})}
    name = path.rpartition(".")[2]
    alike[name] += 1
    match name:
        case "MLFlowLogger":
            return MLflow(folder, given, alike[name])
        case "WandbLogger":
            return Wandb(folder, path, given, alike[name])
    return Lightning(folder, path, given, alike[name])


def _numbered(path: Path, number: int) -> Path:
    """Return the path for the first, and `name-2.json`, `name-3.json`, … for further ones."""
    return path if number == 1 else path.with_stem(f"{path.stem}-{number}")


def _object(class_path: str, given: Mapping[str, Any]) -> Any:
    """An object of a class, as a config that was checked describes it."""
    made = {}
    for key, value in given.items():
        nested = isinstance(value, Mapping) and "class_path" in value
        made[key] = _object(value["class_path"], value.get("init_args") or {}) if nested else value
    return classes.imported(class_path)(**made)


def _with_password(uri: str) -> str:
    """Return the address to use for one that a config.yaml keeps without its password."""
    if "***" not in uri:
        return uri
    if uri == without_passwords(runs.tracking_uri()):
        return runs.tracking_uri()
    return uri.replace("***@", "")  # MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD may help


def acceptable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as trackers take them: a mapping with names that MLflow refuses (patterns of sites)
    becomes text.
    """
    taken: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            plain = all(re.fullmatch(r"[\w\-. :/]+", str(name)) for name in value)
            value = acceptable(value) if plain else json.dumps(value)
        taken[key] = value
    return taken


def flat(settings: Mapping[str, Any], path: str = "") -> dict[str, str]:
    """Settings as text under their paths, `model/init_args/seed`."""
    leaves: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            leaves |= flat(value, f"{path}{key}/")
        else:
            leaves[f"{path}{key}"] = str(value)
    return leaves
