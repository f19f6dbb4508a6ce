"""Harvests in object stores, such as s3://bucket/run/harvest/graphs, read through fsspec.

A harvest is read in place. Opening it reads the ledgers. The rows of one prompt are read as a
few blocks, each compared with its digest. A scan of a whole table downloads its files to a
temporary folder, and compares each with its digest.

Credentials come from the environment or from the files of the store's own tools (for S3:
`AWS_ACCESS_KEY_ID`, `AWS_PROFILE`, `~/.aws`), never from the address. No message contains them.
"""

import hashlib
import os
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from spd_lightning import json_files
from spd_lightning.errors import BadInput, nearest, shown, without_passwords
from spd_lightning.store.ledgers import (
    MERGED,
    Merged,
    Snapshot,
    check_ledgers,
    files,
    read_snapshot,
    settings_digest,
)
from spd_lightning.store.manifest import MANIFEST, read_settings
from spd_lightning.store.parts import damage_error, one_line
from spd_lightning.store.places import Folder, Place
from spd_lightning.store.shards import damage

T = TypeVar("T")

_PIECE = 1 << 23
"""Bytes that are hashed at once."""

_WITHOUT_FOLDERS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")
"""Protocols of stores in which a file needs no folder."""

_S3: dict[str, Any] = {
    "config_kwargs": {
        "connect_timeout": 10,
        "read_timeout": 60,
        "retries": {"max_attempts": 3, "mode": "standard"},
    }
}
_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


class Bucket(Place):
    """A folder of an object store.

    Args:
        address: its address: `s3://bucket/folder`, or another one that fsspec opens.

    Raises:
        BadInput: the protocol is unknown, needs a package that is not installed, or the address
            contains a password.
    """

    def __init__(self, address: str):
        self.name = without_passwords(shown(address).rstrip("/"))
        self._files, self._root = _open(address, self.name)
        protocol = address.partition("://")[0]
        self._has_folders = protocol not in _WITHOUT_FOLDERS  # otherwise, a bucket would be made
        self._copies: Path | None = None  # the temporary folder of downloaded files

    def names(self) -> list[str]:
        try:
            entries = self._ask(lambda: self._files.ls(self._root, detail=True))
        except (FileNotFoundError, NotADirectoryError):
            return []
        paths = [entry["name"] for entry in entries if entry["type"] == "file"]
        return sorted(path.rpartition("/")[2] for path in paths)

    def size(self, file: str) -> int:
        return int(self._ask(lambda: self._files.info(self._path(file))["size"]))

    def read(self, file: str) -> bytes:
        return self._ask(lambda: self._files.cat_file(self._path(file)))

    def read_range(self, file: str, start: int, stop: int) -> bytes:
        return self._ask(lambda: self._files.cat_file(self._path(file), start=start, end=stop))

    def digest(self, file: str) -> str:
        copy = self._copy_path(file)
        if copy is not None and copy.exists():
            return Folder(copy.parent).digest(copy.name)

        def hashed() -> str:
            total = hashlib.sha256()
            with self._files.open(self._path(file), "rb") as opened:
                while piece := opened.read(_PIECE):
                    total.update(piece)
            return total.hexdigest()[:16]

        return self._ask(hashed)

    def local(self, file: str) -> Path:
        if self._copies is None:
            temporary = tempfile.TemporaryDirectory(prefix="spd-harvest-")
            weakref.finalize(self, temporary.cleanup)
            self._copies = Path(temporary.name)
        copy = self._copies / file
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            self._ask(lambda: self._files.get_file(self._path(file), str(copy)))
        return copy

    def put(self, file: str, source: Path | bytes) -> None:
        """Write a file of the harvest.

        Raises:
            BadInput: the store rejects it.
        """
        path = self._path(file)

        def sent() -> None:
            if self._has_folders:
                self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
            if isinstance(source, bytes):
                self._files.pipe_file(path, source)
            else:
                self._files.put_file(str(source), path)

        try:
            self._ask(sent)
        except FileNotFoundError as error:
            raise BadInput(
                f"object store '{self.name}': its bucket does not exist; create it first, or "
                "choose another address"
            ) from error

    def _path(self, file: str) -> str:
        return f"{self._root}/{file}"

    def _copy_path(self, file: str) -> Path | None:
        return None if self._copies is None else self._copies / file

    def _ask(self, request: Callable[[], T]) -> T:
        """Send a request.

        Raises:
            FileNotFoundError: the file does not exist.
            BadInput: the store rejects the request for another reason, or does not answer.
        """
        try:
            return request()
        except (FileNotFoundError, NotADirectoryError):
            raise
        except Exception as error:  # each protocol has errors of its own
            raise BadInput(
                f"object store '{self.name}': it rejected the request ({_reason(error)}); check "
                "the address, your credentials and your rights"
            ) from error


def _open(address: str, name: str) -> tuple[Any, str]:
    """Return the file system of an address, and the path in it."""
    import fsspec

    protocol, _, rest = address.partition("://")
    host = rest.partition("/")[0]
    user, at, _ = host.rpartition("@")
    if at and ":" in user:
        raise BadInput(
            f"address '{name}': it contains a password; set the credentials in the environment or "
            "in the files of the store's own tools instead"
        )
    if protocol in _WITHOUT_FOLDERS and not host:
        raise BadInput(
            f"address '{protocol}://': it names no bucket; write {protocol}://bucket/folder"
        )
    options = _S3 if protocol in ("s3", "s3a") else {}
    try:
        system, root = fsspec.url_to_fs(
            address, skip_instance_cache=True, use_listings_cache=False, **options
        )
    except ImportError as error:
        raise BadInput(
            f"address '{name}': '{protocol}' needs a package that is not installed "
            f"({one_line(error)}); for S3: pip install 'spd_lightning[s3]'"
        ) from error
    except ValueError as error:
        hint = nearest(protocol, fsspec.available_protocols())
        raise BadInput(f"address '{name}': unknown protocol '{protocol}'; {hint}") from error
    return system, root.rstrip("/")


def _reason(error: Exception) -> str:
    """Return an error's message on one line, without credentials."""
    text = " ".join(f"{error}".split()) or type(error).__name__
    for variable in _CREDENTIALS:
        value = os.environ.get(variable)
        if value:
            text = text.replace(value, "***")
    return without_passwords(text)[:160]


# ---- copies --------------------------------------------------------------------------------------


class Pushed(NamedTuple):
    """The number of files and bytes that were sent, and of files that the copy had already."""

    files: int
    bytes: int
    known: int


def push(folder: Path, bucket: Bucket) -> Pushed:
    """Copy a harvest to an object store, as it is at this moment.

    Every file is compared with its digest before it is sent. Files come first, then the ledgers,
    and the settings last. So readers of the copy see a whole harvest at any time. Files that the
    copy has already are not sent again.

    Raises:
        BadInput: a file is damaged, the address holds another harvest, or the store rejects it.
    """
    place = Folder(folder)
    settings = read_settings(place)
    snapshot = read_snapshot(place)
    check_ledgers(place, settings, snapshot)
    known = _files_of_copy(settings, bucket)
    sent = 0
    size = 0
    skipped = 0
    for shard in snapshot.shards:
        for file, piece in files(shard):
            if known.get(file) == piece["digest"]:
                skipped += 1
                continue
            if why := damage(place, file, piece):
                raise damage_error(place, file, why)
            bucket.put(file, folder / file)
            if bucket.size(file) != piece["bytes"]:
                raise BadInput(
                    f"object store '{bucket.name}': {file} was changed on its way; push again"
                )
            sent += 1
            size += piece["bytes"]
    for file, value in _ledgers(settings, snapshot).items():
        bucket.put(file, json_files.dumped(value).encode())
    bucket.put(MANIFEST, json_files.dumped(settings).encode())
    return Pushed(sent, size, skipped)


def _files_of_copy(settings: dict[str, Any], bucket: Bucket) -> dict[str, str]:
    """Return the digests of the files that a copy names; it is empty if there is no copy yet.

    Raises:
        BadInput: the address holds another harvest.
    """
    try:
        bucket.size(MANIFEST)
    except FileNotFoundError:
        return {}
    theirs = read_settings(bucket)
    for key in sorted({*settings, *theirs} - {"world"}):
        if settings.get(key) != theirs.get(key):
            raise BadInput(
                f"object store '{bucket.name}': it holds another harvest, made with another "
                f"'{key}'; choose another address"
            )
    shards = read_snapshot(bucket).shards
    return {file: piece["digest"] for shard in shards for file, piece in files(shard)}


def _ledgers(settings: dict[str, Any], snapshot: Snapshot) -> dict[str, Any]:
    """Return the ledgers of a copy, by file, in the order in which they are written.

    All groups are in `merged.json`, which replaces the ledgers of ranks at once.
    """
    merged: Merged = {
        "generation": snapshot.merged["generation"],
        "shards": snapshot.shards,
        "next": {str(rank): ledger["next"] for rank, ledger in snapshot.ledgers.items()},
        "settings": settings_digest(settings),
    }
    ranks = {}
    for rank, ledger in snapshot.ledgers.items():
        ranks[f"manifest-{rank}.json"] = ledger | {"shards": []}
    return {MERGED: merged, **ranks}
