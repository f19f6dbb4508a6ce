"""Write a harvest: all tables of a batch of prompts are committed together or not at all."""

import json
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from spd_lightning.files import make_folder, sweep, whole
from spd_lightning.store.manifest import (
    Ledger,
    Piece,
    Shard,
    check_same,
    ledger_path,
    part,
    read_ledgers,
    read_settings,
)
from spd_lightning.store.reader import Store
from spd_lightning.store.shards import damaged, disk, lock, replace_json, write_parquet
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
            self._ledger = self._repair(world)
            self._save(self._ledger["shards"], complete=False)
            self._sweep()
        store = Store(self.path, skip_damaged=True)
        prompts = store.collect(store.scan("prompts").select("prompt_id"))
        self.finished: set[int] = set(prompts["prompt_id"])

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
        shards: list[Shard] = self._ledger["shards"]
        n = shards[-1]["n"] + 1 if shards else 0
        shard: Shard = {"rank": self.rank, "n": n, "tables": {}}
        with disk(self.path):
            for table, frame in frames.items():
                if frame.height:
                    shard["tables"][table] = self._put(table, frame, part(shard))
            if gap is not None:
                shard["gap"] = gap
            self._save([*shards, shard], complete=False)
        self.finished |= ids

    def complete(self) -> None:
        """Mark this rank's share as complete, and close the writer."""
        with disk(self.path):
            self._save(self._ledger["shards"], complete=True)
        self.close()

    def close(self) -> None:
        """Release the lock of this rank's share; it is also released when the writer is deleted."""
        self._unlock()

    def _begin(self, settings: dict[str, Any], world: int) -> None:
        """Write the manifest, or check that an existing one has the same settings."""
        path = self.path / "manifest.json"
        previous_world = None
        if path.exists():
            previous = read_settings(self.path)
            previous_world = previous.pop("world", None)
            check_same(self.path, previous, settings)
        if previous_world != world:
            replace_json(path, settings | {"world": world})

    def _repair(self, world: int) -> Ledger:
        """Remove the groups with a damaged file from this rank's ledger, and return the ledger.

        Their prompts will be harvested again. Rank 0 does the same for the ranks of an earlier
        harvest with more processes.
        """
        ledgers = read_ledgers(self.path)
        own_ledger = ledgers.setdefault(self.rank, {"shards": [], "complete": False})
        for rank, ledger in ledgers.items():
            abandoned = self.rank == 0 and rank >= world
            if rank != self.rank and not abandoned:
                continue
            intact = [shard for shard in ledger["shards"] if not damaged(self.path, shard)]
            changed = len(intact) < len(ledger["shards"])
            ledger["shards"] = intact
            if changed:
                replace_json(ledger_path(self.path, rank), ledger)
        return own_ledger

    def _sweep(self) -> None:
        """Remove the uncommitted files of killed processes of this rank, and temporary files."""
        sweep(self.path)
        committed = set[Path]()
        for shard in self._ledger["shards"]:
            committed.update(self.path / table / part(shard) for table in shard["tables"])
        written = {
            *self.path.glob(f"*/part-{self.rank}-*"),
            *self.path.glob(f"*/.part-{self.rank}-*"),
        }
        for path in written - committed:
            path.unlink()

    def _put(self, table: str, frame: pl.DataFrame, name: str) -> Piece:
        path = self.path / table / name
        make_folder(path.parent)
        with whole(path) as temporary:
            return write_parquet(frame, table, temporary)

    def _save(self, shards: list[Shard], complete: bool) -> None:
        ledger: Ledger = {"shards": shards, "complete": complete}
        replace_json(ledger_path(self.path, self.rank), ledger)
        self._ledger = ledger
