"""Describe and verify a harvest: the sizes of its tables, and every file against its digest."""

import fcntl
import os
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from spd_lightning.store.ledgers import check_ledgers, files, read_snapshot
from spd_lightning.store.manifest import read_settings, totals
from spd_lightning.store.places import Folder, Place
from spd_lightning.store.shards import damage
from spd_lightning.store.tables import TABLES

State = Literal["complete", "in progress", "incomplete"]


class TableSize(NamedTuple):
    """The rows of a table, or of an index, and the bytes and number of its files."""

    rows: int
    bytes: int
    files: int


class Description(NamedTuple):
    """The contents of a harvest.

    Attributes:
        state: complete; in progress if a process is writing it; otherwise incomplete.
        manifest: as `Store.manifest`.
        sizes: the sizes of all tables with rows, and of the indices.
    """

    state: State
    manifest: dict[str, Any]
    sizes: dict[str, TableSize]

    @property
    def bytes(self) -> int:
        """The bytes of all files."""
        return sum(size.bytes for size in self.sizes.values())

    @property
    def files(self) -> int:
        """The number of all files."""
        return sum(size.files for size in self.sizes.values())


class Finding(NamedTuple):
    """One damaged file, and what is wrong with it."""

    file: str
    why: str


def describe(place: Place) -> Description:
    """Return the contents of a harvest, without reading any file of rows.

    Raises:
        BadInput: it is not a harvest, or its ledgers cannot be read.
    """
    settings = read_settings(place)
    snapshot = read_snapshot(place)
    check_ledgers(place, settings, snapshot)
    sizes = dict[str, TableSize]()
    for shard in snapshot.shards:
        for folder, piece in (shard["tables"] | shard["indices"]).items():
            rows, size, count = sizes.get(folder, (0, 0, 0))
            sizes[folder] = TableSize(rows + piece["rows"], size + piece["bytes"], count + 1)
    order = [*TABLES, *sorted(sizes)]
    ordered = {folder: sizes[folder] for folder in order if folder in sizes}
    manifest = settings | totals(settings["world"], snapshot, snapshot.shards)
    state: State = "incomplete"
    if manifest["complete"]:
        state = "complete"
    elif isinstance(place, Folder) and _is_written(place):
        state = "in progress"
    return Description(state, manifest, ordered)


def findings(place: Place) -> Iterator[Finding | None]:
    """Compare every file of a harvest with the ledgers; yield what is wrong with each, or None.

    Raises:
        BadInput: it is not a harvest, or its ledgers cannot be read.
    """
    settings = read_settings(place)
    snapshot = read_snapshot(place)
    check_ledgers(place, settings, snapshot)
    for shard in snapshot.shards:
        for file, piece in files(shard):
            why = damage(place, file, piece)
            yield None if why is None else Finding(file, why)


def _is_written(place: Folder) -> bool:
    """Return whether a process holds the lock of a rank."""
    for path in place.path.glob(".lock-*"):
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(handle)
    return False
