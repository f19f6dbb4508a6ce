"""Read a harvest: its tables as lazy frames, with an error that names any damaged file."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from spd_lightning.errors import BadInput, nearest
from spd_lightning.store.columns import INDEX
from spd_lightning.store.index import BY_PROMPT, unit_key
from spd_lightning.store.leases import hold
from spd_lightning.store.ledgers import (
    Shard,
    Snapshot,
    check_ledgers,
    file_name,
    files,
    generation_of,
    prompts_of,
    read_snapshot,
)
from spd_lightning.store.manifest import read_settings, totals
from spd_lightning.store.parts import Parts, check_columns, damage_error, one_line
from spd_lightning.store.places import Folder, place_of
from spd_lightning.store.shards import damage, damaged
from spd_lightning.store.tables import TABLES, schema


class Store:
    """One harvest, opened for reading: `Store(path).scan("edges")` is a polars LazyFrame.

    A store shows the rows that were committed when it was opened; open it again to see later ones.
    Opening reads only the ledgers, and no file of rows.

    Args:
        path: the harvest's folder, which contains manifest.json, or its address in an object store:
            s3://bucket/folder, or another one that fsspec opens.
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
        self._place = place_of(path)
        self.path = Path(self._place.name)
        settings = read_settings(self._place)
        snapshot = self._hold_snapshot()
        self._shards = snapshot.shards
        if not skip_damaged:
            check_ledgers(self._place, settings, snapshot)
        else:
            self._shards = [shard for shard in self._shards if not damaged(self._place, shard)]
        self._scans: dict[str, pl.LazyFrame] = {}
        world: int = settings["world"]
        counts = totals(world, snapshot, self._shards)
        self.manifest: dict[str, Any] = settings | counts
        self.layers: list[str] = settings["layers"]
        self._parts = Parts(self._place, self.layers)

    def _hold_snapshot(self) -> Snapshot:
        """Read the ledgers, and make sure that their files stay while this store is open."""
        while True:
            snapshot = read_snapshot(self._place)
            generation = snapshot.merged["generation"]
            if not isinstance(self._place, Folder):
                return snapshot
            hold(self._place.path, generation, self)
            if generation_of(self._place) == generation:  # otherwise, it was compacted meanwhile
                return snapshot

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

    def scan(
        self, table: str, prompt_id: int | None = None, component: tuple[str, int] | None = None
    ) -> pl.LazyFrame:
        """Return the rows of a table as a lazy frame.

        With `prompt_id`, return the rows of one prompt. With `component`, return the rows of one
        component, given as (layer, number), in `nodes_by_component`; these are all nodes there,
        also those of other kinds. Only the parts of files with these rows are read.

        Raises:
            BadInput: the table or the layer does not exist, or one of the files is damaged.
        """
        columns = schema(table, self.layers)
        if component is not None:
            assert table == INDEX, f"rows of one component are read from '{INDEX}'"
            assert prompt_id is None, "a component and a prompt cannot be given together"
            frame = self._component_rows(*component)
        elif prompt_id is not None and (table in BY_PROMPT or table == "prompts"):
            frame = self._prompt_rows(table, prompt_id)
        elif prompt_id is not None:
            shard = self._shard_of(prompt_id)
            rows = self._frame(table, [] if shard is None else [shard])
            return rows.filter(pl.col("prompt_id") == pl.lit(prompt_id, pl.UInt64))
        else:
            if table in self._scans:
                self._compare(table, self._shards)  # a file may have been damaged since
            else:
                self._scans[table] = self._frame(table, self._shards)
            return self._scans[table]
        return pl.LazyFrame(schema=columns) if frame is None else frame.lazy()

    def prompts_with(
        self,
        units: Sequence[tuple[str, int]],
        mode: Literal["all", "any"] = "all",
        min_importance: float = 0.0,
    ) -> pl.DataFrame:
        """Return the prompts in which all of some components, or any of them, are nodes.

        Inputs, embeddings and outputs are found like components.

        Args:
            units: each as (layer, number); different from each other.
            mode: whether a prompt needs all of them or any.
            min_importance: the least importance of a node; nodes without an importance count.

        Returns:
            The columns `prompt_id` and, for each unit, `layer:number`: its largest importance in
            the prompt; null if it is not a node there or has no importance.

        Raises:
            BadInput: a layer does not exist, or a file is damaged.
        """
        keys = [unit_key(self._layer(layer), number) for layer, number in units]
        prompts = [np.zeros(0, np.uint64)]
        values = [np.zeros((len(units), 0), np.float32)]
        for shard in self._shards:
            if INDEX not in shard["tables"]:
                continue
            found, importance = self._search(shard, keys, mode, min_importance)
            prompts.append(found)
            values.append(importance)
        importance = np.concatenate(values, axis=1)  # [unit, prompt]
        columns = {"prompt_id": pl.Series(np.concatenate(prompts), dtype=pl.UInt64)}
        for place, (layer, number) in enumerate(units):
            column = pl.Series(importance[place], dtype=pl.Float32)
            columns[f"{layer}:{number}"] = column.fill_nan(None)
        return pl.DataFrame(columns).sort("prompt_id")

    def _search(
        self, shard: Shard, keys: Sequence[int], mode: str, min_importance: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the prompts of a group that have units, and their importances: [unit, prompt]."""
        index = self._parts.index(shard)
        shape = (len(keys), len(index.prompts))
        importance = np.full(shape, np.nan, np.float32)
        is_node = np.zeros(shape, bool)
        for row, key in enumerate(keys):
            start, stop = index.postings(key)
            if start == stop:
                if mode == "all":
                    return index.prompts[:0], importance[:, :0]
                continue
            postings = self._parts.postings(shard, start, stop)
            values = postings[:, 1].view(np.float32)
            enough = ~(values < min_importance)  # NaN is no importance
            places = postings[enough, 0]
            importance[row, places] = values[enough]
            is_node[row, places] = True
        matches = is_node.all(axis=0) if mode == "all" else is_node.any(axis=0)
        found = np.flatnonzero(matches)
        return index.prompts[found], importance[:, found]

    def check(self) -> None:
        """Compare all files with their digests, as `scan` does for one table.

        Raises:
            BadInput: a file is damaged.
        """
        for shard in self._shards:
            for file, piece in files(shard):
                if why := damage(self._place, file, piece):
                    raise damage_error(self._place, file, why)

    def collect(self, query: pl.LazyFrame) -> pl.DataFrame:
        """Run a query on this store's tables.

        Raises:
            BadInput: a file is damaged in a place that `scan` does not read.
        """
        try:
            return query.collect()
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError):
            for shard in self._shards:
                for table in shard["tables"]:
                    self._read_through(file_name(table, shard["name"]))
            raise

    def _layer(self, layer: str) -> int:
        """Return the number of a layer."""
        if layer not in self.layers:
            hint = nearest(layer, self.layers)
            raise BadInput(f"layer '{layer[:60]}': not in harvest '{self._place.name}'; {hint}")
        return self.layers.index(layer)

    @cached_property
    def _groups_of(self) -> tuple[np.ndarray, np.ndarray]:
        """The sorted ids of all prompts, and for each the place of its group in `_shards`."""
        ids = [np.zeros(0, np.uint64)]
        places = [np.zeros(0, np.int64)]
        for place, shard in enumerate(self._shards):
            some = prompts_of(shard)
            ids.append(some)
            places.append(np.full(len(some), place))
        order = np.argsort(np.concatenate(ids))
        return np.concatenate(ids)[order], np.concatenate(places)[order]

    def _shard_of(self, prompt_id: int) -> Shard | None:
        """Return the group that contains the rows of a prompt."""
        ids, places = self._groups_of
        if not 0 <= prompt_id < 1 << 64:
            return None
        row = int(np.searchsorted(ids, np.uint64(prompt_id)))
        if row == len(ids) or ids[row] != np.uint64(prompt_id):
            return None
        return self._shards[places[row]]

    def _prompt_rows(self, table: str, prompt_id: int) -> pl.DataFrame | None:
        shard = self._shard_of(prompt_id)
        if shard is None or table not in shard["tables"]:
            return None
        rows = self._parts.index(shard).prompt_rows(table, prompt_id)
        return None if rows is None else self._parts.rows(table, shard, rows)

    def _component_rows(self, layer: str, component: int) -> pl.DataFrame | None:
        key = unit_key(self._layer(layer), component)
        frames = []
        for shard in self._shards:
            if INDEX not in shard["tables"]:
                continue
            rows = self._parts.index(shard).unit_rows(key)
            if rows is not None:
                frames.append(self._parts.rows(INDEX, shard, rows))
        return pl.concat(frames) if frames else None

    def _frame(self, table: str, shards: Sequence[Shard]) -> pl.LazyFrame:
        """Return all rows of a table in some groups, after comparing the files with the digests."""
        paths = list[Path]()
        for file, path in self._compare(table, shards).items():
            try:
                actual = pl.scan_parquet(path, glob=False).collect_schema()
            except (pl.exceptions.PolarsError, OSError) as error:
                raise damage_error(self._place, file, one_line(error)) from error
            check_columns(self._place, table, file, actual, self.layers)
            paths.append(path)
        if not paths:
            return pl.LazyFrame(schema=schema(table, self.layers))
        return pl.scan_parquet(paths, glob=False)

    def _compare(self, table: str, shards: Sequence[Shard]) -> dict[str, Path]:
        """Compare the files of a table in some groups with their digests, and return their paths.

        Raises:
            BadInput: a file is damaged.
        """
        paths = dict[str, Path]()
        for shard in shards:
            if table not in shard["tables"]:
                continue
            file = file_name(table, shard["name"])
            paths[file] = self._local(file)
            if why := damage(self._place, file, shard["tables"][table]):
                raise damage_error(self._place, file, why)
        return paths

    def _local(self, file: str) -> Path:
        """Return the path of a file on this machine."""
        try:
            return self._place.local(file)
        except OSError as error:
            raise damage_error(self._place, file, error.strerror or str(error)) from error

    def _read_through(self, file: str) -> None:
        try:
            pl.scan_parquet(self._local(file), glob=False).collect()
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
            raise damage_error(self._place, file, one_line(error)) from error
