"""The ledgers of a harvest: which groups of shards are committed, and what they hold.

    manifest-<rank>.json     groups of one rank, sealed; written when its process starts and ends
    manifest-<rank>.jsonl    groups that the process committed since: one sealed line each
    merged.json              merged groups, which replace groups of the ranks (`store.compaction`)

A commit appends one line, so its cost does not grow with the harvest. An incomplete line, left by
a killed process, does not count. The file `merged.json` names for each rank the first group that
it does not replace. So writing that one file replaces all earlier groups at once.

Every file is read before those that replace it: the lines, then the ledger that they go into, then
`merged.json`. So a reader sees each group exactly once, even while it is moved.
"""

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np

from spd_lightning import json_files
from spd_lightning.digests import digest_of
from spd_lightning.errors import BadInput
from spd_lightning.files import whole
from spd_lightning.store.places import Folder, Place, read_json
from spd_lightning.store.tables import TABLES

REMEDY = "delete it and run the same predict command again"
MERGED = "merged.json"
INDEXES = "index"
POSTINGS = "postings"
"""The folders of the indices of groups, next to those of the tables."""

_NAME = re.compile(r"(part|merged)-[0-9]{1,9}-[0-9]{1,9}", re.ASCII)
_LEDGER = re.compile(r"manifest-([0-9]{1,9})\.jsonl?", re.ASCII)
_PROMPTS = re.compile(r"([0-9a-f]{16})*", re.ASCII)


class Piece(TypedDict):
    """One file of a group: its rows, its size, and the digest of its bytes."""

    rows: int
    bytes: int
    digest: str


class Shard(TypedDict):
    """One committed group of files: one file per table, and those of its index.

    Example: {"name": "part-0-3", "prompts": "0a4f…", "tables": {"nodes": {"rows": 120, …}, …}, …}.

    `prompts` are the sorted ids of its prompts, each as 16 hex digits.
    """

    name: str
    prompts: str
    tables: dict[str, Piece]
    indices: dict[str, Piece]
    gap: NotRequired[float]


class _UncheckedShard(TypedDict):
    """A group as it is parsed: its thousands of files are checked by `_check_pieces`, faster."""

    name: str
    prompts: str
    tables: Any
    indices: Any
    gap: NotRequired[float]


class Ledger(TypedDict):
    """The groups that one rank committed, and whether its share of the prompts is complete.

    `next` is the number of its next group; numbers are never used twice. `generation` is the number
    of compactions that took groups from it: `merged.json` is at least as new. `settings` is the
    digest of the harvest's settings.
    """

    shards: list[Shard]
    next: int
    complete: bool
    generation: NotRequired[int]
    settings: NotRequired[str]


class Merged(TypedDict):
    """Merged groups, and for each rank the number of its first group that is not among them.

    `generation` is the number of times that the harvest was compacted.
    """

    generation: int
    shards: list[Shard]
    next: dict[str, int]
    settings: NotRequired[str]


class _UncheckedLedger(TypedDict):
    shards: list[_UncheckedShard]
    next: int
    complete: bool
    generation: NotRequired[int]
    settings: NotRequired[str]


class _UncheckedMerged(TypedDict):
    generation: int
    shards: list[_UncheckedShard]
    next: dict[str, int]
    settings: NotRequired[str]


class Snapshot(NamedTuple):
    """The ledgers of a harvest at one moment, each without the groups that another replaced."""

    ledgers: dict[int, Ledger]
    merged: Merged

    @property
    def shards(self) -> list[Shard]:
        """The groups of all ledgers, merged ones first."""
        shards = list(self.merged["shards"])
        for ledger in self.ledgers.values():
            shards += ledger["shards"]
        return shards


def empty_ledger() -> Ledger:
    """Return the ledger of a rank that has committed nothing."""
    return {"shards": [], "next": 0, "complete": False}


def part_name(rank: int, n: int) -> str:
    """Return the name of a rank's group; its files are called `<table>/<name>.parquet`."""
    return f"part-{rank}-{n}"


def merged_name(generation: int, n: int) -> str:
    """Return the name of a merged group."""
    return f"merged-{generation}-{n}"


def number(shard: Shard) -> int:
    """Return the number of a group in its ledger."""
    return int(shard["name"].rpartition("-")[2])


def files(shard: Shard) -> Iterator[tuple[str, Piece]]:
    """Yield the files of a group, relative to the harvest, with their sizes and digests."""
    for folder, piece in (shard["tables"] | shard["indices"]).items():
        yield file_name(folder, shard["name"]), piece


def file_name(folder: str, group: str) -> str:
    """Return the name of a group's file with the rows of a table, or with a kind of index."""
    ending = "safetensors" if folder in (INDEXES, POSTINGS) else "parquet"
    return f"{folder}/{group}.{ending}"


def ledger_path(folder: Path, rank: int) -> Path:
    """Return the path of a rank's ledger."""
    return folder / f"manifest-{rank}.json"


def prompts_text(ids: np.ndarray) -> str:
    """Return sorted ids of prompts as a ledger holds them."""
    return ids.astype(">u8").tobytes().hex()


def prompts_of(shard: Shard) -> np.ndarray:
    """Return the sorted ids of a group's prompts."""
    content = bytes.fromhex(shard["prompts"])
    return np.frombuffer(content, dtype=">u8").astype(np.uint64)


# ---- reading -------------------------------------------------------------------------------------


def read_snapshot(place: Place) -> Snapshot:
    """Read the ledgers of all ranks, and the merged groups.

    Raises:
        BadInput: a ledger cannot be read.
    """
    try:
        names = place.names()
    except OSError as error:
        why = error.strerror or error
        raise BadInput(f"harvest '{place.name}': cannot be read ({why}); check the path") from error
    ranks = set[int]()
    for name in names:
        if match := _LEDGER.fullmatch(name):
            ranks.add(int(match[1]))
    lines = {rank: _read_lines(place, rank) for rank in sorted(ranks)}
    ledgers = {rank: _read_ledger(place, rank) for rank in lines}
    merged = _read_merged(place)
    for rank, ledger in ledgers.items():
        new = [shard for shard in lines[rank] if number(shard) >= ledger["next"]]
        if new:
            ledger["next"] = number(new[-1]) + 1
        first = merged["next"].get(str(rank), 0)
        own = [*ledger["shards"], *new]
        ledger["shards"] = [shard for shard in own if number(shard) >= first]
        ledger["next"] = max(ledger["next"], first)
    return Snapshot(ledgers, merged)


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Return a digest of the settings of a harvest, without the number of its processes."""
    same = {key: value for key, value in settings.items() if key != "world"}
    return digest_of(json.dumps(same, sort_keys=True).encode())


def check_ledgers(place: Place, settings: Mapping[str, Any], snapshot: Snapshot) -> None:
    """Check that no ledger is missing or belongs to another harvest.

    Otherwise, the harvest would seem to have fewer groups or other settings.

    Raises:
        BadInput: a ledger is missing, or belongs to another harvest.
    """
    remedy = "restore {} from a copy, or run the same predict command again"
    world: int = settings["world"]
    own = settings_digest(settings)
    ledgers: dict[str, Ledger | Merged] = {MERGED: snapshot.merged}
    for rank in range(world):
        if rank in snapshot.ledgers:
            ledgers[f"manifest-{rank}.json"] = snapshot.ledgers[rank]
    for file, ledger in ledgers.items():
        if ledger.get("settings", own) != own:
            raise BadInput(
                f"harvest '{place.name}': manifest.json and {file} are of different harvests; "
                + remedy.format("both")
            )
    if lost := lost_ledger(place, world, snapshot):
        raise BadInput(
            f"harvest '{place.name}': {lost} is missing, so some of its groups are unknown; "
            + remedy.format("it")
        )


def lost_ledger(place: Place, world: int, snapshot: Snapshot) -> str | None:
    """Return the name of a file that lists groups and is missing, or None.

    A writer creates its ledger before any other file, and a compaction notes in each ledger that
    it wrote `merged.json`. In an object store, only the latter is checked.
    """
    for rank, ledger in snapshot.ledgers.items():
        if rank < world and ledger.get("generation", 0) > snapshot.merged["generation"]:
            return MERGED
    if not isinstance(place, Folder):
        return None
    ledgers = {str(rank): f"manifest-{rank}.json" for rank in range(world)}
    missing = {rank: file for rank, file in ledgers.items() if not _exists(place, file)}
    if not missing:
        return None
    known = {shard["name"] for shard in snapshot.shards}
    for path in place.path.glob(f"{INDEXES}/part-*"):
        rank = path.stem.split("-")[1]
        if path.stem not in known and rank in missing:
            return missing[rank]
    return None


def generation_of(place: Place) -> int:
    """Return the number of times that a harvest was compacted."""
    return _read_merged(place)["generation"]


def _exists(place: Place, file: str) -> bool:
    try:
        place.size(file)
    except FileNotFoundError:
        return False
    except OSError:
        return True  # reading it raises an error with the reason
    return True


def _read_merged(place: Place) -> Merged:
    if not _exists(place, MERGED):
        return {"generation": 0, "shards": [], "next": {}}
    merged: Merged = read_json(place, MERGED, _UncheckedMerged, REMEDY)
    _check_shards(place, MERGED, merged["shards"], "")
    return merged


def _read_ledger(place: Place, rank: int) -> Ledger:
    file = f"manifest-{rank}.json"
    if not _exists(place, file):
        return empty_ledger()
    ledger: Ledger = read_json(place, file, _UncheckedLedger, REMEDY)
    _check_shards(place, file, ledger["shards"], f"part-{rank}", ledger["next"])
    return ledger


def _read_lines(place: Place, rank: int) -> list[Shard]:
    """Return the groups that a rank committed since its ledger was written."""
    file = f"manifest-{rank}.jsonl"
    try:
        content = place.read(file)
    except FileNotFoundError:
        return []
    except OSError as error:
        why = error.strerror or error
        raise BadInput(
            f"harvest manifest '{place.name}/{file}': cannot be read ({why}); check the path"
        ) from error
    shards = list[Shard]()
    whole_lines = content.split(b"\n")[:-1]  # what follows the last line break is being written
    for k, line in enumerate(whole_lines):
        try:
            shards.append(json_files.parsed(line, _UncheckedShard))
        except ValueError as error:
            raise BadInput(
                f"harvest manifest '{place.name}/{file}': line {k + 1}: {error}; {REMEDY}"
            ) from error
    _check_shards(place, file, shards, f"part-{rank}")
    numbers = [number(shard) for shard in shards]
    if numbers and numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise BadInput(f"harvest manifest '{place.name}/{file}': a line is missing; {REMEDY}")
    return shards


def _check_shards(
    place: Place, file: str, shards: list[Shard], owner: str, end: int | None = None
) -> None:
    """Check the names, the prompts and the sizes of a ledger's groups.

    owner: the beginning of all names, or empty.
    """
    path = f"harvest manifest '{place.name}/{file}'"
    seen = set[str]()
    for k, shard in enumerate(shards):
        name = shard["name"]
        match = _NAME.fullmatch(name)
        is_own = match is not None and (not owner or name.startswith(f"{owner}-"))
        is_past = end is None or (is_own and number(shard) < end)
        if not is_own or not is_past:
            raise BadInput(
                f"{path}: shards[{k}]: '{name[:60]}' is not a group of this ledger; {REMEDY}"
            )
        if name in seen:
            raise BadInput(f"{path}: shards[{k}]: group {name} appears twice; {REMEDY}")
        seen.add(name)
        if not _PROMPTS.fullmatch(shard["prompts"]):
            raise BadInput(f"{path}: shards[{k}].prompts: not ids of prompts; {REMEDY}")
        try:
            _check_pieces(shard["tables"], TABLES, f"shards[{k}].tables")
            _check_pieces(shard["indices"], (INDEXES, POSTINGS), f"shards[{k}].indices")
        except ValueError as error:
            raise BadInput(f"{path}: {error}; {REMEDY}") from error
        if INDEXES not in shard["indices"]:
            raise BadInput(f"{path}: shards[{k}].indices: '{INDEXES}' is missing; {REMEDY}")


def _check_pieces(pieces: Any, known: Collection[str], place: str) -> None:
    """Check the files of a group in one ledger.

    Raises:
        ValueError: a table is unknown, or an entry is not a Piece.
    """
    if not isinstance(pieces, dict):
        raise json_files.Mismatch(place, "an object", pieces)
    for folder, piece in pieces.items():
        if not _is_piece(piece):
            json_files.conform(piece, Piece, f"{place}.{folder[:60]}")
        if folder not in known or piece["rows"] < 0 or piece["bytes"] < 0:
            raise ValueError(f"{place}.{folder[:60]}: not the file of a table")


def _is_piece(value: Any) -> bool:
    """Return whether a value is a Piece; as `json_files.conform`, but without an explanation."""
    if type(value) is not dict or len(value) != 3:
        return False
    rows = value.get("rows")
    size = value.get("bytes")
    if type(rows) is not int or type(size) is not int:
        return False
    in_range = max(abs(rows), abs(size)) <= json_files.LARGEST
    return in_range and type(value.get("digest")) is str


# ---- writing -------------------------------------------------------------------------------------


def replace_json(path: Path, value: Any) -> None:
    """Write a JSON file completely or not at all."""
    with whole(path) as temporary:
        temporary.write_text(json_files.dumped(value), encoding="utf-8")


class Journal:
    """The lines that a process appends to its rank's ledger."""

    def __init__(self, folder: Path, rank: int):
        self.path = folder / f"manifest-{rank}.jsonl"
        self._size = 0

    def append(self, shard: Shard) -> None:
        """Append the line of one group, and flush it to disk.

        After an error, the part of the line that was written is removed.
        """
        line = json_files.dumped(shard).encode()
        with open(self.path, "ab", buffering=0) as file:
            file.truncate(self._size)  # after an error, a part of a line may be left
            try:
                written = file.write(line)
                if written != len(line):  # the disk is full, so writing the rest raises an error
                    file.write(line[written:])
                os.fsync(file.fileno())
            except OSError:
                file.truncate(self._size)
                raise
        self._size += len(line)

    def remove(self) -> None:
        """Remove the lines, once the ledger holds their groups."""
        self.path.unlink(missing_ok=True)
        self._size = 0
