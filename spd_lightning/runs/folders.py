"""Run folders: the contents of one, a list of all, and the family of runs that share a name."""

import logging
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spd_lightning import json_files
from spd_lightning.config import digest, load, places
from spd_lightning.errors import BadInput, command, nearest, shown
from spd_lightning.files import root
from spd_lightning.runs.files import held, read_json, read_metrics
from spd_lightning.runs.shapes import RESTORE, Factorization, Record, read_summary

if TYPE_CHECKING:
    import polars

log = logging.getLogger(__name__)

State = Literal["running", "finished", "interrupted", "diverged"]

_SIGNS = (
    "run.json",
    "config.yaml",
    "summary.json",
    "metrics.jsonl",
    "decomposition.json",
    "manifest.json",
    "harvest",
)
_RESERVED = ("targets", "data", "mlartifacts")


def check_name(name: str) -> str:
    """Return the name after checking that a run can have it.

    Raises:
        BadInput: the name is reserved, too long, or has characters other than letters, digits, '.',
            '_' and '-'.
    """
    if name in _RESERVED:
        raise BadInput(f"run name '{name}': reserved for another folder; choose another name")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", name):
        raise BadInput(
            f"run name '{shown(name)}': use at most 100 letters, digits, '.', '_' and '-', and do "
            "not start with '.' or '-'"
        )
    return name


@dataclass(frozen=True)
class Run:
    """The folder of a run. Its files are read again whenever an attribute is used.

    A harvest folder without a run is also accepted, as a run with that one harvest.
    """

    path: Path

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def state(self) -> State:
        """The state of the run: running, finished, interrupted, or diverged.

        A run is running while a process holds its lock. It is finished once it has a summary, and
        interrupted otherwise. It is diverged if its summary says that its numbers became infinite
        or NaN; it has no decomposition then. A harvest without a run counts as finished; its store
        knows whether it is complete.
        """
        if held(self.path):
            return "running"
        verdict = str(self.summary.get("verdict", ""))
        if verdict.startswith("diverged"):
            return "diverged"
        for name in ("summary.json", "manifest.json"):
            if (self.path / name).exists():
                return "finished"
        return "interrupted"

    @property
    def summary(self) -> dict[str, Any]:
        """The results of the run; empty until it is finished."""
        try:
            path = self.path / "summary.json"
            return dict(read_summary(path)) if path.exists() else {}
        except BadInput as error:
            log.warning("%s", error)
            return {}

    @property
    def record(self) -> dict[str, Any]:
        """The run's family, the digest of its settings, and its start in seconds since 1970.

        The record is empty if the folder was not created by `acquire_run`.
        """
        return read_json(self.path / "run.json", Record)

    @property
    def problem(self) -> str | None:
        """The first error in the files that a list of runs reads, in one line, or None."""
        try:
            for name, kind in (("run.json", Record), ("decomposition.json", Factorization)):
                if (self.path / name).exists():
                    json_files.read(self.path / name, kind, RESTORE)
            if (self.path / "summary.json").exists():
                read_summary(self.path / "summary.json")
            if (self.path / "config.yaml").exists():
                self.checked_config()
        except BadInput as error:
            return str(error)
        return None

    @property
    def pulled(self) -> bool:
        """Whether the run came from a tracker; the classes in its config are then not built."""
        return (self.path / "pulled.json").exists()

    def checked_config(self) -> dict[str, Any]:
        """The config that the run was made with, compared with the digest in run.json.

        Raises:
            BadInput: the config cannot be read, or it does not match the digest.
        """
        path = self.path / "config.yaml"
        record = self.record
        config = load(str(path.resolve()), as_written=True)
        if record and digest(config) != record["digest"]:
            raise BadInput(
                f"config '{path}': not what the run was made with; restore it from a copy"
            )
        return config

    @property
    def config(self) -> dict[str, Any]:
        """The config that the run was made with; empty if it is missing or cannot be read."""
        path = self.path / "config.yaml"
        if not path.exists():
            return {}
        try:
            return load(str(path.resolve()), as_written=True)
        except BadInput as error:
            log.warning("%s", error)
            return {}

    @property
    def figures(self) -> list[Path]:
        """The plots of the run, sorted by name."""
        return sorted(self.path.glob("figures/*.png"))

    @property
    def harvests(self) -> list[Path]:
        """The folders of the run's harvests, sorted by name; `store.Store` opens each of them."""
        folders = []
        if (self.path / "manifest.json").exists():
            folders.append(self.path)
        manifests = self.path.glob("harvest/*/manifest.json")
        folders += [manifest.parent for manifest in sorted(manifests)]
        return folders

    @property
    def changed(self) -> float:
        """The time of the last change of the run's main files, in seconds since 1970."""
        times = [_time(self.path / sign) for sign in _SIGNS]
        return max(times)

    def predict_command(self, *added: str) -> str:
        """Return the command that harvests from this run.

        Args:
            added: configs to add to the one that the run was made with.
        """
        name = self.record.get("family", self.name)
        config = f"{name}.yaml"
        is_known = any(path.is_file() for path in places(config))
        if not is_known:
            config = str(self.path / "config.yaml")
        words = ["predict"]
        for path in (config, *added):
            words += ["--config", path]
        if not is_known or [run.name for run in family(name)] != [self.name]:
            words += ["--run", self.name]
        return command(shlex.join(words))

    def metrics(self) -> "polars.DataFrame":
        """Return the logged metrics: one row per step, in order.

        Values that were logged again after a resume replace earlier ones.
        """
        import polars

        steps = read_metrics(self.path)
        types = {}
        for step in steps:
            for name in step:
                types[name] = polars.Int64 if name == "step" else polars.Float64
        columns = {}
        for name in types:
            columns[name] = [step.get(name) for step in steps]
        return polars.DataFrame(columns, types, strict=False)


def _time(path: Path) -> float:
    """Return the time of a file's last change, or 0 if there is no such file."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def is_run(path: Path) -> bool:
    """Return whether a folder is a run or a harvest; the folder of a trained target is neither."""
    if (path / "target.json").exists() or not path.is_dir():
        return False
    return any((path / sign).exists() for sign in _SIGNS)


def runs(root_: Path | None = None) -> list[Run]:
    """Return all runs in a root folder ($SPD_RUNS by default), the most recently changed first."""
    folder = root_ or root()
    if not folder.is_dir():
        return []
    members = []
    for path in folder.iterdir():
        special = path.name in _RESERVED or path.name.startswith(".")
        if not special and is_run(path):
            members.append(Run(path))
    return sorted(members, key=lambda run: (run.changed, run.name), reverse=True)


def family(name: str) -> list[Run]:
    """Return the runs of a family (name, name-2, name-3, …) in order of their numbers.

    run.json records the family of a run. A run without this record belongs to every family that
    its folder name fits.
    """
    pattern = re.compile(re.escape(name) + r"(-[1-9][0-9]*)?")
    named_alike = [run for run in runs() if pattern.fullmatch(run.name)]
    members = [run for run in named_alike if run.record.get("family", name) == name]

    def number(run: Run) -> int:
        suffix = run.name.removeprefix(name)  # "" or "-2", "-3", …
        return int(suffix[1:] or 1)

    return sorted(members, key=number)


def newest(name: str, fit: str | None = None) -> Run:
    """Return the run of a family (name, name-2, name-3, …) that finished last.

    Args:
        name: the family.
        fit: the command that makes such a run, for the message.

    Raises:
        BadInput: no run of the family has finished.
    """
    if run := latest_finished(name):
        return run
    again = f": {fit}" if fit else ""
    if members := family(name):
        states = ", ".join(f"{run.name} is {run.state}" for run in members)
        raise BadInput(
            f"run '{name}': none has finished ({states}); let it finish, or run the same fit again"
            f"{again}"
        )
    if not fit:
        raise unknown(name)
    others = [run.name for run in runs()]
    remedy = f"run fit first{again}"
    if others:
        remedy += f"; or name another run with --run: {nearest(name, others)}"
    raise BadInput(f"run '{name}': not in '{root()}'; {remedy}")


def latest_finished(name: str) -> Run | None:
    """Return the run of a family (name, name-2, name-3, …) that finished last, or None."""
    finished = [run for run in family(check_name(name)) if _has_finished(run)]
    if not finished:
        return None
    times = [_time(run.path / "summary.json") for run in finished]
    latest = max(range(len(finished)), key=lambda k: (times[k], k))
    return finished[latest]


def _has_finished(run: Run) -> bool:
    return (run.path / "summary.json").exists() and run.state != "diverged"


def unknown(name: str) -> BadInput:
    """Return the error for a name that no run in the root folder has."""
    names = [run.name for run in runs()]
    return BadInput(f"run '{shown(name)}': not in '{root()}'; {nearest(name, names)}")
