"""Where files go, and how: they appear whole or not at all, whoever is killed while writing
them.
"""

import hashlib
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path

_TEMPORARY = re.compile(r"\..+\.(?P<place>[0-9a-f]{8})\.(?P<pid>[0-9]+)\.new", re.DOTALL)
_NUMBERS = count()
_FOREIGN_AGE = 24 * 3600.0
"""Seconds after which an untouched temporary file of another machine counts as left behind."""


def root() -> Path:
    """The folder that holds all that is made here: $SPD_RUNS, or ./runs."""
    return Path(os.environ.get("SPD_RUNS") or "runs")


def mark() -> str:
    """Return an end for the name of a temporary file or folder, another one at every call; such
    names begin with a dot.

    It holds the process, for `sweep`, and a number, since several threads may write the same file.
    """
    return f".{next(_NUMBERS)}.{_place()}.{os.getpid()}.new"


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, if they are missing; its name is then on the disk."""
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        sync_folder(path.parent)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to: it becomes `path` at the end, or after an error nothing
    does.

    The name is used once: several processes and threads may write the same file, and the last one
    wins. After a loss of power `path` is the old file or the new one: the content is on the disk
    before the name, and the name before this returns.
    """
    temporary = path.with_name(f".{path.name}{mark()}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Puts the names in a folder on the disk; after a rename they are in memory alone."""
    try:
        _sync(folder)
    except OSError:
        """Some network and user-space file systems cannot sync folders; the rename itself has
        succeeded.
        """


def sweep(folder: Path) -> None:
    """Removes the temporary files and folders that killed processes left in a folder.

    Those of processes that are alive stay, and so do those that another machine has touched within
    a day.
    """
    for path in folder.glob(".*.new"):
        if not _left_behind(path):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _left_behind(path: Path) -> bool:
    named = _TEMPORARY.fullmatch(path.name)
    if named is None:
        return False
    if named["place"] == _place():
        return not _alive(int(named["pid"]))
    try:
        return time.time() - path.stat().st_mtime > _FOREIGN_AGE
    except OSError:  # its process has just finished
        return False


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (
        PermissionError,
        OverflowError,
    ):  # somebody else's process; a number that no process has
        return True
    return True


@cache
def _place() -> str:
    """Eight hex characters for the machine, or the container, in which this process's number means
    this process.
    """
    try:
        numbers = os.readlink("/proc/self/ns/pid")
    except OSError:  # no such thing outside Linux
        numbers = ""
    return hashlib.sha256(f"{socket.gethostname()} {numbers}".encode()).hexdigest()[:8]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
