"""What a run tells others: a metrics file of its own, and a copy of everything for the tracker."""

import contextlib
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Settings are in config.yaml."""


def chosen_loggers(chosen: Any, folder: Path) -> list[Logger]:
    """The run's own metrics file, and the tracker a config chooses: MLflow where it says nothing, none for false."""
    match chosen:
        case None | True:
            trackers: list[Logger] = [mlflow_logger(folder)]
        case False:
            trackers = []
        case Logger():
            trackers = [chosen]
        case _:
            trackers = list(chosen)
    return [MetricsFile(folder), *trackers]


def mlflow_logger(folder: Path) -> MLFlowLogger:
    """A logger to the embedded MLflow store (or $MLFLOW_TRACKING_URI); a resumed run goes on in its own record.

    Raises:
        BadInput: the tracker does not answer.
    """
    uri = runs.tracking_uri()
    runs.reachable(uri)
    known = runs.read_json(folder / "mlflow.json")
    logger = MLFlowLogger(
        experiment_name=EXPERIMENT,
        run_name=folder.name,
        run_id=known.get("run_id") if known.get("uri") == uri else None,
        tracking_uri=uri,
        artifact_location=runs.artifact_location(),
    )
    with _answering(uri):
        runs.write_json(folder / "mlflow.json", {"uri": uri, "run_id": logger.run_id})
    return logger


@contextlib.contextmanager
def _answering(uri: str):
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise BadInput(f"tracker '{uri}': {' '.join(str(error).split())[:200]}; check MLFLOW_TRACKING_URI") from error


def publish(trainer: Trainer, folder: Path, names: Sequence[str] = runs.MIRRORED) -> None:
    """Copies a run's files to every tracker of a trainer: into the MLflow run, or as one W&B artifact a call."""
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        match logger:
            case MLFlowLogger():
                runs.log_artifacts(folder, str(logger.run_id), names)
            case WandbLogger():
                _publish_wandb(logger, folder, names)


def _publish_wandb(logger: WandbLogger, folder: Path, names: Sequence[str]) -> None:
    import wandb

    artifact = wandb.Artifact(f"{folder.name}-{names[0].replace('/', '-') if len(names) == 1 else 'run'}", type="spd")
    for name in names:
        path = folder / name
        if path.is_dir():
            artifact.add_dir(str(path), name=name)
        elif path.exists():
            artifact.add_file(str(path), name=name)
    logger.experiment.log_artifact(artifact)
