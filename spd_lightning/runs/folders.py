"""Run folders: what one holds, which there are, and the families that repeated runs of one name
form.
"""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spd_lightning import json_files
from spd_lightning.config import digest, load
from spd_lightning.errors import BadInput, nearest, shown
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
    """The name, if it can name a run.

    Raises:
        BadInput: it has other characters than letters, digits, '.', '_' and '-', or means something
            else already.
    """
    if name in _RESERVED:
        raise BadInput(
            f"run name '{name}': the folder of that name holds something else; choose another"
        )
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", name):
        raise BadInput(
            f"run name '{shown(name)}': use at most 100 letters, digits, '.', '_' and '-', and do "
            "not start with '.' "
            "or '-'"
        )
    return name


@dataclass(frozen=True)
class Run:
    """One run's folder, read afresh at every look; a bare harvest folder is a run with that one
    harvest.
    """

    path: Path

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def state(self) -> State:
        """Running while a process holds its lock, finished once it has a summary, interrupted
        otherwise.

        It is diverged where the summary says that its numbers did not stay finite: it has no
        decomposition then. A bare harvest counts as finished: its store says whether it is
        complete.
        """
        if held(self.path):
            return "running"
        if str(self.summary.get("verdict", "")).startswith("diverged"):
            return "diverged"
        done = (self.path / "summary.json").exists() or (self.path / "manifest.json").exists()
        return "finished" if done else "interrupted"

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
        """How the folder was claimed: family, settings digest, start in seconds since 1970; empty
        if it never was.
        """
        return read_json(self.path / "run.json", Record)

    @property
    def problem(self) -> str | None:
        """The first damage in the files that a list of runs reads, in one line; None if all are
        sound.
        """
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
        """Whether it came from a tracker: what its config names is then not built."""
        return (self.path / "pulled.json").exists()

    def checked_config(self) -> dict[str, Any]:
        """The config that the run was made with.

        Raises:
            BadInput: it cannot be read, or is not the one of which run.json holds the digest.
        """
        path = self.path / "config.yaml"
        record = self.record
        found = load(str(path.resolve()), as_written=True)
        if record and digest(found) != record["digest"]:
            raise BadInput(
                f"config '{path}': not what the run was made with; restore it from a copy"
            )
        return found

    @property
    def config(self) -> dict[str, Any]:
        """The config that the run was made with; empty if there is none."""
        path = self.path / "config.yaml"
        try:
            return load(str(path.resolve()), as_written=True) if path.exists() else {}
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
        return max((_time(self.path / sign) for sign in _SIGNS), default=0.0)

    def metrics(self) -> "polars.DataFrame":
        """The logged metrics, one row per step, in order; values logged again after a resume
        replace earlier ones.
        """
        import polars

        steps = read_metrics(self.path)
        names = dict.fromkeys(name for step in steps for name in step)
        types = {name: polars.Int64 if name == "step" else polars.Float64 for name in names}
        return polars.DataFrame(
            {name: [step.get(name) for step in steps] for name in names}, types, strict=False
        )


def _time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def is_run(path: Path) -> bool:
    """Return whether a folder is a run or a harvest; the folder of a trained target is neither."""
    if (path / "target.json").exists():
        return False
    return path.is_dir() and any((path / sign).exists() for sign in _SIGNS)


def runs(root_: Path | None = None) -> list[Run]:
    """Every run below a root (the usual one unless given), the latest written first."""
    folder = root_ or root()
    paths = folder.iterdir() if folder.is_dir() else ()
    found = [
        Run(path)
        for path in paths
        if path.name not in _RESERVED and path.name[0] != "." and is_run(path)
    ]
    return sorted(found, key=lambda run: (run.changed, run.name), reverse=True)


def family(name: str) -> list[Run]:
    """The runs that were claimed under a name, in order of their numbers; unclaimed ones go by
    their names alone.
    """
    numbered = re.compile(re.escape(name) + r"(-[1-9][0-9]*)?")
    alike = [
        run
        for run in runs()
        if numbered.fullmatch(run.name) and run.record.get("family", name) == name
    ]
    return sorted(alike, key=lambda run: int(run.name.removeprefix(name)[1:] or 1))


def newest(name: str) -> Run:
    """The run of a family (name, name-2, name-3 …) that finished last.

    Raises:
        BadInput: none has finished.
    """
    members = family(check_name(name))
    if done := [
        run for run in members if (run.path / "summary.json").exists() and run.state != "diverged"
    ]:
        return max(
            enumerate(done), key=lambda item: (_time(item[1].path / "summary.json"), item[0])
        )[1]
    if members:
        states = ", ".join(f"{run.name} is {run.state}" for run in members)
        raise BadInput(
            f"run '{name}': none has finished ({states}); let it finish, or run the same fit again"
        )
    raise unknown(name)


def unknown(name: str) -> BadInput:
    """The error for a name that no run here has."""
    return BadInput(
        f"run '{shown(name)}': not in '{root()}'; {nearest(name, [run.name for run in runs()])}"
    )
