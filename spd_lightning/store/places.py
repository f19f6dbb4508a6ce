"""Where a harvest lies: in a folder of this machine, or in an object store (`store.remote`).

Files are named relative to the harvest: `edges/part-0-3.parquet`.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spd_lightning import json_files
from spd_lightning.digests import digest
from spd_lightning.errors import BadInput

First = Callable[[Mapping[str, Any]], None]


class Place(ABC):
    """The folder of a harvest.

    Every method raises OSError if a file is missing or cannot be read.

    Attributes:
        name: its path or address, as messages show it.
    """

    name: str

    @abstractmethod
    def names(self) -> list[str]:
        """Return the names in the folder itself, not in the folders of tables."""

    @abstractmethod
    def size(self, file: str) -> int:
        """Return the size of a file in bytes."""

    @abstractmethod
    def read(self, file: str) -> bytes:
        """Return the content of a file."""

    @abstractmethod
    def read_range(self, file: str, start: int, stop: int) -> bytes:
        """Return the bytes of a file from `start` to `stop`."""

    @abstractmethod
    def digest(self, file: str) -> str:
        """Return the digest of a file's content."""

    @abstractmethod
    def local(self, file: str) -> Path:
        """Return the path of a file on this machine that polars can read."""


class Folder(Place):
    """A folder of this machine."""

    def __init__(self, path: Path):
        self.path = path
        self.name = str(path)

    def names(self) -> list[str]:
        return sorted(os.listdir(self.path))

    def size(self, file: str) -> int:
        return (self.path / file).stat().st_size

    def read(self, file: str) -> bytes:
        return (self.path / file).read_bytes()

    def read_range(self, file: str, start: int, stop: int) -> bytes:
        with open(self.path / file, "rb", buffering=0) as opened:
            opened.seek(start)
            content = opened.read(stop - start)
        return content or b""

    def digest(self, file: str) -> str:
        return digest(self.path / file)

    def local(self, file: str) -> Path:
        return self.path / file


def is_address(name: str | Path) -> bool:
    """Return whether a name is an address of an object store, such as s3://bucket/folder."""
    return "://" in str(name)


def place_of(where: str | Path | Place) -> Place:
    """Return the place that a path or an address names.

    Raises:
        BadInput: the address cannot be opened.
    """
    if isinstance(where, Place):
        return where
    if is_address(where):
        from spd_lightning.store.remote import Bucket

        return Bucket(str(where))
    return Folder(Path(where))


def read_json(place: Place, file: str, kind: Any, remedy: str, first: First | None = None) -> Any:
    """Return the value of a JSON file of a harvest, as `json_files.read` does.

    Raises:
        BadInput: the file cannot be read, is damaged, or has a value of another type.
    """
    path = f"harvest manifest '{place.name}/{file}'"
    try:
        size = place.size(file)
        if size > json_files.MOST_BYTES:
            most = json_files.MOST_BYTES
            raise ValueError(f"it has {size:,} bytes, and at most {most:,} are expected")
        return json_files.parsed(place.read(file), kind, first)
    except BadInput:
        raise
    except OSError as error:
        why = error.strerror or error
        raise BadInput(f"{path}: cannot be read ({why}); check the path") from error
    except ValueError as error:
        raise BadInput(f"{path}: {error}; {remedy}") from error
