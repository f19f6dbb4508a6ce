"""Trackers that hold copies of runs: their addresses, tests of a connection, and file transfers."""

import contextlib
import fcntl
import logging
import os
import re
import shutil
import socket
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import SplitResult, quote, unquote, urlsplit

from spd_lightning.errors import BadInput, nearest, without_passwords
from spd_lightning.files import root, sweep
from spd_lightning.runs.files import writable, write_whole
from spd_lightning.runs.lineage import recorded_in, tags

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
"""The files of a run that are copied to a tracker; checkpoints, used to resume, are not."""


EMBEDDED = "mlflow.db"
"""The database file of the embedded store, in the root folder."""

ARTIFACTS = "mlartifacts"
"""The folder with the artifacts of the embedded store, in the root folder."""

_START = "start its server, or unset MLFLOW_TRACKING_URI to use the embedded store"
_CHECK = "check MLFLOW_TRACKING_URI, or unset it to use the embedded store"
_PATIENCE = 3  # seconds to wait for an answer of an address


class NoAnswer(BadInput):
    """The error for a tracker that does not answer; a later attempt can succeed."""


# ---- addresses -----------------------------------------------------------------------------------


def tracking_uri() -> str:
    """Return the address of MLflow's records: $MLFLOW_TRACKING_URI, or the embedded store's."""
    return os.environ.get("MLFLOW_TRACKING_URI") or embedded_uri()


def embedded_uri() -> str:
    """Return the address of the embedded store, a sqlite file in the root folder.

    SQLAlchemy reads a path as a URL, so `%` and `?` must be escaped. MLflow creates the parent
    folder of a path that follows `sqlite:///`, but it ignores the escapes and would leave an empty
    folder with the wrong name. It does not do so if the address names the driver.
    """
    path = str(root().resolve() / EMBEDDED)
    if "%" in path or "?" in path:
        return f"sqlite+pysqlite:///{quote(path)}"
    return f"sqlite:///{path}"


def artifact_location() -> str | None:
    """Return the address for the artifacts of a new experiment, or None if a server chooses it."""
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return None
    folder = root().resolve() / ARTIFACTS
    return folder.as_uri()


def _sqlite_file(uri: str) -> Path | None:
    """Return the file of a sqlite store, or None for any other store."""
    match = re.match(r"sqlite(?:\+\w+)?:///([^?]+)", uri)
    if match is None:
        return None
    return Path(unquote(match[1]))


# ---- connections ---------------------------------------------------------------------------------


def reachable(uri: str, remedy: str = _START) -> None:
    """Try to connect to a tracker for a few seconds, since its client would retry for minutes.

    A server must send any response to a request, a database must accept a connection, and a sqlite
    file must not be locked by another process.

    Raises:
        NoAnswer: the tracker cannot be reached.
    """
    try:
        if path := _sqlite_file(uri):
            _try_sqlite(path)
        elif "://" in uri and not uri.startswith("file:"):
            _try_address(urlsplit(uri))
    except (OSError, ValueError, sqlite3.Error) as error:
        why = without_passwords(str(error)) or type(error).__name__
        raise NoAnswer(
            f"tracker '{without_passwords(uri)}': no answer ({why}); {remedy}"
        ) from error


def _try_sqlite(path: Path) -> None:
    """Open and close a write transaction, which fails if another process locks the file."""
    if not path.exists():
        return
    connection = sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None)
    with contextlib.closing(connection) as database:
        database.execute("BEGIN IMMEDIATE")
        database.execute("ROLLBACK")


_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}


def _try_address(parts: SplitResult) -> None:
    """Connect to a server or a database; an address of any other scheme is not tested."""
    scheme = parts.scheme.partition("+")[0]
    if scheme not in _PORTS:
        return
    host = parts.hostname or ""
    port = parts.port or _PORTS[scheme]
    if scheme not in ("http", "https"):
        socket.create_connection((host, port), timeout=_PATIENCE).close()
        return
    _try_http(parts, scheme, host, port)


def _try_http(parts: SplitResult, scheme: str, host: str, port: int) -> None:
    import ssl
    from http.client import HTTPConnection, HTTPException, HTTPSConnection
    from urllib.request import getproxies, proxy_bypass

    if getproxies().get(scheme) and not proxy_bypass(host):
        return  # the client goes through the proxy, which this check does not
    connection = HTTPConnection(host, port, timeout=_PATIENCE)
    if scheme == "https":
        # The certificate is not verified: no secret is sent, and the client verifies it later.
        unverified = ssl.create_default_context()
        unverified.check_hostname = False
        unverified.verify_mode = ssl.CERT_NONE
        connection = HTTPSConnection(host, port, timeout=_PATIENCE, context=unverified)
    try:
        connection.request("GET", f"{parts.path.rstrip('/')}/health")
        connection.getresponse()
    except HTTPException as error:
        raise OSError(f"not an HTTP server: {type(error).__name__}") from error
    finally:
        connection.close()


# ---- MLflow's client -----------------------------------------------------------------------------


def mlflow_client(uri: str) -> Any:
    """Return a client of an MLflow store; a missing sqlite store is created first.

    Requests give up after 20 s and one retry, unless MLflow's environment variables set other
    limits. (MLflow's defaults are 120 s and seven retries with growing delays.)

    Raises:
        NoAnswer: the store does not answer.
    """
    reachable(uri)
    _limit_retries()
    from mlflow import MlflowClient

    path = _sqlite_file(uri)
    with _sqlite_lock(path):
        if path:
            sweep(path.parent)  # a store that a killed process was making
            if not path.exists():
                _make_store(path)
        return MlflowClient(tracking_uri=uri)


def _make_store(path: Path) -> None:
    """Create an empty sqlite store completely or not at all.

    If MLflow created it in place, a killed process could leave a store without some of its tables.
    """
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with write_whole(path) as temporary:
        address = f"sqlite+pysqlite:///{quote(str(temporary.resolve()))}"
        SqlAlchemyStore(address, DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH).engine.dispose()


def _limit_retries() -> None:
    """Limit the time that MLflow spends on a request, and silence its loggers."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    # We report errors ourselves, once.
    for name in ("alembic", "urllib3.connectionpool", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def _sqlite_lock(path: Path | None) -> Iterator[None]:
    """Hold a lock next to a sqlite store; do nothing for other stores.

    A store breaks if two processes create or migrate it at the same time.
    """
    if path is None:
        yield
        return
    with writable(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_name(f".{path.name}.lock"), "w")  # noqa: SIM115  (closed below)
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


_TEMPORARY_CODES = {"TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"}


def trouble(error: BaseException, uri: str, remedy: str = _CHECK) -> BadInput:
    """Turn an error of a tracker into one line that does not contain its password.

    The result is a NoAnswer if a later attempt can succeed, because the connection failed or the
    store is locked or overloaded.
    """
    if isinstance(error, BadInput):
        return error
    text = " ".join(str(error).split()) or type(error).__name__
    with contextlib.suppress(ValueError):
        if password := urlsplit(uri).password:
            text = text.replace(password, "***").replace(unquote(password), "***")
    path = _sqlite_file(uri)
    if path and "already exists" in text:
        remedy = (
            f"a process was killed while it changed the tables: move '{path.name}' away, and push "
            "the runs"
        )
    line = f"tracker '{without_passwords(uri)}': {without_passwords(text)[:200]}; {remedy}"
    temporary = (
        isinstance(error, OSError)
        or type(error).__name__ == "OperationalError"
        or "API request to" in text
        or getattr(error, "error_code", None) in _TEMPORARY_CODES
    )
    return NoAnswer(line) if temporary else BadInput(line)


@contextmanager
def _mlflow(uri: str) -> Iterator[Any]:
    """Yield a client of the tracker, and turn its errors into one line."""
    if (path := _sqlite_file(uri)) and not path.exists():
        raise BadInput(f"tracker '{uri}': no such file yet; run a fit, or set MLFLOW_TRACKING_URI")
    try:
        yield mlflow_client(uri)
    except BadInput:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename:  # an error of the local disk
            raise
        raise trouble(error, uri, "check the reference and MLFLOW_TRACKING_URI") from None


# ---- uploads and downloads -----------------------------------------------------------------------


def log_artifacts(
    folder: Path,
    mlflow_run: str,
    names: Sequence[str] = MIRRORED,
    uri: str | None = None,
    before: Callable[[Path], None] = lambda path: None,
) -> None:
    """Copy the files of a run folder to its MLflow run, under the same relative paths.

    Args:
        folder: the run's folder.
        mlflow_run: the id of the MLflow run.
        names: the files and folders to copy, relative to `folder` (`harvest/graphs`, …); missing
            ones are skipped.
        uri: the address of the tracker; `tracking_uri()` if omitted.
        before: a function that is called with every file just before it is copied.

    The lineage of the copied parts is recorded as tags (`lineage`).

    Raises:
        BadInput: the tracker does not answer, or the run is not on it.
    """
    uri = uri or tracking_uri()
    with _mlflow(uri) as client:
        local = _artifact_folder(client, uri, mlflow_run)
        for name in names:
            for path in [folder / name, *sorted((folder / name).rglob("*"))]:
                if not path.is_file() or path.name.startswith("."):
                    continue
                before(path)
                place = path.relative_to(folder)
                if local:
                    _copy(path, local / place)
                    continue
                parent = place.parent.as_posix()
                artifact_path = None if parent == "." else parent
                client.log_artifact(mlflow_run, str(path), artifact_path)
        for key, value in tags(folder, names).items():
            client.set_tag(mlflow_run, key, value)


def _copy(path: Path, to: Path) -> None:
    with writable(to):
        to.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(to) as temporary:
        shutil.copyfile(path, temporary)


def _artifact_folder(client: Any, uri: str, run_id: str) -> Path | None:
    """Return the folder of a run's artifacts on this machine, or None if a server has them.

    A sqlite store records the path of the artifacts at the start of the run. If the runs folder was
    moved since, the artifacts moved with it. So this function looks next to the store first.
    """
    store = _sqlite_file(uri)
    info = client.get_run(run_id).info
    recorded = urlsplit(info.artifact_uri)
    if store is None or recorded.scheme not in ("", "file"):
        return None
    recorded_path = Path(unquote(recorded.path))
    near_store = store.parent / ARTIFACTS / run_id / "artifacts"
    same_names = recorded_path.parts[-3:] == near_store.parts[-3:]
    if same_names and (near_store.exists() or not recorded_path.exists()):
        return near_store
    return recorded_path


class Download(NamedTuple):
    """The facts about a download that its tracker knows.

    Attributes:
        name: the name of the run or artifact.
        origin: its identifier in the tracker.
        lineage: the recorded lineage of its parts; any values, since anybody may have written it.
    """

    name: str
    origin: str
    lineage: Mapping[str, Any]


def pull_mlflow(what: str, folder: Path) -> Download:
    """Download a run's artifacts.

    Args:
        what: a run's id or name; the latest run if several have this name.
        folder: the folder for the files.

    Raises:
        BadInput: the run does not exist or has no artifacts, the tracker does not answer, or an
            artifact points outside the folder.
    """
    with _mlflow(tracking_uri()) as client:
        run = _mlflow_run(client, what)
        info = run.info
        local = _artifact_folder(client, tracking_uri(), info.run_id)
        if local:
            files = _files_below(local)
        else:
            files = list(_mlflow_files(client, info.run_id, None))
        for path in files:
            check_inside(path, what)
        if local:
            for path in files:
                _copy(local / path, folder / path)
        else:
            client.download_artifacts(info.run_id, "", str(folder))
    if not files:
        raise BadInput(f"run 'mlflow:{what}': it has no artifacts; log the run's folder first")
    return Download(info.run_name, info.run_id, recorded_in(run.data.tags))


def _mlflow_run(client: Any, what: str) -> Any:
    """Find the run with an id, or the latest run with a name."""
    if re.fullmatch(r"[0-9a-f]{32}", what):
        return client.get_run(what)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    latest = {"order_by": ["attributes.start_time DESC"], "max_results": 1000}
    quotable = what.replace("'", "")
    named = f"attributes.run_name = '{quotable}'"
    for run in client.search_runs(experiments, named, **latest):
        if run.info.run_name == what:
            return run
    names = {run.info.run_name for run in client.search_runs(experiments, **latest)}
    raise BadInput(
        f"run 'mlflow:{what}': not in {without_passwords(tracking_uri())}; {nearest(what, names)}"
    )


def _files_below(folder: Path) -> list[str]:
    """Return the relative paths of all files below a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return [path.relative_to(folder).as_posix() for path in files]


def _mlflow_files(client: Any, run_id: str, folder: str | None) -> Iterator[str]:
    """Yield the relative paths of all artifacts of a run that a server has."""
    for item in client.list_artifacts(run_id, folder):
        if item.is_dir:
            yield from _mlflow_files(client, run_id, item.path)
        else:
            yield item.path


def check_inside(path: str, what: str) -> None:
    """Check that a file name from a tracker stays inside the folder of the download.

    Raises:
        BadInput: it points outside.
    """
    parsed = PurePosixPath(path)
    if parsed.is_absolute() or ".." in parsed.parts or "\\" in path:
        raise BadInput(
            f"artifact '{path}' of '{what}': it points outside the run's folder; do not trust this "
            "tracker"
        )


def pull_wandb(what: str, folder: Path) -> Download:
    """Download a W&B artifact.

    Args:
        what: <entity>/<project>/<artifact>:<version>.
        folder: the folder for its files.

    Raises:
        BadInput: the artifact does not exist, W&B does not answer, the user is not logged in, or a
            file points outside the folder.
    """
    if not re.fullmatch(r"[^/:]+/[^/:]+/[^/:]+:[^/:]+", what):
        raise BadInput(
            f"reference 'wandb:{what}': write wandb:<entity>/<project>/<artifact>:<version>"
        )
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
        raise BadInput(
            f"artifact 'wandb:{what}': {why}; check the name, and log in with `wandb login`"
        ) from error
    name = what.split("/")[-1].partition(":")[0]
    return Download(name, artifact.qualified_name, artifact.metadata)
