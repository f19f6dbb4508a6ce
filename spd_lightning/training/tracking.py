"""What a run tells others: a metrics file of its own, and a copy of everything for the tracker."""

import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from spd_lightning import runs
from spd_lightning.errors import BadInput

EXPERIMENT = "spd_lightning"


class MetricsFile(Logger):
    """Logs to the run's own metrics.jsonl, which the viewer's curves are drawn from.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        runs.append_metrics(self.folder, step or 0, metrics)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Settings are in config.yaml."""


def placed(chosen: Any, folder: Path) -> list[Namespace] | Literal[False]:
    """The settings of the trackers that a config chooses, completed by what only the run knows.

    MLflow where it says nothing, none for false. A run that is resumed, or harvested, goes on in its own record.

    Raises:
        BadInput: a tracker does not answer.
    """
    if chosen is False:
        return False
    chosen = Namespace(class_path="lightning.pytorch.loggers.MLFlowLogger") if chosen in (None, True) else chosen
    trackers = chosen if isinstance(chosen, list) else [chosen]
    for tracker in trackers:
        given = tracker.get("init_args") or Namespace()
        place = _PLACES.get(tracker.class_path.rpartition(".")[2], lambda given, folder: {})
        tracker.init_args = Namespace({**given.as_dict(), **place(given, folder)})
    return trackers


def _mlflow_place(given: Namespace, folder: Path) -> dict[str, Any]:
    uri = given.get("tracking_uri") or runs.tracking_uri()
    runs.reachable(uri)
    known, ours = runs.read_json(folder / "mlflow.json"), uri == runs.tracking_uri()
    experiment = given.get("experiment_name", "lightning_logs")  # Lightning's default
    return {
        "tracking_uri": uri,
        "experiment_name": EXPERIMENT if experiment == "lightning_logs" else experiment,
        "run_name": given.get("run_name") or folder.name,
        "run_id": given.get("run_id") or (known.get("run_id") if known.get("uri") == uri else None),
        "artifact_location": given.get("artifact_location") or (runs.artifact_location() if ours else None),
    }


def _wandb_place(given: Namespace, folder: Path) -> dict[str, Any]:
    if os.environ.setdefault("WANDB_MODE", "offline") == "online":
        address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
        runs.reachable(address, "set WANDB_MODE=offline, and `wandb sync` later")
    path = folder / "wandb.json"
    if not path.exists():
        runs.write_json(path, {"id": secrets.token_hex(4)})
    save_dir = given.get("save_dir", ".")  # Lightning's default
    return {
        "name": given.get("name") or folder.name,
        "project": given.get("project") or os.environ.get("WANDB_PROJECT", EXPERIMENT),
        "version": given.get("version") or given.get("id") or runs.read_json(path)["id"],
        "save_dir": str(folder) if save_dir == "." else save_dir,
    }


_PLACES = {"MLFlowLogger": _mlflow_place, "WandbLogger": _wandb_place}


def begin(trainer: Trainer, folder: Path, settings: Mapping[str, Any] | None = None) -> None:
    """Opens a run's records: its MLflow run is noted in mlflow.json, and settings become its hyperparameters."""
    if not trainer.is_global_zero:
        return
    with answering(f"bring it back, or delete '{folder / 'mlflow.json'}' to begin a new record there"):
        for logger in trainer.loggers:
            if isinstance(logger, MLFlowLogger):
                facts = {"uri": logger.experiment.tracking_uri, "run_id": logger.run_id}
                runs.write_json(folder / "mlflow.json", facts)
            if settings:
                logger.log_hyperparams(acceptable(settings))


def acceptable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as trackers take them: a mapping with names that MLflow refuses (patterns of sites) becomes text."""
    taken: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            plain = all(re.fullmatch(r"[\w\-. :/]+", str(name)) for name in value)
            value = acceptable(value) if plain else json.dumps(value)
        taken[key] = value
    return taken


@contextlib.contextmanager
def answering(remedy: str) -> Iterator[None]:
    """A tracker that fails in the middle of work ends it with one line; what the run holds by itself is kept.

    Raises:
        BadInput: it failed.
    """
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("mlflow.", "wandb.", "requests.", "urllib3.")):
            raise
        why = " ".join(str(error).split())[:200]
        raise BadInput(f"tracker: {why}; {remedy}") from error


def publish(trainer: Trainer, folder: Path, names: Sequence[str] = runs.MIRRORED) -> None:
    """Copies a run's files to every tracker of a trainer; the last that these hear of a command.

    They go into the MLflow run; on W&B a whole run is one artifact, and so is each harvest.
    """
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        match logger:
            case MLFlowLogger():
                runs.log_artifacts(folder, str(logger.run_id), names, logger.experiment.tracking_uri)
            case WandbLogger():
                _publish_wandb(logger, folder, names)


def _publish_wandb(logger: WandbLogger, folder: Path, names: Sequence[str]) -> None:
    import wandb

    bundles = {"run": names} if names is runs.MIRRORED else {name.replace("/", "-"): [name] for name in names}
    for title, held in bundles.items():
        artifact = wandb.Artifact(f"{folder.name}-{title}", type="spd")
        for name in held:
            path = folder / name
            if path.is_dir():
                artifact.add_dir(str(path), name=name)
            elif path.exists():
                artifact.add_file(str(path), name=name)
        logger.experiment.log_artifact(artifact)
    logger.experiment.finish()
