"""Files of a run folder: written whole or not at all, locked while somebody works, read even where
torn.
"""

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
    """Turn errors of the file system (no room, no permission, a read-only disk) into one line.

    Raises:
        BadInput: it refused.
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
    """A name beside `path` to write to: it becomes `path` at the end, or after an error nothing
    does.

    Raises:
        BadInput: the disk refuses.
    """
    with writable(path), whole(path) as temporary:
        yield temporary


def write_json(path: Path, value: Any, seal: bool = True) -> None:
    """A JSON file, whole or not at all; with a seal, unless it is for other tools.

    Raises:
        BadInput: the disk refuses.
    """
    text = json_files.dumped(value, indent=1) if seal else json.dumps(value, indent=1) + "\n"
    with write_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path, kind: Any = dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object of the type `kind`; an empty one if the file is missing, or damaged
    (with a warning).

    This is for files that a caller can do without, as a listing can. Use `json_files.read` for all
    others.
    """
    if not path.exists():
        return {}
    try:
        return json_files.read(path, kind, "delete it, or restore it from a copy")
    except BadInput as error:
        log.warning("%s", error)
        return {}


def append_metrics(folder: Path, step: int, values: Mapping[str, float | int]) -> None:
    """Add one logged step to a run's metrics.jsonl; half a line that a killed process left is cut
    off first.

    Raises:
        BadInput: the disk refuses.
    """
    line = json.dumps({"step": step, **values}) + "\n"
    path = folder / "metrics.jsonl"
    with writable(path), open(path, "a+b") as file:
        _cut_torn_line(file)
        file.write(line.encode())


def _cut_torn_line(file: IO[bytes]) -> None:
    end = start = file.seek(0, os.SEEK_END)
    tail = b""
    while start and b"\n" not in tail:
        start = max(0, start - 4096)
        file.seek(start)
        tail = file.read(end - start)
    file.truncate(start + tail.rfind(b"\n") + 1)


def metrics_size(folder: Path) -> int:
    """How many bytes a run has logged."""
    path = folder / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0


def cut_metrics(folder: Path, size: int) -> None:
    """Takes back what a run logged after its first `size` bytes.

    Raises:
        BadInput: the disk refuses.
    """
    if metrics_size(folder) > size:
        with writable(folder / "metrics.jsonl"):
            os.truncate(folder / "metrics.jsonl", size)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the logged metrics, one entry per step, in order; those logged again after a resume
    replace earlier ones.
    """
    path = folder / "metrics.jsonl"
    steps: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(
        path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else ()
    ):
        try:
            values = dict(json.loads(line)) if line else {}
            steps.setdefault(int(values.get("step", 0)), {}).update(values)
        except (ValueError, TypeError, OverflowError, RecursionError):
            log.warning("'%s', line %d: torn, left out", path, number + 1)
    return [steps[step] for step in sorted(steps) if steps[step]]


def lock(folder: Path) -> int | None:
    """An open handle that holds the folder's lock, or None where another process holds it.

    Raises:
        BadInput: the disk refuses.
    """
    with writable(folder):
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    for _ in range(10):  # `held` takes it for a moment
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            time.sleep(0.02)
    os.close(handle)
    return None


def held(folder: Path, name: str = ".lock") -> bool:
    """Whether some process holds the folder's lock."""
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
