"""Write files so that they appear whole or not at all, even if the writing process is killed."""

import errno
import hashlib
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import count
from pathlib import Path

_TEMPORARY = re.compile(r"\..+\.(?P<place>[0-9a-f]{8})\.(?P<pid>[0-9]+)\.new", re.DOTALL)
_NUMBERS = count()
_FOREIGN_AGE = 24 * 3600.0
"""Seconds after which a temporary file of another machine that has not changed can be removed."""


def root() -> Path:
    """Return the folder of all runs, targets and data: $SPD_RUNS, or ./runs."""
    folder = os.environ.get("SPD_RUNS") or "runs"
    return Path(folder)


def mark() -> str:
    """Return a suffix for the name of a temporary file or folder, different at every call.

    It contains the machine and the process, for `sweep`, and a number, since several threads can
    write the same file. The name before it has to begin with a dot.
    """
    number = next(_NUMBERS)
    return f".{number}.{_place()}.{os.getpid()}.new"


def make_folder(path: Path) -> None:
    """Make a folder and its parents if they are missing, and flush its name to disk."""
    if path.is_dir():
        return
    path.mkdir(parents=True, exist_ok=True)
    sync_folder(path.parent)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary name next to `path`; at the end, the file is renamed to `path`.

    After an error, the temporary file is removed, and `path` is unchanged. Several processes and
    threads can write the same file; the last one wins. After a power failure, `path` is either the
    old or the new file, since the content is flushed to disk before the name is.

    Raises:
        OSError: `path` is a folder or a device, such as /dev/null, which must not be replaced.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    temporary = path.with_name(f".{path.name}{mark()}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk; a rename alone changes them only in memory."""
    with suppress(OSError):  # some network file systems cannot do this; the rename has succeeded
        _sync(folder)


def sweep(folder: Path) -> None:
    """Remove the temporary files and folders that killed processes left in a folder.

    Those of running processes stay, and so do those of other machines that changed within a day.
    """
    for path in folder.glob(".*.new"):
        if not _left_behind(path):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _left_behind(path: Path) -> bool:
    """Return whether a path is a temporary one of a process that has ended."""
    name = _TEMPORARY.fullmatch(path.name)
    if name is None:
        return False
    if name["place"] == _place():
        return not _alive(int(name["pid"]))
    try:
        age = time.time() - path.stat().st_mtime
    except OSError:  # its process has just finished
        return False
    return age > _FOREIGN_AGE


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it belongs to another user
        return True
    except OverflowError:  # no process has this number, so the file is not one of ours
        return True
    return True


@cache
def _place() -> str:
    """Return eight hex characters that identify the machine or container of this process."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # not on Linux
        namespace = ""
    place = f"{socket.gethostname()} {namespace}"
    digits = hashlib.sha256(place.encode()).hexdigest()
    return digits[:8]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
