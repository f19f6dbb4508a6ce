"""The files of a run folder: atomic writes, a lock for its process, and logs cut off by a crash."""

import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from spd_lightning import json_files
from spd_lightning.errors import BadInput
from spd_lightning.files import whole

log = logging.getLogger(__name__)


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turn errors of the file system, such as a full or read-only disk, into one line.

    Raises:
        BadInput: `path` cannot be written.
    """
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise BadInput(
            f"'{path}': cannot be written ({why}); make room, or set SPD_RUNS to another folder"
        ) from error


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it replaces `path` at the end unless an error occurs.

    Raises:
        BadInput: the file cannot be written.
    """
    with writable(path), whole(path) as temporary:
        yield temporary


def write_json(path: Path, value: Any, seal: bool = True) -> None:
    """Write a JSON file completely or not at all.

    Args:
        path: the file.
        value: its content.
        seal: whether to add a digest of the content; other tools may not expect one.

    Raises:
        BadInput: the file cannot be written.
    """
    if seal:
        text = json_files.dumped(value, indent=1)
    else:
        text = json.dumps(value, indent=1) + "\n"
    with write_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path, kind: Any = dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object of the type `kind`, or an empty one if the file cannot be read.

    A damaged file causes a warning; a missing one does not. Use this only for files that are not
    required, for example in a listing, and `json_files.read` for all others.
    """
    if not path.exists():
        return {}
    try:
        return json_files.read(path, kind, "delete it, or restore it from a copy")
    except BadInput as error:
        log.warning("%s", error)
        return {}


def append_metrics(folder: Path, step: int, values: Mapping[str, float | int]) -> None:
    """Append one step to a run's metrics.jsonl.

    If a killed process left an incomplete line at the end, it is removed first.

    Raises:
        BadInput: the file cannot be written.
    """
    line = json.dumps({"step": step, **values}) + "\n"
    path = folder / "metrics.jsonl"
    with writable(path), open(path, "a+b") as file:
        _cut_torn_line(file)
        file.write(line.encode())


def _cut_torn_line(file: IO[bytes]) -> None:
    """Remove what follows the last line break of a file, which is read from its end."""
    end = file.seek(0, os.SEEK_END)
    start = end
    tail = b""
    while start and b"\n" not in tail:
        start = max(0, start - 4096)
        file.seek(start)
        tail = file.read(end - start)
    last_break = tail.rfind(b"\n")  # −1 if there is none
    file.truncate(start + last_break + 1)


def metrics_size(folder: Path) -> int:
    """Return the number of bytes that a run has logged."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return 0
    return path.stat().st_size


def cut_metrics(folder: Path, size: int) -> None:
    """Delete what a run logged after its first `size` bytes.

    Raises:
        BadInput: the file cannot be written.
    """
    path = folder / "metrics.jsonl"
    if metrics_size(folder) > size:
        with writable(path):
            os.truncate(path, size)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the logged metrics: one entry per step, in order.

    Values that were logged again after a resume replace earlier ones.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    steps: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line:
            continue
        try:
            values = dict(json.loads(line))
            step = int(values.get("step", 0))
            steps.setdefault(step, {}).update(values)
        except (ValueError, TypeError, OverflowError, RecursionError):
            log.warning("'%s', line %d: incomplete, skipped", path, number)
    return [steps[step] for step in sorted(steps) if steps[step]]


def lock(folder: Path) -> int | None:
    """Return an open handle that holds the folder's lock, or None if another process holds it.

    Raises:
        BadInput: the lock file cannot be written.
    """
    with writable(folder):
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    for _ in range(10):  # several tries, since `held` takes the lock for a moment
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            time.sleep(0.02)
    os.close(handle)
    return None


def held(folder: Path, name: str = ".lock") -> bool:
    """Return whether some process holds the folder's lock."""
    try:
        handle = os.open(folder / name, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
