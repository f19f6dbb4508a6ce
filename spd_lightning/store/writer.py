"""Write a harvest: all tables of a batch of prompts are committed together or not at all."""

import json
import os
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from spd_lightning.files import make_folder, sweep
from spd_lightning.store.index import IndexBuilder
from spd_lightning.store.leases import older_readers
from spd_lightning.store.ledgers import (
    MERGED,
    Journal,
    Ledger,
    Piece,
    Shard,
    Snapshot,
    empty_ledger,
    files,
    ledger_path,
    part_name,
    prompts_of,
    prompts_text,
    read_snapshot,
    replace_json,
    settings_digest,
)
from spd_lightning.store.manifest import MANIFEST, check_same, read_settings
from spd_lightning.store.places import Folder
from spd_lightning.store.shards import damaged, disk, lock, put_file, write_index, write_parquet
from spd_lightning.store.tables import SCHEMA_VERSION, checked


class Writer:
    """A writer that appends one rank's rows to a harvest.

    The harvest is created, or continued if it was made with the same settings.

    Ranks first divide all prompts among themselves, and then skip those that are finished. The
    order matters, since ranks open the harvest at different times.

    Args:
        path: the harvest's folder; it is created if missing.
        manifest: the settings that the rows depend on (harvest, run, kind, mode, threshold, layers,
            C, config, …), as JSON values. `layers` is required: the names of all layers in forward
            order.
        rank: the number of this process, from 0.
        world: the number of writing processes; the harvest is complete when each of them has called
            `complete`.

    Attributes:
        finished: the ids of the prompts that any rank had committed when this writer was opened, or
            that this writer has committed since.

    Raises:
        BadInput: the folder holds a harvest with other settings, another process is writing it, or
            the folder cannot be written.
    """

    def __init__(
        self, path: str | Path, manifest: Mapping[str, Any], rank: int = 0, world: int = 1
    ):
        assert "layers" in manifest, "the manifest of a harvest must name its layers"
        assert 0 <= rank < world, f"rank {rank} of {world}"
        self.path = Path(path)
        self.rank = rank
        self.layers: list[str] = list(manifest["layers"])
        versioned = {"schema_version": SCHEMA_VERSION, **manifest}
        settings = json.loads(json.dumps(versioned))  # as they will be read back
        with disk(self.path):
            make_folder(self.path)
            self._unlock = weakref.finalize(self, os.close, lock(self.path, rank))
            self._begin(settings, world)
            self._journal = Journal(self.path, rank)
            snapshot = read_snapshot(Folder(self.path))
            self._ledger = snapshot.ledgers.setdefault(rank, empty_ledger())
            # `merged.json` may have been lost, or be that of another harvest; its groups are then
            # harvested again.
            self._ledger["generation"] = snapshot.merged["generation"]
            self._ledger["settings"] = settings_digest(settings)
            snapshot.merged["settings"] = self._ledger["settings"]
            dropped = self._repair(snapshot, world)
            self._save(complete=False)
            self._sweep(snapshot, dropped)
        self.finished = set[int]()
        for shard in snapshot.shards:
            if not damaged(Folder(self.path), shard):
                self.finished.update(prompts_of(shard).tolist())

    def write(self, tables: Mapping[str, pl.DataFrame], gap: float | None = None) -> None:
        """Commit all tables of one batch of prompts, or none of them.

        Args:
            tables: the frames by table, with the columns of `TABLES`. `prompts` is required.
                `layer` and `kind` can also be plain strings. `nodes_by_component` is derived from
                `nodes`.
            gap: the largest gap between an activation and the sum of its in-edges, for graphs in
                which they should add up (A6).

        Raises:
            BadInput: the disk is full or read-only; what was committed before stays readable.
            ValueError: a frame has the wrong columns, or a prompt was committed before.
        """
        assert self._unlock.alive, "this writer is closed"
        frames = checked(tables, self.layers)
        ids = set(frames["prompts"]["prompt_id"])
        repeated = self.finished & ids
        if repeated:
            raise ValueError(
                f"table 'prompts', column 'prompt_id': {min(repeated)} was committed before"
            )
        with disk(self.path):
            shard = self._write_group(part_name(self.rank, self._ledger["next"]), frames)
            if gap is not None:
                shard["gap"] = gap
            self._journal.append(shard)
        self._ledger["shards"].append(shard)
        self._ledger["next"] += 1
        self.finished |= ids

    def _write_group(self, name: str, frames: Mapping[str, pl.DataFrame]) -> Shard:
        """Write the files of one group, and return its entry for the ledger."""
        put = partial(put_file, self.path, name)
        index = IndexBuilder(frames["prompts"]["prompt_id"].to_numpy())
        pieces = dict[str, Piece]()
        for table, frame in frames.items():
            if frame.is_empty():
                continue
            index.add(table, frame)
            written = put(table, partial(write_parquet, frame, table))
            index.file(table, written.groups, written.blocks)
            pieces[table] = written.piece
        return {
            "name": name,
            "prompts": prompts_text(index.prompts),
            "tables": pieces,
            "indices": write_index(index, put),
        }

    def complete(self) -> None:
        """Mark this rank's share as complete, and close the writer."""
        with disk(self.path):
            self._save(complete=True)
        self.close()

    def close(self) -> None:
        """Release the lock of this rank's share; it is also released when the writer is deleted."""
        self._unlock()

    def _begin(self, settings: dict[str, Any], world: int) -> None:
        """Write the manifest, or check that an existing one has the same settings."""
        path = self.path / MANIFEST
        previous_world = None
        if path.exists():
            previous = read_settings(self.path)
            previous_world = previous.pop("world", None)
            check_same(self.path, previous, settings)
        if previous_world != world:
            replace_json(path, settings | {"world": world})

    def _repair(self, snapshot: Snapshot, world: int) -> list[Shard]:
        """Remove the groups with a damaged file from this rank's ledger, and return these groups.

        Their prompts will be harvested again. Rank 0 does the same for merged groups, and for the
        ranks of an earlier harvest with more processes.
        """
        dropped = list[Shard]()

        def intact(shards: list[Shard]) -> list[Shard]:
            whole = [shard for shard in shards if not damaged(Folder(self.path), shard)]
            dropped.extend(shard for shard in shards if shard not in whole)
            return whole

        for rank, ledger in snapshot.ledgers.items():
            abandoned = self.rank == 0 and rank >= world
            if rank != self.rank and not abandoned:
                continue
            count = len(ledger["shards"])
            ledger["shards"] = intact(ledger["shards"])
            if abandoned and len(ledger["shards"]) < count:
                self._replace(rank, ledger)
        merged = snapshot.merged
        count = len(merged["shards"])
        if self.rank == 0:
            merged["shards"] = intact(merged["shards"])
        if len(merged["shards"]) < count:
            replace_json(self.path / MERGED, merged)
        return dropped

    def _sweep(self, snapshot: Snapshot, dropped: Sequence[Shard]) -> None:
        """Remove the uncommitted files of killed processes of this rank, and temporary files.

        The files of damaged groups are removed, too. Those that a compaction replaced stay as long
        as a reader needs them.
        """
        sweep(self.path)
        removed = {self.path / file for shard in dropped for file, _ in files(shard)}
        committed = {self.path / file for shard in snapshot.shards for file, _ in files(shard)}
        keep_older = older_readers(self.path, snapshot.merged["generation"])
        for path in self.path.glob(f"*/part-{self.rank}-*"):
            n = path.stem.rpartition("-")[2]
            is_new = n.isdecimal() and int(n) >= self._ledger["next"]
            if path not in committed and (is_new or not keep_older):
                removed.add(path)
        removed.update(self.path.glob(f"*/.part-{self.rank}-*"))
        for path in removed:
            path.unlink(missing_ok=True)

    def _save(self, complete: bool) -> None:
        """Write the whole ledger of this rank, which replaces the lines of its journal."""
        self._ledger["complete"] = complete
        self._replace(self.rank, self._ledger)

    def _replace(self, rank: int, ledger: Ledger) -> None:
        replace_json(ledger_path(self.path, rank), ledger)
        Journal(self.path, rank).remove()
