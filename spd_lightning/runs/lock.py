"""Claiming a run folder: one process works on it, a second one takes the next number, a killed one
is continued.
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
"""A run has this file while a tracker of its may not have everything."""

_SHARED = "SPD_CLAIM"
_REACHED = ("metrics.jsonl", "checkpoints", "decomposition.safetensors", "harvest", "summary.json")


class RunLock:
    """A run folder that this process alone works on, until `release` or its own end.

    Attributes:
        run: the run.
        path: its folder.
        resumed: whether an interrupted run goes on here.
    """

    def __init__(self, run: Run, resumed: bool, handle: int | None):
        self.run, self.path, self.resumed = run, run.path, resumed
        self._handle = handle
        if handle is not None:
            os.environ[_SHARED] = str(self.path)

    def release(self) -> None:
        """Let others work on it; doing so twice is harmless."""
        if self._handle is not None:
            os.environ.pop(_SHARED, None)
            os.close(self._handle)
        self._handle = None

    def release_and_discard(self) -> None:
        """Release it; a folder in which nothing was reached yet is taken away, so that the next try
        has its name.
        """
        if self._handle is not None and not any((self.path / sign).exists() for sign in _REACHED):
            shutil.rmtree(self.path, ignore_errors=True)
        self.release()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def acquire_run(name: str, settings: Mapping[str, Any]) -> RunLock:
    """A folder to work in: the family's interrupted run with the same settings, or a fresh one.

    A finished run is never touched, nor one that another process works on: the next number is taken
    (name, name-2 …). The processes that Lightning starts for further devices share the claim of the
    first.

    Args:
        name: the run's family, usually the name of its config.
        settings: all that decides what the run will be; runs with an equal digest may continue each
            other.

    Raises:
        BadInput: the name cannot name a run, or the disk refuses.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0" and (shared := os.environ.get(_SHARED)):
        return RunLock(Run(Path(shared)), True, None)
    key = digest(dict(settings))
    for run in family(check_name(name)):
        if run.record.get("digest") != key:
            continue
        if (handle := lock(run.path)) is None:
            log.info("run %s: another process is working on it; taking the next number", run.name)
        elif (run.path / "summary.json").exists():
            os.close(handle)
        else:
            log.info("run %s: resuming from where it was interrupted", run.name)
            for folder in (run.path, run.path / "checkpoints", run.path / "figures"):
                sweep(folder)  # nobody else writes here: the lock is ours
            return RunLock(run, True, handle)
    return _fresh(name, key)


def uncopied(name: str, settings: Mapping[str, Any]) -> RunLock | None:
    """Claim the family's finished run with the same settings of which a tracker lacks a part, if
    there is one.

    The command that made it was killed while it sent the copy, or its tracker did not answer.

    Args:
        name: the run's family.
        settings: as for `acquire_run`.
    """
    key = digest(dict(settings))
    for run in family(check_name(name)):
        finished = run.record.get("digest") == key and run.state == "finished"
        if finished and (run.path / UNCOPIED).exists() and (handle := lock(run.path)) is not None:
            return RunLock(run, True, handle)
    return None


def _fresh(name: str, key: str) -> RunLock:
    path = _new_folder(name)
    handle = lock(path)
    assert handle is not None, f"a folder just made is locked: {path}"
    write_json(path / "run.json", {"family": name, "digest": key, "started": time.time()})
    return RunLock(Run(path), False, handle)


def _new_folder(name: str) -> Path:
    """Making the folder is what decides between two processes that want the same number."""
    with writable(root()):
        make_folder(root())
        for number in count(1):
            path = root() / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir()
                sync_folder(root())
                return path
            except FileExistsError:
                continue
    raise AssertionError("numbers do not end")
