"""The manifest of a harvest: its settings, one ledger per rank, and how they are merged."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from spd_lightning import json_files
from spd_lightning.errors import BadInput
from spd_lightning.store.tables import SCHEMA_VERSION, TABLES

LARGEST_C = 1 << 20
"""The largest number of components of a layer, since pages allocate arrays of that width."""

_REMEDY = "delete it and run the same predict command again"


class Piece(TypedDict):
    """One file of a group: the number of its rows, its size, and the digest of its bytes."""

    rows: int
    bytes: int
    digest: str


class Shard(TypedDict):
    """One committed group of files, one file per table.

    Example: {"rank": 0, "n": 3, "tables": {"nodes": {"rows": 120, "bytes": 4711, …}, …}}.
    """

    rank: int
    n: int
    tables: dict[str, Piece]
    gap: NotRequired[float]


class Ledger(TypedDict):
    """The shards that one rank committed, and whether its share of the prompts is complete."""

    shards: list[Shard]
    complete: bool


@json_files.open_ended
class Settings(TypedDict):
    """The settings of a harvest; each harvester adds its own."""

    schema_version: int
    layers: list[str]
    world: int
    harvest: NotRequired[str]
    run: NotRequired[str]
    kind: NotRequired[Literal["vectors", "tokens"]]
    mode: NotRequired[str]
    threshold: NotRequired[float]
    checkpoint_digest: NotRequired[str]
    C: NotRequired[dict[str, int]]
    token_layers: NotRequired[list[str]]
    corpus: NotRequired[bool]


ADDS_UP = 1e-4
"""The largest gap of a frozen graph whose in-edges count as adding up to the activations (law A6).

It is a bound for single precision.
"""


def gap_warning(manifest: Mapping[str, Any]) -> str:
    """Return a warning if the in-edges of frozen graphs do not add up (A6), otherwise ""."""
    gap = manifest.get("gap")
    if gap is None or gap <= ADDS_UP:
        return ""
    return (
        f"in-edges do NOT add up: they miss up to {100 * gap:.2g} % of a prompt's activations, "
        f"where frozen graphs should miss at most {100 * ADDS_UP:.2g} %. "
        "The target computes something that no rule covers. "
        "Do not rely on sums of edges in this harvest; mode unmasked does not promise them"
    )


def part(shard: Mapping[str, Any]) -> str:
    """Return the file name of a group, which is the same in the folder of every table."""
    return f"part-{shard['rank']}-{shard['n']}.parquet"


def ledger_path(folder: Path, rank: int) -> Path:
    """Return the path of a rank's ledger."""
    return folder / f"manifest-{rank}.json"


def read_settings(folder: Path) -> dict[str, Any]:
    """Read the settings of a harvest.

    Raises:
        BadInput: the manifest is missing, cannot be read, or has another schema.
    """
    path = folder / "manifest.json"
    if not path.exists():
        raise BadInput(
            f"harvest '{folder}': manifest.json not found; name a folder that `predict` wrote"
        )

    def check_version(content: Mapping[str, Any]) -> None:
        if "schema_version" in content:
            _check_version(folder, content["schema_version"])

    settings = json_files.read(path, Settings, _REMEDY, "harvest manifest ", first=check_version)
    _check_settings(path, settings)
    return dict(settings)


def _check_version(folder: Path, version: Any) -> None:
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise BadInput(
            f"harvest '{folder}': schema_version {version!r} is newer than {SCHEMA_VERSION}, the "
            "newest version that this program reads; update spd_lightning"
        )
    if version < SCHEMA_VERSION:
        raise BadInput(
            f"harvest '{folder}': schema_version {version} is older than {SCHEMA_VERSION}, the "
            "version that this program reads; "
            "delete the folder and run the same predict command again"
        )


def _check_settings(path: Path, settings: Settings) -> None:
    """Check the values of a manifest whose types have been checked."""
    layers = settings["layers"]
    if len(set(layers)) < len(layers):
        repeated = next(name for name in layers if layers.count(name) > 1)
        raise BadInput(
            f"harvest manifest '{path}': layers: '{repeated[:60]}' appears twice; {_REMEDY}"
        )
    for layer, count in settings.get("C", {}).items():
        if not 0 <= count <= LARGEST_C:
            raise BadInput(
                f"harvest manifest '{path}': C.{layer[:60]}: {count} is not a number of "
                f"components, which must be from 0 to {LARGEST_C}; {_REMEDY}"
            )


def read_ledgers(folder: Path) -> dict[int, Ledger]:
    """Read the ledgers of all ranks, by rank.

    Raises:
        BadInput: a ledger cannot be read.
    """
    ranks = []
    for path in folder.glob("manifest-*.json"):
        number = path.stem.removeprefix("manifest-")
        if number.isascii() and number.isdecimal():
            ranks.append(int(number))
    return {rank: _read_ledger(ledger_path(folder, rank), rank) for rank in sorted(ranks)}


def _read_ledger(path: Path, rank: int) -> Ledger:
    ledger = json_files.read(path, Ledger, _REMEDY, "harvest manifest ")
    seen = set[int]()
    for k, shard in enumerate(ledger["shards"]):
        n = shard["n"]
        if shard["rank"] != rank or n < 0:
            raise BadInput(
                f"harvest manifest '{path}': shards[{k}]: not a group of rank {rank}; {_REMEDY}"
            )
        if n in seen:
            raise BadInput(
                f"harvest manifest '{path}': shards[{k}]: group {n} appears twice; {_REMEDY}"
            )
        seen.add(n)
        for table, piece in shard["tables"].items():
            negative = piece["rows"] < 0 or piece["bytes"] < 0
            if table not in TABLES or negative:
                raise BadInput(
                    f"harvest manifest '{path}': shards[{k}].tables.{table[:60]}: not the file of "
                    f"a table; {_REMEDY}"
                )
    return ledger


def totals(world: int, ledgers: Mapping[int, Ledger], shards: Sequence[Shard]) -> dict[str, Any]:
    """Count the rows, prompts and groups of shards.

    The harvest is complete if every rank has completed its share and `shards` are all shards of the
    ledgers. For frozen graphs, `gap` is the largest gap of any group.
    """
    rows = dict.fromkeys(TABLES, 0)
    for shard in shards:
        for table, piece in shard["tables"].items():
            rows[table] += piece["rows"]
    committed = 0
    for ledger in ledgers.values():
        committed += len(ledger["shards"])
    complete_ranks = {rank for rank, ledger in ledgers.items() if ledger["complete"]}
    ranks_complete = complete_ranks.issuperset(range(world))
    sums: dict[str, Any] = {
        "rows": rows,
        "prompts": rows["prompts"],
        "shards": len(shards),
        "complete": ranks_complete and committed == len(shards),
    }
    gaps = [shard["gap"] for shard in shards if "gap" in shard]
    if gaps:
        sums["gap"] = max(gaps)
    return sums


def check_same(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Check that rows made with new settings can be added to a harvest made with old ones.

    Raises:
        BadInput: a setting differs; the error names the first.
    """
    keys = {*old, *new}
    for key in sorted(keys):
        before = old.get(key)
        now = new.get(key)
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            check_same(folder, before, now)
        else:
            raise BadInput(
                f"harvest '{folder}': made with {key} {json.dumps(before)[:60]}, not "
                f"{json.dumps(now)[:60]}; give the new harvest another name or delete the folder"
            )
