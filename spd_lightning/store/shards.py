"""The files of a harvest: atomic writes, checks for damage, and a lock for each writing process."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl

from spd_lightning import json_files
from spd_lightning.digests import digest, digest_of
from spd_lightning.errors import BadInput
from spd_lightning.files import whole
from spd_lightning.store.manifest import Piece, Shard, part
from spd_lightning.store.tables import SORTED

_PROMPT_GROUP = 512
"""The smallest number of rows in a row group of a table that is sorted by prompt."""

_OTHER_GROUP = 8192
"""The number of rows in a row group of the other tables."""


def damage(path: Path, piece: Piece) -> str | None:
    """Return what is wrong with the size or content of a file, or None if it is intact.

    A process reads the content when it first opens the file, and again after the file has changed.
    """
    try:
        size = path.stat().st_size
        if size != piece["bytes"]:
            return f"{size} of {piece['bytes']} bytes"
        if digest(path) != piece["digest"]:
            return "its content does not match its digest in the ledger"
    except OSError as error:
        return error.strerror or str(error)
    return None


def damaged(folder: Path, shard: Shard) -> bool:
    """Return whether any file of a group is damaged."""
    name = part(shard)
    return any(damage(folder / table / name, piece) for table, piece in shard["tables"].items())


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


def replace_json(path: Path, value: Any) -> None:
    """Write a JSON file completely or not at all."""
    with whole(path) as temporary:
        temporary.write_text(json_files.dumped(value), encoding="utf-8")


def write_parquet(frame: pl.DataFrame, table: str, path: Path) -> Piece:
    """Write the rows of a table to a Parquet file.

    The file is compressed with zstd, and its floats are split by byte. A long prompt has a row
    group of its own. The file is built in memory, to compute its digest. Pages also have checksums,
    for other readers.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    floats = [name for name, dtype in frame.schema.items() if dtype.is_float()]
    # An Enum orders its names by position, not by their bytes. Minima and maxima of such a column
    # would make readers skip row groups that they need, so they are not written.
    with_extremes = [name for name, dtype in frame.schema.items() if not isinstance(dtype, pl.Enum)]
    options: dict[str, Any] = {
        "compression": "zstd",
        "compression_level": 3,
        "write_statistics": with_extremes,
        "use_dictionary": [name for name in frame.columns if name not in floats],
        "use_byte_stream_split": floats,
        "write_page_checksum": True,
    }
    arrow = frame.to_arrow()
    buffer = pa.BufferOutputStream()
    with pq.ParquetWriter(buffer, arrow.schema, **options) as out:
        for start, stop in pairwise(_cuts(frame, table)):
            out.write_table(arrow.slice(start, stop - start))
    content = memoryview(buffer.getvalue())
    with open(path, "wb") as file:  # files opened by pyarrow lose the system's error numbers
        file.write(content)
    return {"rows": frame.height, "bytes": len(content), "digest": digest_of(content)}


def _cuts(frame: pl.DataFrame, table: str) -> list[int]:
    """Return the rows at which row groups begin, and the end of the last.

    If a table is sorted by prompt, row groups begin between prompts, so that a prompt can be read
    alone.
    """
    by_prompt = SORTED[table][:1] == ("prompt_id",)
    if not by_prompt:
        return [*range(0, frame.height, _OTHER_GROUP), frame.height]
    ids = frame["prompt_id"]
    is_first = ids.ne_missing(ids.shift())  # the first row of each prompt
    cuts = [0]
    for row in is_first.arg_true():
        size = row - cuts[-1]
        if size >= _PROMPT_GROUP:
            cuts.append(row)
    cuts.append(frame.height)
    return cuts
