"""Read a harvest: its tables as lazy frames, with an error that names any damaged file."""

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

    A store shows the rows that were committed when it was opened; open it again to see later ones.

    Args:
        path: the harvest's folder, which contains manifest.json.
        skip_damaged: omit every group of shards with a damaged file instead of raising an error.

    Attributes:
        manifest: the settings; also the number of `rows` by table, of `prompts`, and of groups
            (`shards`); whether the harvest is `complete`; and for frozen graphs the largest `gap`
            between an activation and the sum of its in-edges.
        layers: the names of all layers in forward order.

    Raises:
        BadInput: the manifest is missing, cannot be read, or has another schema.

    Examples:
        >>> import lightning as L
        >>> from spd_lightning import TMS, Decomposition, PromptNodes, SparseFeatures, Store
        >>> module = Decomposition(TMS(5, 2), sites={"linear*": 20})
        >>> trainer = L.Trainer(callbacks=[PromptNodes()], default_root_dir="mine")
        >>> _ = trainer.predict(module, SparseFeatures(5, 0.05, batch_size=1))
        >>> store = Store("mine/harvest/nodes")
        >>> store.layers
        ['input', 'linear1', 'linear2', 'output']
        >>> store.scan("prompts").filter(split="probe").collect()["source"].to_list()[:2]
        ['feature 0', 'feature 1']
    """

    def __init__(self, path: str | Path, skip_damaged: bool = False):
        self.path = Path(path)
        settings = read_settings(self.path)
        ledgers = read_ledgers(self.path)
        self._shards: list[Shard] = []
        for ledger in ledgers.values():
            self._shards += ledger["shards"]
        if skip_damaged:
            self._shards = [shard for shard in self._shards if not damaged(self.path, shard)]
        self._scans: dict[str, pl.LazyFrame] = {}
        world: int = settings["world"]
        counts = totals(world, ledgers, self._shards)
        self.manifest: dict[str, Any] = settings | counts
        self.layers: list[str] = settings["layers"]

    def require(self, *facts: str) -> "Store":
        """Return the store itself, after checking that its manifest has all of these entries.

        Raises:
            BadInput: an entry is missing: `predict` did not write the harvest, or it was changed.
        """
        for name in facts:
            if name not in self.manifest:
                raise BadInput(
                    f"harvest '{self.path}': its manifest has no '{name}'; harvest again with "
                    "`predict`"
                )
        return self

    @property
    def tables(self) -> list[str]:
        """The names of the tables that have rows."""
        return [table for table in TABLES if self.manifest["rows"][table]]

    def scan(self, table: str, prompt_id: int | None = None) -> pl.LazyFrame:
        """Return the rows of a table as a lazy frame.

        With `prompt_id`, return the rows of one prompt; only one file is opened for them.

        Raises:
            BadInput: the table does not exist, or one of its files is damaged.
        """
        if prompt_id is not None:
            shards = self._shards_of.get(prompt_id, [])
            rows = self._frame(table, shards)
            wanted = pl.lit(prompt_id, pl.UInt64)
            return rows.filter(pl.col("prompt_id") == wanted)
        if table not in self._scans:
            self._scans[table] = self._frame(table, self._shards)
        return self._scans[table]

    def check(self) -> None:
        """Compare all files with their digests, as `scan` does for one table.

        Raises:
            BadInput: a file is damaged.
        """
        for table in self.tables:
            self._files(table, self._shards)

    def collect(self, query: pl.LazyFrame) -> pl.DataFrame:
        """Run a query on this store's tables.

        Raises:
            BadInput: a file is damaged in a place that `scan` does not read.
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
        """For each prompt, a list of the one group that contains its rows."""
        files = self._files("prompts", self._shards)
        if not files:
            return {}
        prompts = pl.scan_parquet(files, glob=False, include_file_paths="file")
        rows = self.collect(prompts.select("prompt_id", "file"))
        shards = {part(shard): shard for shard in self._shards}
        shards_of = {}
        for prompt_id, file in rows.iter_rows():
            name = Path(file).name
            shards_of[prompt_id] = [shards[name]]
        return shards_of

    def _frame(self, table: str, shards: Sequence[Shard]) -> pl.LazyFrame:
        columns = schema(table, self.layers)
        files = self._files(table, shards)
        if not files:
            return pl.LazyFrame(schema=columns)
        for path in files:
            self._check_columns(table, path, columns)
        return pl.scan_parquet(files, glob=False)

    def _check_columns(self, table: str, path: Path, columns: Mapping[str, Any]) -> None:
        """Check the columns of a file, since even an intact file may hold another table."""
        try:
            actual = pl.read_parquet_schema(path)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise self._damage_error(path, _one_line(error)) from error
        for name in {**columns, **actual}:
            if actual.get(name) != columns.get(name):
                raise self._damage_error(
                    path, f"its column '{name}' is not a column of the table '{table}'"
                )

    def _files(self, table: str, shards: Sequence[Shard]) -> list[Path]:
        """Return the files of a table, after comparing them with their digests."""
        paths = []
        for shard in shards:
            if table not in shard["tables"]:
                continue
            path = self.path / table / part(shard)
            if why := damage(path, shard["tables"][table]):
                raise self._damage_error(path, why)
            paths.append(path)
        return paths

    def _read_through(self, path: Path) -> None:
        try:
            pl.scan_parquet(path, glob=False).collect()
        except (pl.exceptions.PolarsError, OSError) as error:
            raise self._damage_error(path, _one_line(error)) from error

    def _damage_error(self, path: Path, why: str) -> BadInput:
        return BadInput(
            f"harvest '{self.path}': the file {path.relative_to(self.path)} is damaged ({why}); "
            "the other files are readable with Store(path, skip_damaged=True); "
            "to repair the harvest, delete the file and run the same predict command again"
        )


def _one_line(error: Exception) -> str:
    """Return the start of an error's message on one line."""
    return " ".join(str(error).split())[:120]
