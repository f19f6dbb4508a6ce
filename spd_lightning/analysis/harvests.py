"""The harvest of a run that can answer a question: the newest one with the tables for it."""

import logging
from collections.abc import Iterable
from pathlib import Path

from spd_lightning.analysis.store import Store
from spd_lightning.errors import BadInput, nearest
from spd_lightning.runs import Run

log = logging.getLogger(__name__)

SOURCES: dict[str, tuple[tuple[str, ...], str]] = {
    "statistics": (("histograms", "components"), "statistics.yaml"),
    "nodes": (("nodes",), ""),
    "edges": (("dataset_edges", "edges"), "dataset_edges.yaml"),
    "graph": (("edges", "nodes"), "graphs.yaml"),
    "prompts": (("edges", "nodes", "prompts"), ""),
}
"""For each kind of question: the tables that can answer it, the best one first, and a config that
makes them. The config is empty if the configs of all language models do.
"""


def open_harvest(run: Run, question: str, name: str | None = None) -> Store:
    """Open the harvest of a run that can answer a kind of question.

    Args:
        run: the run.
        question: a key of `SOURCES`.
        name: the harvest's name; if omitted, the newest harvest that has the best of the tables.

    Raises:
        BadInput: the run has no harvest of this name, or no harvest with one of the tables. If a
            harvest cannot be read, and no other one answers, its problem is raised.
    """
    wanted, config = SOURCES[question]
    folders = {path.name: path for path in run.harvests}
    if name is not None:
        if name not in folders:
            raise BadInput(
                f"harvest '{name[:60]}': not in run '{run.name}'; {nearest(name, folders)}"
            )
        return Store(folders[name])
    stores, problem = _readable(folders.values())
    for table in wanted:
        for store in stores:
            if table not in store.tables:
                continue
            if problem is not None:
                log.warning("%s; harvest '%s' answers instead", problem, store.path.name)
            return store
    if problem is not None:
        raise problem
    predict = run.predict_command(config) if config else run.predict_command()
    tables = " or ".join(f"'{table}'" for table in wanted)
    raise BadInput(f"run '{run.name}': no harvest with the table {tables}; make one: {predict}")


def _readable(folders: Iterable[Path]) -> tuple[list[Store], BadInput | None]:
    """Open the harvests that can be read, the newest first; also return the first problem."""
    stores = list[Store]()
    problem: BadInput | None = None
    for path in sorted(folders, key=_time_begun, reverse=True):
        try:
            stores.append(Store(path))
        except BadInput as error:
            problem = problem or error
    return stores, problem


def _time_begun(harvest: Path) -> float:
    return (harvest / "manifest.json").stat().st_mtime
