"""Files of a harvest: written whole or not at all, told from damaged ones, locked while somebody
writes.
"""

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

# rows of a row group: at least, cut between prompts; exactly, elsewhere
_PROMPT_GROUP = 512
_OTHER_GROUP = 8192


def damage(path: Path, piece: Piece) -> str | None:
    """Return the damage of a group's file (its length, or a bit of its content), or None if it is
    intact.

    The content is read when the file is first opened in a process, and again after it has changed.
    """
    try:
        if (there := path.stat().st_size) != piece["bytes"]:
            return f"{there} of {piece['bytes']} bytes"
        return (
            None
            if digest(path) == piece["digest"]
            else "its content does not match its digest in the ledger"
        )
    except OSError as error:
        return error.strerror or str(error)


def damaged(folder: Path, shard: Shard) -> bool:
    """Whether any file of a group is."""
    return any(
        damage(folder / table / part(shard), piece) for table, piece in shard["tables"].items()
    )


@contextmanager
def disk(folder: Path) -> Iterator[None]:
    """Turn errors of the file system (no room, no permission, a read-only disk) into one line."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise BadInput(
            f"harvest '{folder}': cannot be written ({why}); what was committed stays readable: "
            "make room or choose "
            "another folder, then run the same predict again"
        ) from error


def lock(folder: Path, rank: int) -> int:
    """An open handle that keeps other processes from writing this rank's share.

    Raises:
        BadInput: another process writes it.
    """
    handle = os.open(folder / f".lock-{rank}", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise BadInput(
            f"harvest '{folder}': another process is writing it; wait for it or name another one"
        ) from error
    return handle


def replace_json(path: Path, value: Any) -> None:
    """A JSON file, whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(json_files.dumped(value), encoding="utf-8")


def write_parquet(frame: pl.DataFrame, table: str, path: Path) -> Piece:
    """A table's rows as one file: zstd, floats split by byte, a long prompt in a row group of its
    own.

    The file is made in memory, where its digest is taken. Pages have checksums too, for other
    readers.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    floats = [name for name, dtype in frame.schema.items() if dtype.is_float()]
    # The order of an Enum's names is not the order of their bytes, so no reader may skip by their
    # extremes.
    extremes = [name for name, dtype in frame.schema.items() if not isinstance(dtype, pl.Enum)]
    options: dict[str, Any] = {
        "compression": "zstd",
        "compression_level": 3,
        "write_statistics": extremes,
    }
    options |= {
        "use_dictionary": [n for n in frame.columns if n not in floats],
        "use_byte_stream_split": floats,
    }
    options |= {"write_page_checksum": True}
    arrow = frame.to_arrow()
    buffer = pa.BufferOutputStream()
    with pq.ParquetWriter(buffer, arrow.schema, **options) as out:
        for start, stop in pairwise(_cuts(frame, table)):
            out.write_table(arrow.slice(start, stop - start))
    content = memoryview(buffer.getvalue())
    with open(path, "wb") as file:  # pyarrow's own files lose the system's error numbers
        file.write(content)
    return {"rows": frame.height, "bytes": len(content), "digest": digest_of(content)}


def _cuts(frame: pl.DataFrame, table: str) -> list[int]:
    """Where row groups begin and end: between prompts where a table is sorted by prompt, so that
    one is read alone.
    """
    if SORTED[table][:1] != ("prompt_id",):
        return [*range(0, frame.height, _OTHER_GROUP), frame.height]
    ids = frame["prompt_id"]
    cuts = [0]
    for start in ids.ne_missing(ids.shift()).arg_true():
        if start - cuts[-1] >= _PROMPT_GROUP:
            cuts.append(start)
    return [*cuts, frame.height]
