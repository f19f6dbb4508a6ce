"""Where files go, and how: they appear whole or not at all, whoever is killed while writing them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def root() -> Path:
    """The folder that holds all that is made here: $SPD_RUNS, or ./runs."""
    return Path(os.environ.get("SPD_RUNS") or "runs")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to: it becomes `path` at the end, or after an error nothing does.

    The name holds the process's number: several processes may write the same file, and the last one wins.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
