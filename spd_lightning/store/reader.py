"""Reading a harvest: tables as lazy frames, and a damaged file told from a wrong query."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from spd_lightning.errors import BadInput
from spd_lightning.store.manifest import Shard, part, read_ledgers, read_settings, totals
from spd_lightning.store.shards import damage, damaged
from spd_lightning.store.tables import TABLES, schema


class Store:
    """One harvest, opened for reading: `Store(path).scan("edges")` is a polars LazyFrame.

    It shows what was committed when it was opened; open it again to see more.

    Args:
        path: a harvest's folder, the one with manifest.json.
        skip_damaged: leave out every group of shards that has a damaged file, instead of refusing
            to read it.

    Attributes:
        manifest: the settings, and `rows` by table, `prompts`, `shards` (groups), `complete`; of
            frozen graphs the largest `gap` between an activation and the sum of what enters it.
        layers: the names of all layers in forward order.

    Raises:
        BadInput: the folder has no manifest, or one that cannot be read, or one of another schema.
    """

    def __init__(self, path: str | Path, skip_damaged: bool = False):
        self.path = Path(path)
        settings = read_settings(self.path)
        ledgers = read_ledgers(self.path)
        shards: list[Shard] = [shard for ledger in ledgers.values() for shard in ledger["shards"]]
        self._shards = [
            shard for shard in shards if not (skip_damaged and damaged(self.path, shard))
        ]
        self._scans: dict[str, pl.LazyFrame] = {}
        self.manifest: dict[str, Any] = settings | totals(settings["world"], ledgers, self._shards)
        self.layers: list[str] = settings["layers"]

    def require(self, *facts: str) -> "Store":
        """Return the store, if its manifest has all of these.

        Raises:
            BadInput: one is missing: the harvest was not written by `predict`, or somebody changed
                it.
        """
        if lacking := [name for name in facts if name not in self.manifest]:
            raise BadInput(
                f"harvest '{self.path}': its manifest has no '{lacking[0]}'; harvest again with "
                "`predict`"
            )
        return self

    @property
    def tables(self) -> list[str]:
        """The tables that have rows."""
        return [table for table in TABLES if self.manifest["rows"][table]]

    def scan(self, table: str, prompt_id: int | None = None) -> pl.LazyFrame:
        """A table's rows, lazily; with `prompt_id` those of one prompt, for which one file is
        opened.

        Raises:
            BadInput: no such table, or one of its files is damaged.
        """
        if prompt_id is not None:
            rows = self._frame(table, self._shards_of.get(prompt_id, []))
            return rows.filter(pl.col("prompt_id") == pl.lit(prompt_id, pl.UInt64))
        if table not in self._scans:
            self._scans[table] = self._frame(table, self._shards)
        return self._scans[table]

    def check(self) -> None:
        """Compare all files with their digests: what `scan` does table by table.

        Raises:
            BadInput: one is damaged.
        """
        for table in self.tables:
            self._files(table, self._shards)

    def collect(self, query: pl.LazyFrame) -> pl.DataFrame:
        """Run a query on this store's tables.

        Raises:
            BadInput: a file is damaged inside, where `scan` does not look.
        """
        try:
            return query.collect()
        except (pl.exceptions.PolarsError, OSError):
            for shard in self._shards:
                for table in shard["tables"]:
                    self._read_through(self.path / table / part(shard))
            raise

    @cached_property
    def _shards_of(self) -> dict[int, list[Shard]]:
        """The group that each prompt's rows are in."""
        files = self._files("prompts", self._shards)
        if not files:
            return {}
        ids = pl.scan_parquet(files, glob=False, include_file_paths="file").select(
            "prompt_id", "file"
        )
        shards = {part(shard): [shard] for shard in self._shards}
        return {
            prompt_id: shards[Path(file).name] for prompt_id, file in self.collect(ids).iter_rows()
        }

    def _frame(self, table: str, shards: Sequence[Shard]) -> pl.LazyFrame:
        columns = schema(table, self.layers)
        files = self._files(table, shards)
        if not files:
            return pl.LazyFrame(schema=columns)
        for path in files:
            self._check_columns(table, path, columns)
        return pl.scan_parquet(files, glob=False)

    def _check_columns(self, table: str, path: Path, columns: Mapping[str, Any]) -> None:
        """A file that is whole may still come from a stranger, and be another table."""
        try:
            found = pl.read_parquet_schema(path)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise self._refusal(path, " ".join(str(error).split())[:120]) from error
        for name in {**columns, **found}:
            if found.get(name) != columns.get(name):
                raise self._refusal(
                    path, f"its column '{name}' is not one that the table '{table}' has"
                )

    def _files(self, table: str, shards: Sequence[Shard]) -> list[Path]:
        held = {
            self.path / table / part(s): s["tables"][table] for s in shards if table in s["tables"]
        }
        for path, piece in held.items():
            if why := damage(path, piece):
                raise self._refusal(path, why)
        return list(held)

    def _read_through(self, path: Path) -> None:
        try:
            pl.scan_parquet(path, glob=False).collect()
        except (pl.exceptions.PolarsError, OSError) as error:
            raise self._refusal(path, " ".join(str(error).split())[:120]) from error

    def _refusal(self, path: Path, why: str) -> BadInput:
        return BadInput(
            f"harvest '{self.path}': the file {path.relative_to(self.path)} is damaged ({why}); "
            "the others are readable"
            " with Store(path, skip_damaged=True); to mend it, delete the file and run the same "
            "predict again"
        )
