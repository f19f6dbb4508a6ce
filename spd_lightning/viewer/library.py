"""Runs that the viewer may open: those below one root, one run, or one harvest; by name, never by
path.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from spd_lightning import runs
from spd_lightning.analysis.dataset_edges import corpus_harvests
from spd_lightning.errors import BadInput, nearest
from spd_lightning.runs import Run
from spd_lightning.store import Store
from spd_lightning.store.manifest import read_settings

Answer = dict[str, Any]


class Library:
    """The runs and harvests that a viewer shows.

    Args:
        path: A folder of runs, a run, a harvest, or a tracker's reference (see `runs.find`); the
            usual root of runs where it is None.

    Raises:
        BadInput: there is nothing at `path`.
    """

    def __init__(self, path: str | None = None):
        self._root: Path | None = None
        self._only: Run | None = None
        if path is None:
            return
        try:
            self._only = runs.find(path)
        except BadInput:
            if not Path(path).is_dir():
                raise
            self._root = Path(path)

    @property
    def place(self) -> Path:
        """Where it looks for runs."""
        return self._only.path if self._only else self._root or runs.root()

    def runs(self) -> list[Run]:
        """All runs there are at this moment, the latest written first."""
        return [self._only] if self._only else runs.runs(self._root)

    def run(self, name: Any) -> Run:
        """The run of this name.

        Raises:
            BadInput: there is none.
        """
        held = {run.name: run for run in self.runs()}
        if not isinstance(name, str) or name not in held:
            asked = str(name)[:100]
            raise BadInput(f"run '{asked}': not in '{self.place}'; {nearest(asked, held)}")
        return held[name]

    def choose(self, run: Any, harvest: Any) -> tuple[Run, str | None] | None:
        """Choose the run and harvest to show: those asked for, if they exist.

        Otherwise the latest run that has a harvest, and the latest harvest of the run; None if
        there is no run.
        """
        held = self.runs()
        asked = (
            [one for one in held if one.name == run]
            or [one for one in held if one.harvests]
            or held
        )
        if not asked:
            return None
        names = harvest_names(asked[0])
        return asked[0], harvest if harvest in names else next(iter(names), None)

    def store(self, run: Any, harvest: Any) -> Store:
        """A run's harvest of this name, as it is on disk now.

        Raises:
            BadInput: there is no such run or harvest, or it cannot be read.
        """
        opened = self.run(run)
        held = {path.name: path for path in opened.harvests}
        if not held or harvest is None:
            family = opened.record.get("family", opened.name)
            command = f"python -m spd_lightning predict --config {family}.yaml"
            if corpus_harvests(opened.harvests):
                sums = f"python -m spd_lightning edges {opened.name} LAYER:COMPONENT"
                command += f" --config graphs.yaml; the sums themselves: {sums}"
                raise BadInput(
                    f"run '{run}': its harvests are sums, which show no prompts; harvest graphs: "
                    f"{command}"
                )
            raise BadInput(f"run '{run}': no harvest yet; make one: {command}")
        if not isinstance(harvest, str) or harvest not in held:
            asked = str(harvest)[:100]
            raise BadInput(f"harvest '{asked}': not in run '{run}'; {nearest(asked, held)}")
        ledgers = sorted(held[harvest].glob("manifest*.json"))
        return _opened(held[harvest], tuple(path.stat().st_mtime_ns for path in ledgers))

    def answer(self, question: Any, read: Callable[[Store, Mapping[str, Any]], Answer]) -> Answer:
        """Answer a browser's question about one harvest, or say in {"problem": …} what is wrong
        with it.

        Args:
            question: An object with at least the names of a `run` and a `harvest`.
            read: Takes that harvest and the question.
        """
        try:
            if not isinstance(question, Mapping):
                raise BadInput(f"question {repr(question)[:40]}: expected an object")
            return read(self.store(question.get("run"), question.get("harvest")), question)
        except BadInput as problem:
            return {"problem": str(problem)}


def harvest_names(run: Run) -> list[str]:
    """Return the names of a run's harvests: those with graphs before those of nodes, the latest
    begun first.

    Sums over a corpus are not among them: the page Components shows those.
    """
    sums = corpus_harvests(run.harvests)
    newest = sorted(
        (path for path in run.harvests if path not in sums),
        key=lambda path: (_has_graphs(path), (path / "manifest.json").stat().st_mtime),
        reverse=True,
    )
    return [path.name for path in newest]


def _has_graphs(harvest: Path) -> bool:
    """Whether a harvest is of graphs; False if its manifest cannot be read, which is reported when
    it is opened.
    """
    try:
        return read_settings(harvest).get("mode") != "nodes"
    except BadInput:
        return False


@lru_cache(maxsize=8)
def _opened(path: Path, written: tuple[int, ...]) -> Store:
    """A store, opened once for each state of its manifests (`written`: when each was last
    replaced).
    """
    del written
    return Store(path).require("kind", "mode", "C")
