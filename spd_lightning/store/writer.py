"""Writing a harvest: all tables of one batch of prompts at a time, or none of them."""

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
    """Appends one rank's rows to a harvest: begins a new one, or continues one made with the same
    settings.

    Ranks divide the prompts first and leave out the finished ones after, since each opens at its
    own moment.

    Args:
        path: the harvest's folder; it is made if missing.
        manifest: what the rows depend on (harvest, run, kind, mode, threshold, layers, C, config
            …); JSON values. `layers` is required: the names of all layers in forward order.
        rank: this process's number, from 0.
        world: how many processes write; the harvest is complete when each of them has called
            `complete`.

    Attributes:
        finished: the ids of the prompts that any rank had committed when this writer was opened,
            and this one since.

    Raises:
        BadInput: the folder holds a harvest with other settings, another process is writing it, or
            the disk refuses.
    """

    def __init__(
        self, path: str | Path, manifest: Mapping[str, Any], rank: int = 0, world: int = 1
    ):
        assert "layers" in manifest, "a harvest's manifest names its layers"
        assert 0 <= rank < world, f"rank {rank} of {world}"
        self.path = Path(path)
        self.rank = rank
        self.layers: list[str] = list(manifest["layers"])
        with disk(self.path):
            make_folder(self.path)
            self._unlock = weakref.finalize(self, os.close, lock(self.path, rank))
            self._begin(
                json.loads(json.dumps({"schema_version": SCHEMA_VERSION, **manifest})), world
            )
            self._ledger = self._mended(world)
            self._save(self._ledger["shards"], complete=False)
            self._sweep()
        store = Store(self.path, skip_damaged=True)
        self.finished: set[int] = set(
            store.collect(store.scan("prompts").select("prompt_id"))["prompt_id"]
        )

    def write(self, tables: Mapping[str, pl.DataFrame], gap: float | None = None) -> None:
        """Commit all tables of one batch of prompts, or none of them.

        Args:
            tables: frames by table, `prompts` always among them; columns as in `TABLES`, `layer`
                and `kind` also as plain strings. `nodes_by_component` is made here.
            gap: by how much in-edges miss the activations at most, where they should add up (A6).

        Raises:
            BadInput: the disk is full or read-only; what was committed before stays readable.
            ValueError: a frame is not what its table holds, or a prompt was committed before.
        """
        assert self._unlock.alive, "this writer has let go of its share"
        frames = checked(tables, self.layers)
        ids = set(frames["prompts"]["prompt_id"])
        if again := self.finished & ids:
            raise ValueError(
                f"table 'prompts', column 'prompt_id': {min(again)} was committed before"
            )
        shards: list[Shard] = self._ledger["shards"]
        shard: Shard = {"rank": self.rank, "n": shards[-1]["n"] + 1 if shards else 0, "tables": {}}
        with disk(self.path):
            shard["tables"] = {
                t: self._put(t, f, part(shard)) for t, f in frames.items() if f.height
            }
            if gap is not None:
                shard["gap"] = gap
            self._save([*shards, shard], complete=False)
        self.finished |= ids

    def complete(self) -> None:
        """Mark this rank's share as whole, and let go of it."""
        with disk(self.path):
            self._save(self._ledger["shards"], complete=True)
        self.close()

    def close(self) -> None:
        """Let another process write this rank's share; dropping the writer, or dying, does the
        same.
        """
        self._unlock()

    def _begin(self, settings: dict[str, Any], world: int) -> None:
        path = self.path / "manifest.json"
        held = read_settings(self.path) if path.exists() else settings
        check_same(
            self.path, {key: value for key, value in held.items() if key != "world"}, settings
        )
        if held.get("world") != world:
            replace_json(path, settings | {"world": world})

    def _mended(self, world: int) -> Ledger:
        """This rank's ledger, after groups with a damaged file are struck from it: they will be
        harvested again.

        Rank 0 does the same for ranks of an earlier, wider sitting.
        """
        ledgers = read_ledgers(self.path)
        mine = ledgers.setdefault(self.rank, {"shards": [], "complete": False})
        for rank, ledger in ledgers.items():
            if rank == self.rank or (self.rank == 0 and rank >= world):
                held = ledger["shards"]
                ledger["shards"] = [shard for shard in held if not damaged(self.path, shard)]
                if len(ledger["shards"]) < len(held):
                    replace_json(ledger_path(self.path, rank), ledger)
        return mine

    def _sweep(self) -> None:
        """Remove what a killed process of this rank left uncommitted, and temporary files of other
        dead ones.
        """
        sweep(self.path)
        held = {
            self.path / table / part(shard)
            for shard in self._ledger["shards"]
            for table in shard["tables"]
        }
        for path in {
            *self.path.glob(f"*/part-{self.rank}-*"),
            *self.path.glob(f"*/.part-{self.rank}-*"),
        } - held:
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
