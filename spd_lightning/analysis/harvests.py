"""The harvest of a run that can answer a question: the newest one with the tables for it."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from spd_lightning.analysis.store import Store
from spd_lightning.errors import BadInput, nearest
from spd_lightning.runs import Run

SOURCES: dict[str, tuple[tuple[str, ...], str]] = {
    "statistics": (("histograms", "components"), "statistics.yaml"),
    "nodes": (("nodes",), ""),
    "edges": (("dataset_edges", "edges"), "dataset_edges.yaml"),
    "graph": (("edges", "nodes"), "graphs.yaml"),
    "prompts": (("prompts",), ""),
}
"""For each kind of question, the tables that can answer it, the best first, and a config that makes
them (empty: every language model's config does).
"""


def open_harvest(run: Run, question: str, name: str | None = None) -> Store:
    """Open the harvest of a run that can answer a kind of question.

    Args:
        run: the run.
        question: a key of `SOURCES`.
        name: the harvest's name; if omitted, the newest harvest that has the best of the tables.

    Raises:
        BadInput: the run has no harvest of this name, or none with one of these tables.
    """
    wanted, config = SOURCES[question]
    folders = {path.name: path for path in run.harvests}
    if name is not None:
        if name not in folders:
            raise BadInput(
                f"harvest '{name[:60]}': not in run '{run.name}'; {nearest(name, folders)}"
            )
        return Store(folders[name])
    newest_first = sorted(folders.values(), key=_time_begun, reverse=True)
    stores = list(_readable(newest_first))
    for table in wanted:
        for store in stores:
            if table in store.tables:
                return store
    predict = run.predict_command(config) if config else run.predict_command()
    tables = " or ".join(f"'{table}'" for table in wanted)
    raise BadInput(f"run '{run.name}': no harvest with the table {tables}; make one: {predict}")


def _time_begun(harvest: Path) -> float:
    return (harvest / "manifest.json").stat().st_mtime


def _readable(folders: Sequence[Path]) -> Iterator[Store]:
    """Open the harvests that can be read; the others are reported when they are named."""
    for path in folders:
        try:
            yield Store(path)
        except BadInput:
            continue
