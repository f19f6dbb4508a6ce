"""The runs that the viewer can open: those below one root, one run, or one harvest.

A browser names runs and harvests; it never gives a path.
"""

import itertools
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from spd_lightning import runs
from spd_lightning.analysis.dataset_edges import corpus_harvests
from spd_lightning.analysis.harvests import open_harvest
from spd_lightning.analysis.store import Store
from spd_lightning.errors import BadInput, command, nearest, shown
from spd_lightning.runs import Run
from spd_lightning.store.manifest import read_settings

Response = dict[str, Any]


class Library:
    """The runs and harvests that a viewer shows.

    Args:
        path: A folder of runs, a run, a harvest, or a tracker's reference (see `runs.find`); the
            default root of runs if None.

    Raises:
        BadInput: `path` does not exist.
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
        """The folder in which the library looks for runs."""
        if self._only:
            return self._only.path
        return self._root or runs.root()

    def runs(self) -> list[Run]:
        """List all runs that exist at this moment, the latest written first."""
        if self._only:
            return [self._only]
        return runs.runs(self._root)

    def run(self, name: Any) -> Run:
        """Return the run of this name.

        Raises:
            BadInput: there is no such run.
        """
        by_name = {run.name: run for run in self.runs()}
        if not isinstance(name, str) or name not in by_name:
            given = shown(str(name))
            raise BadInput(f"run '{given}': not in '{self.place}'; {nearest(given, by_name)}")
        return by_name[name]

    def choose(self, run: Any, harvest: Any) -> tuple[Run, str | None] | None:
        """Choose the run and harvest to show: the requested ones, if they exist.

        The default is the latest run that has a harvest, and the latest harvest of the run. The
        result is None if there is no run.
        """
        chosen = self._first(run)
        if chosen is None:
            return None
        names = harvest_names(chosen)
        if harvest in names:
            return chosen, harvest
        return chosen, names[0] if names else None

    def _first(self, name: Any = None) -> Run | None:
        """Return the run of this name, otherwise the first run; None if the library is empty."""
        known = self.runs()
        requested = [candidate for candidate in known if candidate.name == name]
        harvested = (candidate for candidate in known if candidate.harvests)
        candidates = requested or itertools.chain(harvested, known)
        return next(iter(candidates), None)

    def store(self, run: Any, harvest: Any) -> Store:
        """Open a run's harvest of this name, as it is on disk now.

        Raises:
            BadInput: there is no such run or harvest, or it cannot be read.
        """
        owner = self.run(run)
        if not owner.harvests or harvest is None:
            raise _no_harvest(owner)
        return self.open(_harvest(owner, harvest))

    def find(self, run: str | None, question: str, harvest: str | None = None) -> tuple[Run, Path]:
        """Return the run that a question is about, and the folder of the harvest that answers it.

        Args:
            run: the run's name; if None, the run that the pages show first.
            question: a key of `harvests.SOURCES`.
            harvest: the harvest's name; if None, the one that `open_harvest` chooses.

        Raises:
            BadInput: there is no such run or harvest, or none with the tables for the question.
        """
        owner = self._first() if run is None else self.run(run)
        if owner is None:
            raise BadInput(
                f"no run in '{self.place}'; make one: {command('fit --config tms.yaml')}"
            )
        if harvest is not None:
            return owner, _harvest(owner, harvest)
        written = tuple(_written(path) for path in owner.harvests)
        return owner, _find(owner, question, written)

    def open(self, harvest: Path) -> Store:
        """Open a harvest as it is on disk now. It is read again only if it has changed.

        Raises:
            BadInput: it cannot be read.
        """
        return _open(harvest, _written(harvest))

    def respond(
        self, request: Any, read: Callable[[Store, Mapping[str, Any]], Response]
    ) -> Response:
        """Respond to a browser's request about one harvest.

        Args:
            request: The request, an object with at least the names of a `run` and a `harvest`.
            read: Takes that harvest and the request, and returns the response.

        Returns:
            The response of `read`, or {"problem": one line} if the request is invalid.
        """
        try:
            if not isinstance(request, Mapping):
                raise BadInput(f"request {repr(request)[:40]}: expected an object")
            store = self.store(request.get("run"), request.get("harvest"))
            return read(store, request)
        except BadInput as problem:
            return {"problem": str(problem)}


def _harvest(run: Run, name: Any) -> Path:
    """Return the folder of a run's harvest of this name.

    Raises:
        BadInput: the run has no such harvest.
    """
    by_name = {path.name: path for path in run.harvests}
    if not isinstance(name, str) or name not in by_name:
        given = shown(str(name))
        raise BadInput(f"harvest '{given}': not in run '{run.name}'; {nearest(given, by_name)}")
    return by_name[name]


def _no_harvest(run: Run) -> BadInput:
    """Return the error for a run without harvests to show, with the command that makes one."""
    if not corpus_harvests(run.harvests):
        return BadInput(f"run '{run.name}': no harvest yet; make one: {run.predict_command()}")
    graphs = run.predict_command("graphs.yaml")
    sums = command(f"edges {run.name} LAYER:COMPONENT")
    return BadInput(
        f"run '{run.name}': its harvests are sums, which have no prompts to show; harvest graphs: "
        f"{graphs}; print the sums: {sums}"
    )


def harvest_names(run: Run) -> list[str]:
    """Return the names of a run's harvests: graphs before nodes, the latest begun first.

    Sums over a corpus are left out, since the page Components shows them.
    """
    sums = corpus_harvests(run.harvests)
    harvests = [path for path in run.harvests if path not in sums]
    harvests.sort(key=_rank_and_time, reverse=True)
    return [path.name for path in harvests]


_RANKS = {"nodes": 1, "statistics": 0}
"""The rank of a harvest by its mode; harvests of graphs have rank 2."""


def _rank_and_time(harvest: Path) -> tuple[int, float]:
    """Return how much of a harvest the pages can show, and when it was begun.

    A harvest whose manifest cannot be read comes last; the error is reported when it is opened.
    """
    try:
        mode = read_settings(harvest).get("mode", "")
        rank = _RANKS.get(mode, 2)
    except BadInput:
        rank = -1
    begun = (harvest / "manifest.json").stat().st_mtime
    return rank, begun


Written = tuple[tuple[str, int, int], ...]
"""The state of a harvest's manifests: their names, sizes, and times of the last change."""


def _written(harvest: Path) -> Written:
    manifests = sorted({*harvest.glob("manifest*.json*"), *harvest.glob("merged.json")})
    state = []
    for manifest in manifests:
        facts = manifest.stat()
        state.append((manifest.name, facts.st_size, facts.st_mtime_ns))
    return tuple(state)


@lru_cache(maxsize=64)
def _find(run: Run, question: str, written: tuple[Written, ...]) -> Path:
    """Find the harvest that answers a question, once for each state of the run's harvests."""
    del written
    return open_harvest(run, question).path


@lru_cache(maxsize=8)
def _open(path: Path, written: Written) -> Store:
    """Open a store, once for each state of its manifests."""
    del written
    store = Store(path)
    store.require("kind", "mode", "C")
    return store
