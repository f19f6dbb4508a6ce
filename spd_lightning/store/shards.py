"""The files of a harvest: atomic writes, checks for damage, and a lock for each writing process."""

import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from spd_lightning.errors import BadInput
from spd_lightning.files import make_folder, whole
from spd_lightning.store.blocks import DigestedFile
from spd_lightning.store.index import BY_PROMPT, IndexBuilder
from spd_lightning.store.ledgers import INDEXES, POSTINGS, Piece, Shard, file_name, files
from spd_lightning.store.places import Place

PROMPT_GROUP = 512
"""The smallest number of rows in a row group of a table that is sorted by prompt."""

OTHER_GROUP = 8192
"""The number of rows in a row group of the other tables."""

FEW_POSTINGS = 1 << 13
"""The largest number of postings that are in the file of the index, and not in one of their own."""

Write = Callable[[Path], "Written"]


def damage(place: Place, file: str, piece: Piece) -> str | None:
    """Return what is wrong with the size or content of a file, or None if it is intact.

    A process reads the content when it first opens the file, and again after the file has changed.
    """
    try:
        size = place.size(file)
        if size != piece["bytes"]:
            return f"{size} of {piece['bytes']} bytes"
        if place.digest(file) != piece["digest"]:
            return "its content does not match its digest in the ledger"
    except OSError as error:
        return error.strerror or str(error)
    return None


def damaged(place: Place, shard: Shard) -> bool:
    """Return whether any file of a group is damaged."""
    return any(damage(place, file, piece) for file, piece in files(shard))


@contextmanager
def disk(folder: Path) -> Iterator[None]:
    """Turn errors of the file system, such as a full or read-only disk, into one line."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise BadInput(
            f"harvest '{folder}': cannot be written ({why}); what was committed stays readable: "
            "make room or choose another folder, then run the same predict command again"
        ) from error


def lock(folder: Path, rank: int) -> int:
    """Return an open handle that keeps other processes from writing this rank's share.

    Raises:
        BadInput: another process is writing it.
    """
    handle = os.open(folder / f".lock-{rank}", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise BadInput(
            f"harvest '{folder}': another process is writing it; wait for it or choose another name"
        ) from error
    return handle


class TableFile:
    """A Parquet file of a table, written in one or several pieces.

    The file is compressed with zstd. Its floats are split by byte, and of numbers that ascend, the
    differences are stored. Pages also have checksums,
    for other readers. Use it as a context; after that, `written` describes the file.

    Args:
        path: the file to write.
        table: its table.
        first: a frame with the columns of the table.
        group: the smallest number of rows of a row group, except for the last.
    """

    def __init__(self, path: Path, table: str, first: pl.DataFrame, group: int):
        self._path = path
        self._table = table
        self._group = group
        self._schema = first.clear().to_arrow().schema
        self._options = _parquet_options(first.schema)
        self._groups = [0]

    def __enter__(self) -> "TableFile":
        import pyarrow.parquet as pq

        # Files opened by pyarrow lose the system's error numbers.
        self._file = open(self._path, "wb")
        self._digested = DigestedFile(self._file)
        self._out = pq.ParquetWriter(self._digested, self._schema, **self._options)
        return self

    def write(self, frame: pl.DataFrame) -> None:
        """Append rows; a prompt's rows in a table sorted by prompt have to be in one frame."""
        arrow = frame.to_arrow().cast(self._schema)
        start = self._groups[-1]
        for first, end in pairwise(_cuts(frame, self._table, self._group)):
            self._out.write_table(arrow.slice(first, end - first))
            self._groups.append(start + end)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._digested.abandoned = kind is not None  # after an error, no footer is written
        try:
            self._out.close()
        finally:
            self._file.close()

    @property
    def written(self) -> "Written":
        """Return the size and the digests of the file."""
        digested = self._digested
        piece: Piece = {
            "rows": self._groups[-1],
            "bytes": digested.size,
            "digest": digested.digest(),
        }
        return Written(piece, self._groups, digested.blocks())


class Written(NamedTuple):
    """A file that was written: its entry in the ledger, its row groups, its blocks' digests."""

    piece: Piece
    groups: list[int]
    blocks: np.ndarray


def put_file(harvest: Path, name: str, folder: str, write: Write) -> Written:
    """Write a file of a group completely or not at all.

    Args:
        harvest: the harvest's folder.
        name: the name of the group.
        folder: the table, or the kind of the index.
        write: writes the file, given a temporary path.
    """
    path = harvest / file_name(folder, name)
    make_folder(path.parent)
    with whole(path) as temporary:
        return write(temporary)


def write_parquet(frame: pl.DataFrame, table: str, path: Path) -> Written:
    """Write the rows of a table of one batch to a Parquet file."""
    group = PROMPT_GROUP if table in BY_PROMPT else OTHER_GROUP
    with TableFile(path, table, frame, group) as file:
        file.write(frame)
    return file.written


def write_arrays(arrays: dict[str, np.ndarray], rows: int, path: Path) -> Written:
    """Write the arrays of an index to a safetensors file."""
    from safetensors.numpy import save

    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with open(path, "wb") as file:
        digested = DigestedFile(file)
        digested.write(save(contiguous))
    piece: Piece = {"rows": rows, "bytes": digested.size, "digest": digested.digest()}
    return Written(piece, [], digested.blocks())


def write_index(builder: IndexBuilder, put: Callable[[str, Write], Written]) -> dict[str, Piece]:
    """Write the index of a group once its tables are written, and return its entries.

    Args:
        builder: the index.
        put: calls a function with the temporary path of a file of the index.
    """
    pieces = {}
    count = len(builder.postings)
    if count > FEW_POSTINGS:
        postings = {"postings": builder.postings}
        written = put(POSTINGS, lambda path: write_arrays(postings, count, path))
        builder.file(POSTINGS, [], written.blocks)
        pieces[POSTINGS] = written.piece
    arrays = builder.arrays()
    if count <= FEW_POSTINGS:
        arrays["postings"] = builder.postings
    prompts = len(builder.prompts)
    pieces[INDEXES] = put(INDEXES, lambda path: write_arrays(arrays, prompts, path)).piece
    return pieces


def _parquet_options(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a Parquet file with these columns."""
    # An Enum orders its names by position, not by their bytes. Minima and maxima of such a column
    # would make readers skip row groups that they need, so they are not written.
    with_extremes = [name for name, dtype in schema.items() if not isinstance(dtype, pl.Enum)]
    encodings = dict[str, str]()
    for name, dtype in schema.items():
        if dtype.is_float():
            encodings[name] = "BYTE_STREAM_SPLIT"
        elif dtype.is_integer() and name in ("node", "source", "target"):  # they ascend, or nearly
            encodings[name] = "DELTA_BINARY_PACKED"
    return {
        "compression": "zstd",
        "compression_level": 3,
        "write_statistics": with_extremes,
        "use_dictionary": [name for name in schema if name not in encodings],
        "column_encoding": encodings,
        "write_page_checksum": True,
    }


def _cuts(frame: pl.DataFrame, table: str, group: int) -> list[int]:
    """Return the rows at which row groups begin, and the end of the last.

    If a table is sorted by prompt, row groups begin between prompts, so that a prompt can be read
    alone.
    """
    if table not in BY_PROMPT:
        return [*range(0, frame.height, group), frame.height]
    ids = frame["prompt_id"]
    is_first = ids.ne_missing(ids.shift())  # the first row of each prompt
    cuts = [0]
    for row in is_first.arg_true():
        size = row - cuts[-1]
        if size >= group:
            cuts.append(row)
    cuts.append(frame.height)
    return cuts
