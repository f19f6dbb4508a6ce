"""Merge the small groups of a harvest into a few large ones, sorted in the same way.

A harvest of many prompts has thousands of small files. They are slow to upload, and a search has to
look into each. The steps are:

1. Consecutive groups are put together, up to `MOST_BYTES`. A group that is already large is kept.
2. For each table, the rows of the groups are read in blocks, merged, sorted, and appended to a
   new file. A block is a range of prompts or of layers with about `BLOCK_ROWS` rows, so that memory
   is bounded. Every part that is read is compared with its digest.
3. One new `merged.json` replaces the ledgers of all groups. This is the moment of the change.
4. The ledgers of ranks are emptied, and the old files are deleted once no reader needs them
   (`store.leases`).

A process that is killed before step 3 leaves the harvest as it was, and files that no ledger names;
the next compaction deletes them. A process that is killed later leaves a compacted harvest.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from spd_lightning.errors import BadInput, command
from spd_lightning.files import sweep
from spd_lightning.store.columns import TABLES
from spd_lightning.store.index import BY_PROMPT, IndexBuilder
from spd_lightning.store.leases import lease_path, older_readers
from spd_lightning.store.ledgers import (
    MERGED,
    Journal,
    Merged,
    Piece,
    Shard,
    Snapshot,
    check_ledgers,
    files,
    generation_of,
    ledger_path,
    merged_name,
    prompts_of,
    prompts_text,
    read_snapshot,
    replace_json,
    settings_digest,
)
from spd_lightning.store.manifest import read_settings
from spd_lightning.store.parts import Parts
from spd_lightning.store.places import Folder
from spd_lightning.store.shards import TableFile, Written, lock, put_file, write_index
from spd_lightning.store.tables import SORTED, added, ordered, trimmed

MOST_BYTES = 1 << 28
"""Bytes of the files of a merged group."""

MOST_PROMPTS = 1 << 16
"""Prompts of a merged group."""

BLOCK_ROWS = 1 << 21
"""Rows that are merged in memory at once."""

_PROMPT_GROUP = 1 << 15
_OTHER_GROUP = 1 << 14
_PROMPTS_GROUP = 1 << 8
"""Rows in the row groups of merged files: of tables sorted by prompt, of others, of `prompts`."""


class Compaction(NamedTuple):
    """The effect of a compaction.

    `kept_for_readers` is the number of old files that a reader still needs.
    """

    groups_before: int
    groups: int
    files_before: int
    files: int
    kept_for_readers: int


def compact(path: Path) -> Compaction:
    """Merge the small groups of a harvest into large ones.

    Readers are undisturbed, and the process can be killed at any time.

    Raises:
        BadInput: it is not a harvest, another process is writing it, a file is damaged, or there is
            no room. In each case, nothing has changed.
    """
    place = Folder(path)
    settings = read_settings(place)
    snapshot = read_snapshot(place)
    check_ledgers(place, settings, snapshot)
    ranks = {0, *snapshot.ledgers}
    handles = list[int]()
    try:
        for rank in sorted(ranks):
            handles.append(lock(path, rank))  # writers wait, and a second compaction too
        snapshot = read_snapshot(place)
        _sweep(path, snapshot)
        before = snapshot.shards
        shards = _merge_all(path, snapshot, settings)
        kept = _clean(path, shards)
    except OSError as error:
        why = error.strerror or str(error)
        again = command(f"store compact {path}")
        raise BadInput(
            f"harvest '{path}': cannot be compacted ({why}); it is readable as before: make room "
            f"on its disk, then run again: {again}"
        ) from error
    finally:
        for handle in handles:
            os.close(handle)
    return Compaction(len(before), len(shards), _file_count(before), _file_count(shards), kept)


def _file_count(shards: Sequence[Shard]) -> int:
    return sum(1 for shard in shards for _ in files(shard))


def _merge_all(path: Path, snapshot: Snapshot, settings: Mapping[str, Any]) -> list[Shard]:
    """Merge groups, replace the ledgers, and return all groups."""
    batches = list(_batches(snapshot.shards))
    if all(len(batch) == 1 for batch in batches):
        return snapshot.shards
    generation = snapshot.merged["generation"] + 1
    try:
        shards = _merge(path, batches, generation, settings)
        lease_path(path, generation).touch()
        ends = {str(rank): ledger["next"] for rank, ledger in snapshot.ledgers.items()}
        merged: Merged = {
            "generation": generation,
            "shards": shards,
            "next": snapshot.merged["next"] | ends,
            "settings": settings_digest(settings),
        }
        replace_json(path / MERGED, merged)
    except BaseException:
        if generation_of(Folder(path)) < generation:
            for file in path.glob(f"*/merged-{generation}-*"):
                file.unlink()
        raise
    for rank, ledger in snapshot.ledgers.items():
        replace_json(ledger_path(path, rank), ledger | {"shards": [], "generation": generation})
        Journal(path, rank).remove()
    return shards


def _merge(
    path: Path, batches: Sequence[Sequence[Shard]], generation: int, settings: Mapping[str, Any]
) -> list[Shard]:
    """Write the files of merged groups, and return the entries of all groups."""
    merging = Merging(path, settings)
    shards = list[Shard]()
    for batch in batches:
        if len(batch) == 1:
            shards.append(batch[0])
        else:
            name = merged_name(generation, len(shards))
            shards.append(merging.merge(name, batch))
    return shards


def _batches(shards: Sequence[Shard]) -> Iterator[list[Shard]]:
    """Yield lists of consecutive groups; each list becomes one group."""
    batch = list[Shard]()
    kept_bytes = 0
    most_sums = 0
    prompts = 0
    for shard in shards:
        kept, sums = _bytes(shard)
        new_prompts = len(shard["prompts"]) // 16  # each id is 16 hex digits
        total = kept_bytes + kept + max(most_sums, sums)
        if batch and (total > MOST_BYTES or prompts + new_prompts > MOST_PROMPTS):
            yield batch
            batch = []
            kept_bytes = 0
            most_sums = 0
            prompts = 0
        batch.append(shard)
        kept_bytes += kept
        most_sums = max(most_sums, sums)  # rows with the same keys are added up
        prompts += new_prompts
    if batch:
        yield batch


def _bytes(shard: Shard) -> tuple[int, int]:
    """Return the bytes of a group's tables that are kept, and of those that become smaller."""
    kept = 0
    sums = 0
    for table, piece in shard["tables"].items():
        if TABLES[table].merge == "keep":
            kept += piece["bytes"]
        else:
            sums += piece["bytes"]
    return kept, sums


class Merging:
    """Merges groups of a harvest, table by table and block by block.

    Args:
        path: the harvest's folder.
        settings: its settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self._path = path
        self._parts = Parts(Folder(path), settings["layers"])
        self._kept: Mapping[str, int] = settings.get("examples", {})  # by kind

    def merge(self, name: str, batch: Sequence[Shard]) -> Shard:
        """Write the files of one merged group, and return its entry for the ledger.

        Raises:
            BadInput: a file of one of the groups is damaged.
        """
        ids = np.concatenate([prompts_of(shard) for shard in batch])
        index = IndexBuilder(ids)
        put = partial(put_file, self._path, name)
        pieces = dict[str, Piece]()
        for table in TABLES:
            sources = [shard for shard in batch if table in shard["tables"]]
            if not sources:
                continue
            written = put(table, partial(self._write, table, sources, index))
            index.file(table, written.groups, written.blocks)
            pieces[table] = written.piece
        shard: Shard = {
            "name": name,
            "prompts": prompts_text(index.prompts),
            "tables": pieces,
            "indices": write_index(index, put),
        }
        gaps = [shard["gap"] for shard in batch if "gap" in shard]
        if gaps:
            shard["gap"] = max(gaps)
        return shard

    def _write(
        self, table: str, sources: Sequence[Shard], index: IndexBuilder, path: Path
    ) -> Written:
        """Write the rows of a table of several groups to one file."""
        group = _PROMPT_GROUP if table in BY_PROMPT else _OTHER_GROUP
        if table == "prompts":
            group = _PROMPTS_GROUP
        blocks = self._blocks(table, sources, index.prompts)
        first = next(blocks)
        with TableFile(path, table, first, group) as file:
            for frame in chain([first], blocks):
                file.write(frame)
                index.add(table, frame)
        return file.written

    def _blocks(
        self, table: str, sources: Sequence[Shard], prompts: np.ndarray
    ) -> Iterator[pl.DataFrame]:
        """Yield the merged rows of a table, sorted, in blocks that are in order."""
        if table == "prompts":  # in the order of the data
            for shard in sources:
                yield self._parts.span(table, shard, 0, shard["tables"][table]["rows"])
            return
        cuts = self._cuts(table, sources, prompts)  # for each source, [block + 1] rows
        for block in range(len(cuts[0]) - 1):
            frames = []
            for shard, rows in zip(sources, cuts, strict=True):
                if rows[block] < rows[block + 1]:
                    frames.append(
                        self._parts.span(table, shard, int(rows[block]), int(rows[block + 1]))
                    )
            if not frames:
                continue
            if table in BY_PROMPT:  # the rows of each prompt are in one group, and sorted
                yield pl.concat(frames).sort("prompt_id", maintain_order=True)
            elif TABLES[table].merge == "trim" and self._kept:
                rows = trimmed(pl.concat(frames), self._kept)
                yield ordered(table, rows)
            else:
                yield ordered(table, added(table, frames))

    def _cuts(self, table: str, sources: Sequence[Shard], prompts: np.ndarray) -> list[np.ndarray]:
        """Return the rows at which the blocks of a table begin in each group, and the ends.

        Rows of one prompt, or of one layer, are in the same block.
        """
        if table in BY_PROMPT:
            starts = [self._parts.index(s).rows_before(table, prompts) for s in sources]
        elif SORTED[table][0] in ("layer", "target_layer"):
            starts = [self._parts.rows_before_layers(table, shard) for shard in sources]
        else:
            starts = [np.array([0, shard["tables"][table]["rows"]]) for shard in sources]
        totals = np.sum(starts, axis=0)  # rows before each prompt or layer, in all groups
        places = [0]  # the first prompt or layer of each block
        # A block ends before the prompt or layer with which it would exceed BLOCK_ROWS. A single
        # prompt or layer can exceed it.
        for place in range(1, len(totals)):
            if totals[place] - totals[places[-1]] > BLOCK_ROWS and place - 1 > places[-1]:
                places.append(place - 1)
        places.append(len(totals) - 1)
        return [rows[places] for rows in starts]


# ---- files that are not needed any more ----------------------------------------------------------


def _sweep(path: Path, snapshot: Snapshot) -> None:
    """Remove what killed processes left: temporary files, and those of a later generation."""
    for folder in (path, *_folders(path)):
        sweep(folder)
    later = snapshot.merged["generation"] + 1
    for file in path.glob(f"*/merged-{later}-*"):
        file.unlink()


def _clean(path: Path, shards: Sequence[Shard]) -> int:
    """Delete the files that no ledger names; return the number of those that a reader needs."""
    needed = {path / file for shard in shards for file, _ in files(shard)}
    generation = read_snapshot(Folder(path)).merged["generation"]
    unneeded = []
    for folder in _folders(path):
        for pattern in ("part-*", "merged-*"):
            unneeded += [file for file in folder.glob(pattern) if file not in needed]
    if not unneeded:
        return 0
    if older_readers(path, generation):
        return len(unneeded)
    for file in unneeded:
        file.unlink(missing_ok=True)
    return 0


def _folders(path: Path) -> list[Path]:
    """Return the folders of tables and indices."""
    return [folder for folder in path.iterdir() if folder.is_dir()]
