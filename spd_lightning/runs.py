"""Where things are: run folders, who is working on them, and the trackers that hold copies.

    <root>/<run>/   config.yaml, run.json, checkpoints/, decomposition.{safetensors,json}, metrics.jsonl, figures/,
                    harvest/<name>/, and at last summary.json: a run that has it is finished
    <root>/<run>/.lock    flocked while a process works on the run; the lock dies with the process

The local folder is the truth and a tracker holds a copy of it. MLflow is the embedded one (a sqlite file and a folder
of artifacts below the root) unless MLFLOW_TRACKING_URI names a server. A reference is the name of a run, the path of a
run or of a harvest, `mlflow:<run id or name>`, or `wandb:<entity>/<project>/<artifact>:<version>`.
"""

import fcntl
import json
import logging
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from spd_lightning.config import digest, load
from spd_lightning.errors import BadInput, nearest

if TYPE_CHECKING:
    import polars

log = logging.getLogger(__name__)

State = Literal["running", "finished", "interrupted"]
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

_SIGNS = ("run.json", "config.yaml", "summary.json", "metrics.jsonl", "manifest.json", "harvest")
_RESERVED = ("targets", "mlartifacts")


def root() -> Path:
    """The folder that holds all runs: $SPD_RUNS, or ./runs."""
    return Path(os.environ.get("SPD_RUNS") or "runs")


def check_name(name: str) -> str:
    """The name, if it can name a run.

    Raises:
        BadInput: it has other characters than letters, digits, '.', '_' and '-', or means something else already.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", name) or name in _RESERVED:
        raise BadInput(f"run name '{name}': use up to 100 letters, digits, '.', '_' and '-', not {_RESERVED[0]!r}")
    return name


@dataclass(frozen=True)
class Run:
    """One run's folder, read afresh at every look; a bare harvest folder is a run with that one harvest."""

    path: Path

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def state(self) -> State:
        """Running while a process holds its lock, finished once it has a summary, interrupted otherwise.

        A bare harvest counts as finished: its store says whether it is complete.
        """
        if _held(self.path):
            return "running"
        done = (self.path / "summary.json").exists() or (self.path / "manifest.json").exists()
        return "finished" if done else "interrupted"

    @property
    def summary(self) -> dict[str, Any]:
        """What the run reached; empty until it is finished."""
        return _json_or_nothing(self.path / "summary.json")

    @property
    def record(self) -> dict[str, Any]:
        """How the folder was claimed: family, settings digest, start in seconds since 1970; empty if it never was."""
        return _json_or_nothing(self.path / "run.json")

    @property
    def config(self) -> dict[str, Any]:
        """The config that the run was made with; empty if there is none."""
        path = self.path / "config.yaml"
        try:
            return load(str(path.resolve())) if path.exists() else {}
        except BadInput as error:
            log.warning("%s", error)
            return {}

    @property
    def figures(self) -> list[Path]:
        """Its plots, by name."""
        return sorted(self.path.glob("figures/*.png"))

    @property
    def harvests(self) -> list[Path]:
        """The folders of its harvests, by name: each opens with `store.Store`."""
        bare = [self.path] if (self.path / "manifest.json").exists() else []
        return bare + [path.parent for path in sorted(self.path.glob("harvest/*/manifest.json"))]

    @property
    def changed(self) -> float:
        """When something was last written at its top, in seconds since 1970."""
        times = [path.stat().st_mtime for path in map(self.path.joinpath, _SIGNS) if path.exists()]
        return max(times, default=0.0)

    def metrics(self) -> "polars.DataFrame":
        """What was logged, one row a step, in order; of a step logged again after a resume the later values."""
        import polars

        steps: dict[int, dict[str, Any]] = {}
        for line in _lines(self.path / "metrics.jsonl"):
            steps.setdefault(line.get("step", 0), {}).update(line)
        rows = [steps[step] for step in sorted(steps)]
        names = dict.fromkeys(name for row in rows for name in row)
        return polars.DataFrame({name: [row.get(name) for row in rows] for name in names}, strict=False)


def runs(root_: Path | None = None) -> list[Run]:
    """Every run below a root (the usual one unless given), the latest written first."""
    folder = root_ or root()
    found = [Run(path) for path in folder.iterdir() if _is_run(path)] if folder.is_dir() else []
    return sorted(found, key=lambda run: (run.changed, run.name), reverse=True)


def _is_run(path: Path) -> bool:
    if path.name.startswith(".") or path.name in _RESERVED:
        return False
    return path.is_dir() and any((path / sign).exists() for sign in _SIGNS)


def find(reference: str) -> Run:
    """The run that a reference means; one that only a tracker has is pulled, once.

    Raises:
        BadInput: there is no such run (the nearest name is suggested), or its tracker does not answer.
    """
    if reference.partition(":")[0] in _PULLS:
        had = [run for run in runs() if _json_or_nothing(run.path / "pulled.json").get("reference") == reference]
        return had[0] if had else Run(pull(reference))
    for path in (root() / reference, Path(reference)):
        if reference and _is_run(path):
            return Run(path)
    if os.sep in reference:
        raise BadInput(f"run '{reference}': no run or harvest there; name a folder with config.yaml or manifest.json")
    raise BadInput(f"run '{reference}': not in '{root()}'; {nearest(reference, [run.name for run in runs()])}")


def newest(name: str) -> Run:
    """The run of a family (name, name-2, name-3 …) that finished last.

    Raises:
        BadInput: none has finished.
    """
    family = _family(check_name(name))
    if done := [run for run in family if (run.path / "summary.json").exists()]:
        return max(done, key=lambda run: ((run.path / "summary.json").stat().st_mtime, _number(run.name, name)))
    if family:
        states = ", ".join(f"{run.name} is {run.state}" for run in family)
        raise BadInput(f"run '{name}': none has finished ({states}); let it finish, or run the same `fit` again")
    raise BadInput(f"run '{name}': not in '{root()}'; {nearest(name, [run.name for run in runs()])}")


def _number(run: str, name: str) -> int:
    return int(run.removeprefix(name).removeprefix("-") or 1)


def _family(name: str) -> list[Run]:
    """The runs that were claimed under this name, in order of their numbers; unclaimed ones by their names alone."""
    numbered = re.compile(re.escape(name) + r"(-[1-9][0-9]*)?")
    alike = [run for run in runs() if numbered.fullmatch(run.name) and run.record.get("family", name) == name]
    return sorted(alike, key=lambda run: _number(run.name, name))


# Claiming.


class Claim:
    """A run folder that this process alone works on, until `release` or its own end.

    Attributes:
        run: the run.
        path: its folder.
        resumed: whether an interrupted run goes on here.
    """

    def __init__(self, run: Run, resumed: bool, handle: int):
        self.run, self.path, self.resumed = run, run.path, resumed
        self._handle: int | None = handle

    def release(self) -> None:
        """Let others work on it; doing so twice is harmless."""
        if self._handle is not None:
            os.close(self._handle)
        self._handle = None

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def claim(name: str, settings: Mapping[str, Any]) -> Claim:
    """A folder to work in: the family's interrupted run with the same settings, or a fresh one.

    A finished run is never touched, nor one that another process works on: the next number is taken (name, name-2 …).

    Args:
        name: the run's family, usually the name of its config.
        settings: all that decides what the run will be; two runs with an equal digest may continue each other.

    Raises:
        BadInput: the name cannot name a run, or the disk refuses.
    """
    key = digest(dict(settings))
    for run in _family(check_name(name)):
        if run.state == "finished" or run.record.get("digest") != key:
            continue
        if (handle := _lock(run.path)) is None:
            log.info("run %s: another process is working on it; taking the next number", run.name)
        elif (run.path / "summary.json").exists():
            os.close(handle)
        else:
            log.info("run %s: resumed", run.name)
            return Claim(run, True, handle)
    return _fresh(name, key)


def _fresh(name: str, key: str) -> Claim:
    for number in count(1):
        path = root() / (name if number == 1 else f"{name}-{number}")
        try:
            root().mkdir(parents=True, exist_ok=True)
            path.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise _unwritable(path, error) from error
        handle = _lock(path)
        assert handle is not None, f"a folder just made is locked: {path}"
        write_json(path / "run.json", {"family": name, "digest": key, "started": time.time()})
        return Claim(Run(path), False, handle)
    raise AssertionError("numbers do not end")


def _lock(folder: Path) -> int | None:
    """An open handle that holds the folder's lock, or None where another process holds it."""
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    for _ in range(10):  # someone who asks for the state holds it for a moment
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            time.sleep(0.02)
    os.close(handle)
    return None


def _held(folder: Path) -> bool:
    try:
        handle = os.open(folder / ".lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(handle)


# Files.


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to: it becomes `path` at the end, or after an error nothing does.

    Raises:
        BadInput: the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError) -> BadInput:
    why = error.strerror or error
    return BadInput(f"file '{path}': cannot be written ({why}); make room, or set SPD_RUNS to another folder")


def write_json(path: Path, value: Any) -> None:
    """A JSON file, whole or not at all."""
    text = json.dumps(value, indent=1) + "\n"
    with write_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_metrics(folder: Path, step: int, values: Mapping[str, float]) -> None:
    """Add one logged step to a run's metrics.jsonl; half a line that a killed process left is cut off first."""
    line = json.dumps({"step": step, **values}) + "\n"
    path = folder / "metrics.jsonl"
    try:
        with open(path, "a+b") as file:
            _cut_torn_line(file)
            file.write(line.encode())
    except OSError as error:
        raise _unwritable(path, error) from error


def _cut_torn_line(file: Any) -> None:
    end = start = file.seek(0, os.SEEK_END)
    tail = b""
    while start and b"\n" not in tail:
        start = max(0, start - 4096)
        file.seek(start)
        tail = file.read(end - start)
    whole = start + tail.rfind(b"\n") + 1
    if whole < end:
        file.truncate(whole)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            yield dict(json.loads(line))
        except (ValueError, TypeError):
            log.warning("'%s', line %d: torn, left out", path, number)


def _json_or_nothing(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        log.warning("'%s' cannot be read: %s", path, error)
        return {}


# Trackers.


def tracking_uri() -> str:
    """Where MLflow's records are: $MLFLOW_TRACKING_URI, or a sqlite file below the root, which needs no server."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root().resolve()}/mlflow.db"


def artifact_location() -> str | None:
    """Where a new experiment of the embedded store keeps its artifacts; a server decides for itself (None)."""
    return None if os.environ.get("MLFLOW_TRACKING_URI") else (root().resolve() / "mlartifacts").as_uri()


def reachable(uri: str) -> None:
    """Ask for a connection before a tracker's client retries for minutes; an embedded store always answers.

    Raises:
        BadInput: nothing listens at an http(s) address within 3 s.
    """
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        return
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=3).close()
    except (OSError, ValueError) as error:
        raise BadInput(
            f"tracker '{uri}': no answer ({error}); start its server, or unset MLFLOW_TRACKING_URI for the embedded one"
        ) from error


def log_artifacts(folder: Path, mlflow_run: str, names: Sequence[str] = MIRRORED) -> None:
    """Copy a run folder's files to its MLflow run, at the same places, so that a pulled run opens like this one.

    Args:
        folder: the run's folder.
        mlflow_run: the id of the MLflow run.
        names: which files and folders, relative to the folder (`harvest/graphs`, …); missing ones are passed over.

    Raises:
        BadInput: the tracker does not answer.
    """
    with _mlflow() as client:
        for name in names:
            inside = sorted((folder / name).rglob("*")) if (folder / name).is_dir() else [folder / name]
            for path in inside:
                if path.is_file() and not path.name.startswith("."):
                    parent = path.parent.relative_to(folder).as_posix()
                    client.log_artifact(mlflow_run, str(path), None if parent == "." else parent)


def pull(reference: str) -> Path:
    """Download a tracked run or harvest; it lands whole as <root>/<its name>-pulled.

    Args:
        reference: `mlflow:<run id or name>` or `wandb:<entity>/<project>/<artifact>:<version>`.

    Raises:
        BadInput: no such run or artifact, no answer, or file names that point outside the folder.
    """
    tracker, _, what = reference.partition(":")
    if tracker not in _PULLS or not what:
        raise BadInput(f"reference '{reference}': write mlflow:<run> or wandb:<entity>/<project>/<artifact>:<version>")
    root().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root(), prefix=".pull-") as temporary:
        folder = Path(temporary) / "run"
        folder.mkdir()
        name, origin = _PULLS[tracker](what, folder)
        write_json(folder / "pulled.json", {"reference": reference, "origin": origin})
        return _land(folder, re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip(".-") or "run", origin)


def _land(folder: Path, name: str, origin: str) -> Path:
    """Move a downloaded folder to its place: over an older copy of the same thing, beside one of another."""
    for number in count(1):
        path = root() / (f"{name}-pulled" if number == 1 else f"{name}-pulled-{number}")
        if path.exists() and _json_or_nothing(path / "pulled.json").get("origin") != origin:
            continue
        if path.exists():
            path.rename(folder.with_name("old"))
        folder.rename(path)
        return path
    raise AssertionError("numbers do not end")


@contextmanager
def _mlflow() -> Iterator[Any]:
    """A client of the tracker; what it cannot do becomes one line."""
    uri = tracking_uri()
    reachable(uri)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        yield MlflowClient(tracking_uri=uri)
    except MlflowException as error:
        raise BadInput(f"tracker '{uri}': {' '.join(str(error).split())[:200]}; check MLFLOW_TRACKING_URI") from error


def _pull_mlflow(what: str, folder: Path) -> tuple[str, str]:
    with _mlflow() as client:
        run = _mlflow_run(client, what)
        files = list(_mlflow_files(client, run.info.run_id, None))
        for path in files:
            _check_inside(path, what)
        for path in files:
            client.download_artifacts(run.info.run_id, path, str(folder))
    if not files:
        raise BadInput(f"run 'mlflow:{what}': it has no artifacts; log the run folder first")
    return run.info.run_name, run.info.run_id


def _mlflow_run(client: Any, what: str) -> Any:
    """The run with this id, or else the latest with this name."""
    held = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(held, order_by=["attributes.start_time DESC"], max_results=10_000)
    for of in ("run_id", "run_name"):
        for run in found:
            if getattr(run.info, of) == what:
                return run
    raise BadInput(f"run 'mlflow:{what}': not in {tracking_uri()}; {nearest(what, {r.info.run_name for r in found})}")


def _mlflow_files(client: Any, run_id: str, folder: str | None) -> Iterator[str]:
    for item in client.list_artifacts(run_id, folder):
        if item.is_dir:
            yield from _mlflow_files(client, run_id, item.path)
        else:
            yield item.path


def _check_inside(path: str, what: str) -> None:
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or "\\" in path:
        raise BadInput(f"artifact '{path}' of '{what}': it points outside the folder; nothing was downloaded")


def _pull_wandb(what: str, folder: Path) -> tuple[str, str]:
    if not re.fullmatch(r"[^/:]+/[^/:]+/[^/:]+:[^/:]+", what):
        raise BadInput(f"reference 'wandb:{what}': write wandb:<entity>/<project>/<artifact>:<version>")
    import wandb

    try:
        artifact = wandb.Api().artifact(what)
        for path in artifact.manifest.entries:
            _check_inside(path, what)
        artifact.download(root=str(folder))
    except (wandb.Error, ValueError, OSError) as error:
        if isinstance(error, BadInput):
            raise
        why = " ".join(str(error).split())[:200]
        raise BadInput(f"artifact 'wandb:{what}': {why}; check the name, and log in with `wandb login`") from error
    return what.split("/")[-1].partition(":")[0], artifact.qualified_name


_PULLS = {"mlflow": _pull_mlflow, "wandb": _pull_wandb}
