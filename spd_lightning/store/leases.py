"""Leases: which readers still need the files that a compaction replaced.

Each compaction starts a new generation of a harvest's files. A process that opens a harvest holds a
shared lock on `.readers-<generation>`. The files of older generations are deleted once nobody holds
their lock, so a reader keeps its files for as long as it needs them. The system releases the locks
of a process that ends or is killed.

A process keeps a lease as long as one of its stores is open, and after that until it opens a newer
generation, since a lazy frame can outlive its store. Without a lease, for example on a file system
without locks, a reader has to open the harvest again after a compaction.
"""

import fcntl
import os
import re
import weakref
from pathlib import Path
from threading import Lock
from typing import Any

_FILE = re.compile(r"\.readers-([0-9]{1,9})", re.ASCII)


class _Lease:
    """The lock of one process on one generation, and its stores that are open."""

    def __init__(self, handle: int):
        self.handle = handle
        self.stores = weakref.WeakSet[Any]()


_held: dict[tuple[str, int], _Lease] = {}
_guard = Lock()


def lease_path(folder: Path, generation: int) -> Path:
    """Return the file that readers of a generation lock."""
    return folder / f".readers-{generation}"


def hold(folder: Path, generation: int, store: object) -> None:
    """Hold the lease of a generation as long as `store` exists.

    Nothing happens if the file system has no locks, or the folder cannot be written.
    """
    key = (str(folder.resolve()), generation)
    with _guard:
        if key in _held and not _is_current(_held[key], lease_path(folder, generation)):
            os.close(_held.pop(key).handle)  # the harvest was deleted and written again
        if key not in _held:
            handle = _shared_lock(lease_path(folder, generation))
            if handle is None:
                return
            _held[key] = _Lease(handle)
        _held[key].stores.add(store)
    _release_unused(folder, generation)


def older_readers(folder: Path, generation: int) -> bool:
    """Return whether anybody may still need the files of an older generation."""
    _release_unused(folder, generation)
    in_use = False
    for path in folder.glob(".readers-*"):
        match = _FILE.fullmatch(path.name)
        if match is None or int(match[1]) >= generation:
            continue
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except OSError:
            in_use = True
        finally:
            os.close(handle)
    return in_use


def _release_unused(folder: Path, generation: int) -> None:
    """Release this process's leases of older generations whose stores are gone."""
    place = str(folder.resolve())
    with _guard:
        for key, lease in list(_held.items()):
            is_older = key[0] == place and key[1] < generation
            if is_older and not lease.stores:
                os.close(lease.handle)
                del _held[key]


def _is_current(lease: _Lease, path: Path) -> bool:
    """Return whether a lease is on the file that has this path now."""
    try:
        return os.path.samestat(os.fstat(lease.handle), path.stat())
    except OSError:
        return False


def _shared_lock(path: Path) -> int | None:
    """Return an open handle with a shared lock, or None if that is impossible."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
    except OSError:
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError:
            return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle
