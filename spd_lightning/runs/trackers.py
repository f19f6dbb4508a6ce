"""Trackers hold copies of runs: where they are, whether they answer, how files go up and down."""

import contextlib
import fcntl
import logging
import os
import re
import shutil
import socket
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urlsplit

from spd_lightning.errors import BadInput, nearest, without_passwords
from spd_lightning.files import root
from spd_lightning.runs.files import writable, write_whole

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


EMBEDDED = "mlflow.db"
"""The file of the embedded store, below the root."""

ARTIFACTS = "mlartifacts"
"""The folder of its artifacts, next to it."""

_START = "start its server, or unset MLFLOW_TRACKING_URI to use the embedded store"
_CHECK = "check MLFLOW_TRACKING_URI, or unset it to use the embedded store"
_PATIENCE = 3  # seconds that an address has to answer


class NoAnswer(BadInput):
    """A tracker does not answer now; it may later."""


# ---- where the records are -----------------------------------------------------------------------


def tracking_uri() -> str:
    """Where MLflow's records are: $MLFLOW_TRACKING_URI, or a sqlite file below the root, which
    needs no server.
    """
    return os.environ.get("MLFLOW_TRACKING_URI") or embedded_uri()


def embedded_uri() -> str:
    """The address of the embedded store.

    SQLAlchemy reads a path as a URL: `%` and `?` in it must be escaped. MLflow makes the parent
    folder of a path that follows `sqlite:///` without reading the escapes, which would leave an
    empty folder of the wrong name behind; it does not if the driver is named.
    """
    path = str(root().resolve() / EMBEDDED)
    if "%" in path or "?" in path:
        return f"sqlite+pysqlite:///{quote(path)}"
    return f"sqlite:///{path}"


def artifact_location() -> str | None:
    """Where a new experiment of the embedded store keeps its artifacts; a server decides for itself
    (None).
    """
    return (
        None if os.environ.get("MLFLOW_TRACKING_URI") else (root().resolve() / ARTIFACTS).as_uri()
    )


def _sqlite_file(uri: str) -> Path | None:
    """The file of a sqlite store; None for any other."""
    found = re.match(r"sqlite(?:\+\w+)?:///([^?]+)", uri)
    return Path(unquote(found[1])) if found else None


# ---- whether they can be reached -----------------------------------------------------------------


def reachable(uri: str, remedy: str = _START) -> None:
    """Try a tracker's address for a few seconds, before its client retries for minutes.

    A server must answer a request, whatever it answers; a database must accept a connection; a
    sqlite file must not be locked by another process.

    Raises:
        NoAnswer: it does not.
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
    if not path.exists():
        return
    with contextlib.closing(
        sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None)
    ) as database:
        database.execute("BEGIN IMMEDIATE")
        database.execute("ROLLBACK")


_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}


def _try_address(parts: SplitResult) -> None:
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
        unverified = (
            ssl.create_default_context()
        )  # nothing secret is sent; the client itself verifies
        unverified.check_hostname = False
        unverified.verify_mode = ssl.CERT_NONE
        connection = HTTPSConnection(host, port, timeout=_PATIENCE, context=unverified)
    try:
        connection.request("GET", f"{parts.path.rstrip('/')}/health")
        connection.getresponse()
    except HTTPException as error:
        raise OSError(f"it does not speak HTTP: {type(error).__name__}") from error
    finally:
        connection.close()


# ---- MLflow's client -----------------------------------------------------------------------------


def mlflow_client(uri: str) -> Any:
    """Return a client of an MLflow store; a sqlite store that does not exist yet is made, by one
    process at a time.

    Requests give up after 20 s and one retry, unless MLflow's own variables say otherwise (its
    defaults are 120 s and seven retries, which wait longer and longer).

    Raises:
        NoAnswer: the store does not answer.
    """
    reachable(uri)
    _be_brief()
    from mlflow import MlflowClient

    with _made_by_one(uri):
        if (path := _sqlite_file(uri)) and not path.exists():
            _make_store(path)
        return MlflowClient(tracking_uri=uri)


def _make_store(path: Path) -> None:
    """Make an empty sqlite store, whole or not at all: a process killed between its tables would
    leave a broken one.
    """
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with write_whole(path) as temporary:
        address = f"sqlite+pysqlite:///{quote(str(temporary.resolve()))}"
        SqlAlchemyStore(address, DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH).engine.dispose()


def _be_brief() -> None:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    # What fails is reported by us, once.
    for name in ("alembic", "urllib3.connectionpool", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def _made_by_one(uri: str) -> Iterator[None]:
    """Hold a lock next to a sqlite store, which breaks if two processes create or migrate it at
    once.
    """
    path = _sqlite_file(uri)
    if path is None:
        yield
        return
    with writable(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_name(f".{path.name}.lock"), "w")  # noqa: SIM115  (closed below)
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


_LATER = {"TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"}


def trouble(error: BaseException, uri: str, remedy: str = _CHECK) -> BadInput:
    """Return what went wrong with a tracker as one line, which never holds its password.

    It is a NoAnswer if the same may work later: the connection failed, or the store is locked or
    overloaded.
    """
    if isinstance(error, BadInput):
        return error
    text = " ".join(str(error).split()) or type(error).__name__
    with contextlib.suppress(ValueError):
        if password := urlsplit(uri).password:
            text = text.replace(password, "***").replace(unquote(password), "***")
    if "already exists" in text and (path := _sqlite_file(uri)):
        remedy = (
            f"a process was killed while it changed the tables: move '{path.name}' away, and push "
            "the runs"
        )
    said = f"tracker '{without_passwords(uri)}': {without_passwords(text)[:200]}; {remedy}"
    later = getattr(error, "error_code", None) in _LATER or "API request to" in text
    later = later or type(error).__name__ == "OperationalError" or isinstance(error, OSError)
    return NoAnswer(said) if later else BadInput(said)


@contextmanager
def _mlflow(uri: str) -> Iterator[Any]:
    """A client of the tracker; what it cannot do becomes one line."""
    if (path := _sqlite_file(uri)) and not path.exists():
        raise BadInput(f"tracker '{uri}': no such file yet; run a fit, or set MLFLOW_TRACKING_URI")
    try:
        yield mlflow_client(uri)
    except BadInput:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename:  # our own disk
            raise
        raise trouble(error, uri, "check the reference and MLFLOW_TRACKING_URI") from None


# ---- files up and down ---------------------------------------------------------------------------


def log_artifacts(
    folder: Path,
    mlflow_run: str,
    names: Sequence[str] = MIRRORED,
    uri: str | None = None,
    before: Callable[[Path], None] = lambda path: None,
) -> None:
    """Copy a run folder's files to its MLflow run, at the same places, so that a pulled run opens
    like this one.

    Args:
        folder: the run's folder.
        mlflow_run: the id of the MLflow run.
        names: which files and folders, relative to the folder (`harvest/graphs`, …); missing ones
            are passed over.
        uri: the tracker; the usual one if omitted.
        before: called with every file that is about to be copied.

    Raises:
        BadInput: the tracker does not answer, or does not know the run.
    """
    uri = uri or tracking_uri()
    with _mlflow(uri) as client:
        kept = _artifact_folder(client, uri, mlflow_run)
        for name in names:
            for path in [folder / name, *sorted((folder / name).rglob("*"))]:
                if not path.is_file() or path.name.startswith("."):
                    continue
                before(path)
                parent = path.parent.relative_to(folder).as_posix()
                if kept:
                    _copy(path, kept / path.relative_to(folder))
                else:
                    client.log_artifact(mlflow_run, str(path), None if parent == "." else parent)


def _copy(path: Path, to: Path) -> None:
    with writable(to):
        to.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(to) as temporary:
        shutil.copyfile(path, temporary)


def _artifact_folder(client: Any, uri: str, run_id: str) -> Path | None:
    """The folder of a run's artifacts, if they are on this machine with their store; None if a
    server has them.

    A sqlite store records where they were when the run began. If the runs folder was moved, they
    moved with it: they are looked for next to the store first.
    """
    store = _sqlite_file(uri)
    recorded = urlsplit(client.get_run(run_id).info.artifact_uri)
    if store is None or recorded.scheme not in ("", "file"):
        return None
    path = Path(unquote(recorded.path))
    beside = store.parent / ARTIFACTS / run_id / "artifacts"
    moved = path.parts[-3:] == beside.parts[-3:] and (beside.exists() or not path.exists())
    return beside if moved else path


def pull_mlflow(what: str, folder: Path) -> tuple[str, str]:
    """Download a run's artifacts.

    Args:
        what: a run's id, or a name; of several runs with it the latest.
        folder: where they go.

    Returns:
        The run's name and its id.

    Raises:
        BadInput: no such run, no artifacts, no answer, or an artifact that points outside the
            folder.
    """
    with _mlflow(tracking_uri()) as client:
        info = _mlflow_run(client, what).info
        kept = _artifact_folder(client, tracking_uri(), info.run_id)
        files = _files_below(kept) if kept else list(_mlflow_files(client, info.run_id, None))
        for path in files:
            check_inside(path, what)
        if kept:
            for path in files:
                _copy(kept / path, folder / path)
        else:
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
    raise BadInput(
        f"run 'mlflow:{what}': not in {without_passwords(tracking_uri())}; {nearest(what, names)}"
    )


def _files_below(folder: Path) -> list[str]:
    return [
        path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()
    ]


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
        raise BadInput(
            f"artifact '{path}' of '{what}': it points outside the run's folder; do not trust this "
            "tracker"
        )


def pull_wandb(what: str, folder: Path) -> tuple[str, str]:
    """Download a W&B artifact.

    Args:
        what: <entity>/<project>/<artifact>:<version>.
        folder: where its files go.

    Returns:
        The artifact's name and its qualified name.

    Raises:
        BadInput: no such artifact, no answer, not logged in, or a file that points outside the
            folder.
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
    return what.split("/")[-1].partition(":")[0], artifact.qualified_name
