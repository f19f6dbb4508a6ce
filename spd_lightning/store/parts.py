"""Read the rows of one prompt or one component: a few blocks of one file, found by its index."""

import io
from collections import OrderedDict
from collections.abc import Callable, Mapping
from threading import RLock
from typing import Any

import numpy as np
import polars as pl

from spd_lightning.errors import BadInput
from spd_lightning.store.blocks import CheckedFile
from spd_lightning.store.index import Index, Rows, missing_array
from spd_lightning.store.ledgers import INDEXES, POSTINGS, Piece, Shard, file_name
from spd_lightning.store.places import Place
from spd_lightning.store.tables import SORTED, schema

_MOST_FILES = 64
"""Open Parquet files whose footers are in memory."""

_MOST_INDEX_BYTES = 1 << 28
"""Bytes of indices in memory."""


class Parts:
    """Reads parts of the files of a harvest, and compares them with their digests.

    Args:
        place: where the harvest lies.
        layers: the names of its layers.
    """

    def __init__(self, place: Place, layers: list[str]):
        self._place = place
        self._layers = layers
        self._indices = OrderedDict[str, Index]()
        self._files = OrderedDict[str, Any]()  # pyarrow's ParquetFile, by name
        self._lock = RLock()  # the viewer's threads share a store

    def index(self, shard: Shard) -> Index:
        """Return the index of a group.

        Raises:
            BadInput: its file is damaged.
        """
        name = shard["name"]
        with self._lock:
            if name not in self._indices:
                self._indices[name] = self._read_index(shard)
                total = sum(index.bytes for index in self._indices.values())
                while total > _MOST_INDEX_BYTES and len(self._indices) > 1:
                    _, oldest = self._indices.popitem(last=False)
                    total -= oldest.bytes
            return self._indices[name]

    def rows(self, table: str, shard: Shard, rows: Rows) -> pl.DataFrame:
        """Return some rows of a table.

        Raises:
            BadInput: the file is damaged where the rows are.
        """
        file = file_name(table, shard["name"])
        groups = range(rows.first_group, rows.last_group + 1)
        with self._lock:
            parquet = self._parquet(table, shard)
            frame = self._read(file, lambda: pl.from_arrow(parquet.read_row_groups(groups)))
        return frame[rows.start : rows.stop]

    def span(self, table: str, shard: Shard, start: int, stop: int) -> pl.DataFrame:
        """Return the rows of a table from one to another.

        Raises:
            BadInput: the file is damaged where the rows are.
        """
        rows = self.index(shard).span(table, start, stop)
        if rows is None:
            return pl.DataFrame(schema=schema(table, self._layers))
        return self.rows(table, shard, rows)

    def rows_before_layers(self, table: str, shard: Shard) -> np.ndarray:
        """Return the number of rows before each layer, and of all rows, in a table sorted by layer.

        Raises:
            BadInput: the file is damaged.
        """
        file = file_name(table, shard["name"])
        layer = SORTED[table][0]
        with self._lock:
            parquet = self._parquet(table, shard)
            columns = self._read(file, lambda: pl.from_arrow(parquet.read(columns=[layer])))
        numbers = columns[layer].to_physical().to_numpy()
        return np.searchsorted(numbers, np.arange(len(self._layers) + 1))

    def postings(self, shard: Shard, start: int, stop: int) -> np.ndarray:
        """Return some postings of a group: [posting, 2] (see `store.index`).

        Raises:
            BadInput: the file is damaged where they are.
        """
        few = self.index(shard).few_postings
        if few is not None:
            return few[start:stop]
        piece = shard["indices"][POSTINGS]
        file = file_name(POSTINGS, shard["name"])
        opened = self._checked(file, piece, self.index(shard).blocks(POSTINGS))
        begin = piece["bytes"] - 8 * piece["rows"]  # safetensors puts the array at the end
        opened.seek(begin + 8 * start)
        content = opened.read(8 * (stop - start))
        return np.frombuffer(content, np.uint32).reshape(-1, 2)

    def _read_index(self, shard: Shard) -> Index:
        from safetensors import SafetensorError
        from safetensors.numpy import load

        file = file_name(INDEXES, shard["name"])
        piece = shard["indices"][INDEXES]
        try:
            content = self._place.read(file)
        except OSError as error:
            raise damage_error(self._place, file, error.strerror or str(error)) from error
        if why := differs(content, piece):
            raise damage_error(self._place, file, why)
        try:
            arrays = load(content)
        except SafetensorError as error:
            raise damage_error(self._place, file, str(error)) from error
        has_postings = POSTINGS in shard["indices"]
        if missing := missing_array(arrays, list(shard["tables"]), has_postings):
            raise damage_error(self._place, file, f"'{missing}' is missing")
        return Index(arrays)

    def _parquet(self, table: str, shard: Shard) -> Any:
        """Return an open Parquet file, whose footer has been read and compared."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = file_name(table, shard["name"])
        if file not in self._files:
            blocks = self.index(shard).blocks(table)
            opened = self._checked(file, shard["tables"][table], blocks)
            parquet = self._read(file, lambda: pq.ParquetFile(pa.PythonFile(opened, mode="r")))
            empty = pl.from_arrow(parquet.schema_arrow.empty_table())
            assert isinstance(empty, pl.DataFrame)
            check_columns(self._place, table, file, empty.schema, self._layers)
            self._files[file] = parquet
            if len(self._files) > _MOST_FILES:
                self._files.popitem(last=False)
        return self._files[file]

    def _checked(self, file: str, piece: Piece, blocks: np.ndarray) -> CheckedFile:
        try:
            size = self._place.size(file)
        except OSError as error:
            raise damage_error(self._place, file, error.strerror or str(error)) from error
        if size != piece["bytes"]:
            raise damage_error(self._place, file, f"{size} of {piece['bytes']} bytes")
        return CheckedFile(
            lambda start, stop: self._place.read_range(file, start, stop),
            size,
            blocks,
            lambda why: damage_error(self._place, file, why),
        )

    def _read(self, file: str, read: Callable[[], Any]) -> Any:
        """Call a function that reads a Parquet file; its errors mean that the file is damaged."""
        import pyarrow as pa

        try:
            return read()
        except BadInput:
            raise
        except (pa.ArrowException, OSError, io.UnsupportedOperation) as error:
            raise damage_error(self._place, file, one_line(error)) from error


def differs(content: bytes, piece: Piece) -> str | None:
    """Return how the content of a file differs from its entry in the ledger, or None."""
    from spd_lightning.digests import digest_of

    if len(content) != piece["bytes"]:
        return f"{len(content)} of {piece['bytes']} bytes"
    if digest_of(content) != piece["digest"]:
        return "its content does not match its digest in the ledger"
    return None


def check_columns(
    place: Place, table: str, file: str, actual: Mapping[str, Any], layers: list[str]
) -> None:
    """Check the columns of a file, since even an intact file may hold another table.

    Raises:
        BadInput: a column is missing, unknown, or of another type.
    """
    columns = schema(table, layers)
    for name in {**columns, **actual}:
        if actual.get(name) != columns.get(name):
            why = f"its column '{name}' is not a column of the table '{table}'"
            raise damage_error(place, file, why)


def damage_error(place: Place, file: str, why: str) -> BadInput:
    """Return the error that names a damaged file."""
    return BadInput(
        f"harvest '{place.name}': the file {file} is damaged ({why}); "
        "the other files are readable with Store(path, skip_damaged=True); "
        "to repair the harvest, delete the file and run the same predict command again"
    )


def one_line(error: Exception) -> str:
    """Return the start of an error's message on one line."""
    return " ".join(str(error).split())[:120]
