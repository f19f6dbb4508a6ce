"""Trackers for copies of a run: MLflow, Weights & Biases, or any logger of Lightning.

A class here communicates with one tracker and does not catch its errors. `copies` decides when to
try and how to handle an error.
"""

import json
import os
import re
import secrets
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spd_lightning import classes, runs
from spd_lightning.errors import BadInput, without_passwords
from spd_lightning.runs.lineage import lineage, parts

EXPERIMENT = "spd_lightning"
SPEED = 1e6  # minimum speed of an upload that is waited for, in bytes per second

Row = tuple[int, Mapping[str, float]]
"""A step, and the metrics that were logged at it."""


class Tracker(ABC):
    """A tracker that receives a copy of a run. A method that failed can be called again.

    Each tracker has a separate thread, and a separate file in the run's folder that only this
    thread writes.

    Attributes:
        library: the module that communicates with the tracker.
        address: its name in messages, without passwords.
        remedy: what to do if it can never work.
        allow: called with the number of bytes before a long upload.
    """

    library: str
    address: str
    remedy = "choose another tracker, or none: --trainer.logger false"

    def __init__(self, folder: Path):
        self.folder = folder
        self.allow: Callable[[int], None] = _ignore

    def start(self) -> int:
        """Return the number of leading bytes of the metrics file that the tracker surely has."""
        return 0

    @abstractmethod
    def connect(self) -> None:
        """Connect to the tracker, without writing anything."""

    @abstractmethod
    def begin(self, settings: Mapping[str, Any] | None) -> None:
        """Open the run's record, and send its settings."""

    @abstractmethod
    def metrics(self, rows: Sequence[Row], position: int) -> None:
        """Send metrics.

        Args:
            rows: the metrics, in the order of the file.
            position: the position in the file after the last row, in bytes.
        """

    @abstractmethod
    def files(self, names: Sequence[str]) -> None:
        """Send files and folders of the run."""

    @abstractmethod
    def close(self, status: str) -> None:
        """Close the record with a status, `success` or `failed`."""

    def trouble(self, error: Exception) -> BadInput:
        """Return an error of the tracker as a message of one line."""
        return runs.trouble(error, self.address, self.remedy)


def _ignore(size: int) -> None:
    pass


class MLflow(Tracker):
    """A run of an MLflow store.

    No value is logged twice. The store knows the last step of each metric, and steps are sent in
    order. After a failure it is unknown what has arrived, so the last steps are requested again.

    Args:
        folder: the run's folder, whose `mlflow.json` contains the id of the record.
        given: the arguments of Lightning's MLFlowLogger.
        number: number of this store among the run's MLflow stores; the second has `mlflow-2.json`.
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
        self._steps: dict[str, int] | None = None  # the last step in the store, by metric
        self.run_id: str | None = given.get("run_id")

    @property
    def _store(self) -> str:
        """The name of the store in the record's file.

        It is the address of the store. The embedded store is called "embedded", because its address
        changes when the runs are moved.
        """
        if self.uri == runs.embedded_uri():
            return "embedded"
        return self.address

    def connect(self) -> None:
        client = runs.mlflow_client(self.uri)
        known = runs.read_json(self._record, dict[str, str])
        if not self.run_id and known.get("uri") in (self._store, self.uri):
            self.run_id = str(known.get("run_id"))
        if self.run_id:
            try:
                client.get_run(self.run_id)
            except Exception as error:
                remedy = f"restore the record, or delete '{self._record}' to start a new one"
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
        tags = dict(self._given.get("tags") or {})
        tags = resolve_tags(tags | {"mlflow.runName": name})
        record = self._client.create_run(self._experiment(), tags=tags, run_name=name)
        return record.info.run_id

    def _experiment(self) -> str:
        """Return the id of the experiment, which is created if necessary."""
        from mlflow.exceptions import MlflowException

        name = self._given.get("experiment_name")
        if name in (None, "lightning_logs"):  # Lightning's default
            name = EXPERIMENT
        place = self._given.get("artifact_location")
        if not place and self._store == "embedded":
            place = runs.artifact_location()
        if experiment := self._client.get_experiment_by_name(name):
            return experiment.experiment_id
        try:
            return self._client.create_experiment(name, artifact_location=place)
        except MlflowException:  # another process may have created it in the meantime
            if experiment := self._client.get_experiment_by_name(name):
                return experiment.experiment_id
            raise

    def _hyperparameters(self, settings: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        known = self._client.get_run(self.run_id).data.params
        new = []
        for key, value in settings.items():
            if key not in known:
                new.append(Param(key, value[:250]))
        for params in _batches(new, 100):  # the maximum of MLflow
            self._client.log_batch(self.run_id, params=params)

    def metrics(self, rows: Sequence[Row], position: int) -> None:
        from mlflow.entities import Metric

        if self._steps is None:
            data = self._client.get_run(self.run_id).data
            self._steps = {metric.key: metric.step for metric in data._metric_objs}
        steps = dict(self._steps)
        now = int(time.time() * 1000)
        new = []
        for step, values in rows:
            for name, value in values.items():
                key = self._key(name)
                last = steps.get(key, -1)
                if step > last:
                    steps[key] = step
                    new.append(Metric(key, value, now, step))
        self._steps = None  # unknown until all metrics have arrived
        for metrics in _batches(new, 1000):  # the maximum of MLflow
            self._client.log_batch(self.run_id, metrics=metrics)
        self._steps = steps

    def _key(self, name: str) -> str:
        """Return a metric's name without characters that MLflow rejects."""
        prefix = self._given.get("prefix")
        if prefix:
            name = f"{prefix}-{name}"
        return re.sub(r"[^a-zA-Z0-9_/. -]+", "", name)

    def files(self, names: Sequence[str]) -> None:
        def before(path: Path) -> None:
            size = path.stat().st_size
            self.allow(size)

        runs.log_artifacts(self.folder, str(self.run_id), names, self.uri, before)

    def close(self, status: str) -> None:
        state = "FINISHED" if status == "success" else "FAILED"
        self._client.set_terminated(self.run_id, state)

    def trouble(self, error: Exception) -> BadInput:
        return runs.trouble(error, self.uri, self.remedy)


class Lightning(Tracker):
    """A logger of Lightning or of the user.

    A logger does not know which rows it has, so `sent-<class>.json` in the run's folder records it.

    Args:
        folder: the run's folder.
        class_path: class path of the logger.
        given: arguments of the logger.
        number: number of this logger among the run's loggers of its class; the second has
            `sent-<class>-2.json`.
    """

    def __init__(self, folder: Path, class_path: str, given: Mapping[str, Any], number: int = 1):
        super().__init__(folder)
        self.library, _, self.address = class_path.rpartition(".")
        self._class_path = class_path
        self._given = given
        self._number = number
        self._sent = _numbered(folder / f"sent-{self.address}.json", number)
        self.logger: Any = None

    def start(self) -> int:
        path = self._sent
        if self._number == 1 and not path.exists():
            path = self.folder / "sent.json"  # older runs use one file for all loggers
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
        """Do nothing, because loggers cannot store files."""

    def close(self, status: str) -> None:
        self.logger.finalize(status)


class Wandb(Lightning):
    """A run of Weights & Biases, offline unless WANDB_MODE says otherwise.

    `wandb.json` in the run's folder contains its id; that of a second one is in `wandb-2.json`.
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
        """Send the whole run as one artifact, or each harvest as one artifact."""
        import wandb

        bundles = {name.replace("/", "-"): [name] for name in names}
        if names is runs.MIRRORED:
            bundles = {"run": list(names)}
        for title, members in bundles.items():
            known = {part: lineage(self.folder, part) for part in parts(self.folder, members)}
            kind = "decomposition" if title == "run" else "harvest"
            artifact = wandb.Artifact(f"{self.folder.name}-{title}", kind, metadata=known)
            for name in members:
                path = self.folder / name
                if path.is_dir():
                    artifact.add_dir(str(path), name=name)
                elif path.exists():
                    artifact.add_file(str(path), name=name)
            self.allow(artifact.size)
            self.logger.experiment.log_artifact(artifact)

    def close(self, status: str) -> None:
        super().close(status)
        seconds = int(os.environ["WANDB_FINISH_TIMEOUT"])
        self.allow(seconds * int(SPEED))
        exit_code = 0 if status == "success" else 1
        self.logger.experiment.finish(exit_code=exit_code)


def trackers(chosen: Any, folder: Path) -> list[Tracker]:
    """Return the trackers that a config's `trainer.logger` chooses.

    MLflow is the default; `false` means no tracker. A run that is resumed or harvested continues
    its record.
    """
    if chosen is False:
        return []
    if chosen in (None, True):
        chosen = {"class_path": "MLFlowLogger"}
    if not isinstance(chosen, list):
        chosen = [chosen]
    counts: Counter[str] = Counter()
    return [_tracker(logger, folder, counts) for logger in chosen]


def _tracker(chosen: Any, folder: Path, counts: Counter[str]) -> Tracker:
    """Return the tracker of a logger in a config, and count its class."""
    if not isinstance(chosen, Mapping) or "class_path" not in chosen:
        raise BadInput(f"config: trainer.logger: '{chosen}' is not a logger; give its class_path")
    path = str(chosen["class_path"])
    if "." not in path:  # the short form
        path = f"lightning.pytorch.loggers.{path}"
    classes.check(path)
    given = dict(chosen.get("init_args") or {})
    given |= chosen.get("dict_kwargs") or {}
    name = path.rpartition(".")[2]
    counts[name] += 1
    number = counts[name]
    match name:
        case "MLFlowLogger":
            return MLflow(folder, given, number)
        case "WandbLogger":
            return Wandb(folder, path, given, number)
    return Lightning(folder, path, given, number)


def _numbered(path: Path, number: int) -> Path:
    """Return the path for the first, and `name-2.json`, `name-3.json`, … for further ones."""
    if number == 1:
        return path
    return path.with_stem(f"{path.stem}-{number}")


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    """Yield parts of a list of at most this size."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _object(class_path: str, given: Mapping[str, Any]) -> Any:
    """Build the object that a checked config describes."""
    arguments = {}
    for key, value in given.items():
        if isinstance(value, Mapping) and "class_path" in value:
            value = _object(value["class_path"], value.get("init_args") or {})
        arguments[key] = value
    return classes.imported(class_path)(**arguments)


def _with_password(uri: str) -> str:
    """Return an address with the password that config.yaml has hidden, if it is known."""
    if "***" not in uri:
        return uri
    known = runs.tracking_uri()
    if uri == without_passwords(known):
        return known
    return uri.replace("***@", "")  # MLflow can read the user and the password from the environment


def acceptable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings in a form that trackers accept.

    A mapping becomes text if MLflow would reject its keys, such as patterns of sites.
    """
    accepted: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            plain = all(re.fullmatch(r"[\w\-. :/]+", str(name)) for name in value)
            value = acceptable(value) if plain else json.dumps(value)
        accepted[key] = value
    return accepted


def flat(settings: Mapping[str, Any], path: str = "") -> dict[str, str]:
    """Return settings as text by their paths, such as `model/init_args/seed`."""
    leaves: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            leaves |= flat(value, f"{path}{key}/")
        else:
            leaves[f"{path}{key}"] = str(value)
    return leaves
