"""The runs that the viewer can open: those below one root, one run, or one harvest.

A browser names runs and harvests; it never gives a path.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from spd_lightning import runs
from spd_lightning.analysis.dataset_edges import corpus_harvests
from spd_lightning.errors import BadInput, command, nearest
from spd_lightning.runs import Run
from spd_lightning.store import Store
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
            given = str(name)[:100]
            raise BadInput(f"run '{given}': not in '{self.place}'; {nearest(given, by_name)}")
        return by_name[name]

    def choose(self, run: Any, harvest: Any) -> tuple[Run, str | None] | None:
        """Choose the run and harvest to show: the requested ones, if they exist.

        The default is the latest run that has a harvest, and the latest harvest of the run. The
        result is None if there is no run.
        """
        known = self.runs()
        requested = [candidate for candidate in known if candidate.name == run]
        harvested = [candidate for candidate in known if candidate.harvests]
        candidates = requested or harvested or known
        if not candidates:
            return None
        chosen = candidates[0]
        names = harvest_names(chosen)
        if harvest in names:
            return chosen, harvest
        return chosen, names[0] if names else None

    def store(self, run: Any, harvest: Any) -> Store:
        """Open a run's harvest of this name, as it is on disk now.

        Raises:
            BadInput: there is no such run or harvest, or it cannot be read.
        """
        owner = self.run(run)
        by_name = {path.name: path for path in owner.harvests}
        if not by_name or harvest is None:
            raise _no_harvest(owner)
        if not isinstance(harvest, str) or harvest not in by_name:
            given = str(harvest)[:100]
            raise BadInput(f"harvest '{given}': not in run '{run}'; {nearest(given, by_name)}")
        path = by_name[harvest]
        manifests = sorted({*path.glob("manifest*.json*"), *path.glob("merged.json")})
        written = tuple(manifest.stat().st_mtime_ns for manifest in manifests)
        return _open(path, written)

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
    harvests.sort(key=_has_graphs_and_time, reverse=True)
    return [path.name for path in harvests]


def _has_graphs_and_time(harvest: Path) -> tuple[bool, float]:
    """Return whether a harvest has graphs, and when it was begun.

    A harvest whose manifest cannot be read counts as one without graphs; the error is reported when
    it is opened.
    """
    try:
        has_graphs = read_settings(harvest).get("mode") != "nodes"
    except BadInput:
        has_graphs = False
    begun = (harvest / "manifest.json").stat().st_mtime
    return has_graphs, begun


@lru_cache(maxsize=8)
def _open(path: Path, written: tuple[int, ...]) -> Store:
    """Open a store, once for each state of its manifests.

    `written` holds the times at which they were last replaced.
    """
    del written
    return Store(path).require("kind", "mode", "C")
