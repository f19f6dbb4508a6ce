"""Locks of run folders, so that only one process works on each.

A second process with the same name takes the next number. The run of a killed process is resumed.
"""

import logging
import os
import shutil
import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from spd_lightning.config import digest
from spd_lightning.files import make_folder, root, sweep, sync_folder
from spd_lightning.runs.files import lock, writable, write_json
from spd_lightning.runs.folders import Run, check_name, family

log = logging.getLogger(__name__)

UNCOPIED = "uncopied.json"
"""A run has this file while the copy of one of its trackers may be incomplete."""

_SHARED = "SPD_CLAIM"
_RESULTS = ("metrics.jsonl", "checkpoints", "decomposition.safetensors", "harvest", "summary.json")


class RunLock:
    """A run folder that only this process works on, until `release` or the end of the process.

    Attributes:
        run: the run.
        path: its folder.
        resumed: whether this continues an interrupted run.
    """

    def __init__(self, run: Run, resumed: bool, handle: int | None):
        self.run = run
        self.path = run.path
        self.resumed = resumed
        self._handle = handle
        if handle is not None:
            os.environ[_SHARED] = str(self.path)

    def release(self) -> None:
        """Release the lock; a second call has no effect."""
        if self._handle is not None:
            os.environ.pop(_SHARED, None)
            os.close(self._handle)
        self._handle = None

    def release_and_discard(self) -> None:
        """Release the lock, and delete the folder if the run has no results yet.

        The next attempt can then use its name.
        """
        has_results = any((self.path / name).exists() for name in _RESULTS)
        if self._handle is not None and not has_results:
            shutil.rmtree(self.path, ignore_errors=True)
        self.release()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def acquire_run(name: str, settings: Mapping[str, Any]) -> RunLock:
    """Lock a folder to work in: an interrupted run with the same name and settings, or a new run.

    Runs that are finished or that another process works on are left unchanged; a new run gets the
    next free number (name, name-2, …). The processes that Lightning starts for further devices
    share the lock of the first process.

    Args:
        name: the run's family, usually the name of its config.
        settings: everything that the results depend on; an interrupted run is resumed if its
            settings have the same digest.

    Raises:
        BadInput: a run cannot have this name, or the folder cannot be written.
    """
    shared = os.environ.get(_SHARED)
    if os.environ.get("LOCAL_RANK", "0") != "0" and shared:
        return RunLock(Run(Path(shared)), resumed=True, handle=None)
    key = digest(dict(settings))
    for run in family(check_name(name)):
        if run.record.get("digest") != key:
            continue
        handle = lock(run.path)
        if handle is None:
            log.info("run %s: another process is working on it; taking the next number", run.name)
        elif (run.path / "summary.json").exists():
            os.close(handle)
        else:
            log.info("run %s: resuming from where it was interrupted", run.name)
            for folder in (run.path, run.path / "checkpoints", run.path / "figures"):
                sweep(folder)  # nobody else writes here: the lock is ours
            return RunLock(run, resumed=True, handle=handle)
    return _new_run(name, key)


def uncopied(name: str, settings: Mapping[str, Any]) -> RunLock | None:
    """Lock a finished run with the same name and settings whose tracker has an incomplete copy.

    The command that made the run was killed during the copy, or the tracker did not answer.

    Args:
        name: the run's family.
        settings: as for `acquire_run`.

    Returns:
        The lock, or None if there is no such run.
    """
    key = digest(dict(settings))
    for run in family(check_name(name)):
        same_settings = run.record.get("digest") == key
        if not same_settings or run.state != "finished":
            continue
        if not (run.path / UNCOPIED).exists():
            continue
        handle = lock(run.path)
        if handle is not None:
            return RunLock(run, resumed=True, handle=handle)
    return None


def _new_run(name: str, key: str) -> RunLock:
    """Make the folder of a new run, and lock it."""
    path = _new_folder(name)
    handle = lock(path)
    assert handle is not None, f"a new folder is locked: {path}"
    record = {"family": name, "digest": key, "started": time.time()}
    write_json(path / "run.json", record)
    return RunLock(Run(path), resumed=False, handle=handle)


def _new_folder(name: str) -> Path:
    """Make a folder with the first free number; if two processes try the same, one gets it."""
    with writable(root()):
        make_folder(root())
        for number in count(1):
            numbered = name if number == 1 else f"{name}-{number}"
            path = root() / numbered
            try:
                path.mkdir()
                sync_folder(root())
                return path
            except FileExistsError:
                continue
    raise AssertionError("unreachable: count() never ends")
