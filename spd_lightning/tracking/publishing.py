"""Records of a run: its metrics file, and the copies in its trackers."""

import logging
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from spd_lightning import runs
from spd_lightning.errors import BadInput, command, without_passwords
from spd_lightning.tracking.copies import Copies
from spd_lightning.tracking.trackers import trackers

log = logging.getLogger(__name__)

SECRET = re.compile("token|passw|secret|api_key", re.IGNORECASE)
"""Names of settings that are not stored or shown."""


class MetricsFile(Logger):
    """Logs to the run's metrics.jsonl, from which the viewer draws curves.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        runs.append_metrics(self.folder, step or 0, metrics)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing, because settings are in config.yaml."""


def without_secrets(chosen: Any) -> Any:
    """Return the settings of trackers without passwords and tokens."""
    if isinstance(chosen, Mapping):
        public = {}
        for key, value in chosen.items():
            is_secret = value and SECRET.search(str(key))
            public[key] = "***" if is_secret else without_secrets(value)
        return public
    if isinstance(chosen, list):
        return [without_secrets(value) for value in chosen]
    if isinstance(chosen, str):
        return without_passwords(chosen)
    return chosen


def publish(copies: Copies, names: Sequence[str] = runs.MIRRORED) -> None:
    """Complete the copies of a run, and warn about those that are still incomplete.

    Args:
        copies: the copies of the run.
        names: files and folders of the run to send; all that trackers get if omitted.
    """
    if not len(copies):
        return
    name = copies.folder.name
    log.info("run %s: completing the copies of its files in the trackers ...", name)
    started = time.perf_counter()
    errors = copies.complete(names)
    for error in errors:
        again = command(f"push {name}")
        log.warning("%s. The run itself is whole; send the copy later: %s", error, again)
    if not errors:
        seconds = time.perf_counter() - started
        log.info("run %s: the copies are complete (%.0f s)", name, seconds)


def send(chosen: Any, folder: Path, settings: Mapping[str, Any]) -> None:
    """Send a finished run to its trackers, except for what they already have.

    Args:
        chosen: a config's `trainer.logger`.
        folder: the run's folder.
        settings: the run's hyperparameters.

    Raises:
        BadInput: the run has no tracker, or a copy is still incomplete.
    """
    copies = Copies(trackers(chosen, folder), folder, needed=True)
    if len(copies):
        compact_harvests(folder)
    else:
        place = f"run '{folder.name}': trainer.logger is false in its config.yaml"
        raise BadInput(f"{place}; the run has no tracker to push to")
    with copies:
        copies.connect()
        copies.begin(settings)
        failed = copies.complete()
    if failed:
        raise failed[0]


MANY_GROUPS = 16
"""Groups of files of a harvest above which they are merged."""


def compact_harvests(folder: Path, names: Sequence[str] | None = None) -> None:
    """Merge the small files of a run's harvests, since queries and trackers are slow with many.

    A harvest that is being written, or cannot be compacted for another reason, stays as it is.

    names: the harvests; all if omitted.
    """
    from spd_lightning.store import Store
    from spd_lightning.store.compaction import compact

    for manifest in sorted(folder.glob("harvest/*/manifest.json")):
        harvest = manifest.parent
        if names is not None and harvest.name not in names:
            continue
        try:
            groups = Store(harvest).manifest["shards"]
            if groups <= MANY_GROUPS:
                continue
            done = compact(harvest)
        except BadInput as error:
            log.info("harvest %s: it keeps its many files (%s)", harvest.name, error)
            continue
        log.info(
            "harvest %s: %d files were merged into %d", harvest.name, done.files_before, done.files
        )
