"""Trackers hold copies of runs: where MLflow's are, and how files go up to it and come down from it or from W&B."""

import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from spd_lightning.errors import BadInput, nearest
from spd_lightning.files import root

MIRRORED = (
    "config.yaml",
    "run.json",
    "summary.json",
    "decomposition.safetensors",
    "decomposition.json",
    "metrics.jsonl",
    "figures",
    "harvest",
)
"""What of a run folder a tracker gets; checkpoints are for resuming and stay."""


def tracking_uri() -> str:
    """Where MLflow's records are: $MLFLOW_TRACKING_URI, or a sqlite file below the root, which needs no server."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root().resolve()}/mlflow.db"


def artifact_location() -> str | None:
    """Where a new experiment of the embedded store keeps its artifacts; a server decides for itself (None)."""
    return None if os.environ.get("MLFLOW_TRACKING_URI") else (root().resolve() / "mlartifacts").as_uri()


_EMBEDDED = "start its server, or unset MLFLOW_TRACKING_URI to use the embedded store"


def reachable(uri: str, remedy: str = _EMBEDDED) -> None:
    """Try a tracker's address before its client retries for minutes; an embedded store always answers.

    Raises:
        BadInput: nothing listens at an http(s) address within 3 s.
    """
    if not uri.startswith(("http://", "https://")):
        return
    try:
        parts = urlsplit(uri)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=3).close()
    except (OSError, ValueError) as error:
        raise BadInput(f"tracker '{uri}': no answer ({error}); {remedy}") from error


@contextmanager
def _mlflow(uri: str) -> Iterator[Any]:
    """A client of the tracker; what it cannot do becomes one line."""
    reachable(uri)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise BadInput(f"tracker '{uri}': no such file yet; run a fit, or set MLFLOW_TRACKING_URI")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        yield MlflowClient(tracking_uri=uri)
    except MlflowException as error:
        why = " ".join(str(error).split())[:200]
        raise BadInput(f"tracker '{uri}': {why}; check the reference and MLFLOW_TRACKING_URI") from error


def log_artifacts(folder: Path, mlflow_run: str, names: Sequence[str] = MIRRORED, uri: str | None = None) -> None:
    """Copy a run folder's files to its MLflow run, at the same places, so that a pulled run opens like this one.

    Args:
        folder: the run's folder.
        mlflow_run: the id of the MLflow run.
        names: which files and folders, relative to the folder (`harvest/graphs`, …); missing ones are passed over.
        uri: the tracker; the usual one where left out.

    Raises:
        BadInput: the tracker does not answer, or does not know the run.
    """
    with _mlflow(uri or tracking_uri()) as client:
        for name in names:
            for path in [folder / name, *sorted((folder / name).rglob("*"))]:
                if path.is_file() and not path.name.startswith("."):
                    parent = path.parent.relative_to(folder).as_posix()
                    client.log_artifact(mlflow_run, str(path), None if parent == "." else parent)


def pull_mlflow(what: str, folder: Path) -> tuple[str, str]:
    """Download a run's artifacts.

    Args:
        what: a run's id, or a name; of several runs with it the latest.
        folder: where they go.

    Returns:
        The run's name and its id.

    Raises:
        BadInput: no such run, no artifacts, no answer, or an artifact that points outside the folder.
    """
    with _mlflow(tracking_uri()) as client:
        info = _mlflow_run(client, what).info
        files = list(_mlflow_files(client, info.run_id, None))
        for path in files:
            check_inside(path, what)
        client.download_artifacts(info.run_id, "", str(folder))
    if not files:
        raise BadInput(f"run 'mlflow:{what}': it has no artifacts; log the run's folder first")
    return info.run_name, info.run_id


def _mlflow_run(client: Any, what: str) -> Any:
    if re.fullmatch(r"[0-9a-f]{32}", what):
        return client.get_run(what)
    held = [experiment.experiment_id for experiment in client.search_experiments()]
    latest = {"order_by": ["attributes.start_time DESC"], "max_results": 1000}
    quoted = what.replace("'", "")
    for run in client.search_runs(held, f"attributes.run_name = '{quoted}'", **latest):
        if run.info.run_name == what:
            return run
    names = {run.info.run_name for run in client.search_runs(held, **latest)}
    raise BadInput(f"run 'mlflow:{what}': not in {tracking_uri()}; {nearest(what, names)}")


def _mlflow_files(client: Any, run_id: str, folder: str | None) -> Iterator[str]:
    for item in client.list_artifacts(run_id, folder):
        if item.is_dir:
            yield from _mlflow_files(client, run_id, item.path)
        else:
            yield item.path


def check_inside(path: str, what: str) -> None:
    """A tracker names the files that it sends: none may leave the folder that they go to.

    Raises:
        BadInput: this one would.
    """
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or "\\" in path:
        raise BadInput(f"artifact '{path}' of '{what}': it points outside the run's folder; do not trust this tracker")


def pull_wandb(what: str, folder: Path) -> tuple[str, str]:
    """Download a W&B artifact.

    Args:
        what: <entity>/<project>/<artifact>:<version>.
        folder: where its files go.

    Returns:
        The artifact's name and its qualified name.

    Raises:
        BadInput: no such artifact, no answer, not logged in, or a file that points outside the folder.
    """
    if not re.fullmatch(r"[^/:]+/[^/:]+/[^/:]+:[^/:]+", what):
        raise BadInput(f"reference 'wandb:{what}': write wandb:<entity>/<project>/<artifact>:<version>")
    import wandb

    try:
        artifact = wandb.Api().artifact(what)
        for path in artifact.manifest.entries:
            check_inside(path, what)
        artifact.download(root=str(folder))
    except BadInput:
        raise
    except (wandb.Error, ValueError, OSError) as error:
        why = " ".join(str(error).split())[:200]
        raise BadInput(f"artifact 'wandb:{what}': {why}; check the name, and log in with `wandb login`") from error
    return what.split("/")[-1].partition(":")[0], artifact.qualified_name
