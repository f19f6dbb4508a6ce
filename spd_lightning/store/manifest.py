"""The manifest of a harvest: its settings, one ledger per rank, and how they are merged."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from spd_lightning import json_files
from spd_lightning.errors import BadInput
from spd_lightning.store.tables import SCHEMA_VERSION, TABLES

LARGEST_C = 1 << 20
"""Components of one layer at most: pages make arrays as wide as a manifest says."""

_REMEDY = "delete it and run the same predict again"


class Piece(TypedDict):
    """One file of a group: a table's rows, the file's size, and the digest of its bytes."""

    rows: int
    bytes: int
    digest: str


class Shard(TypedDict):
    """One committed group: {"rank": 0, "n": 3, "tables": {"nodes": {"rows": 120, "bytes": 4711, …},
    …}}.
    """

    rank: int
    n: int
    tables: dict[str, Piece]
    gap: NotRequired[float]


class Ledger(TypedDict):
    """The shards that one rank committed, and whether they are its whole share."""

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
"""The largest gap at which in-edges of frozen graphs add up to the activations, in single precision
(law A6).
"""


def gap_warning(manifest: Mapping[str, Any]) -> str:
    """One line about a harvest of frozen graphs whose in-edges do not add up (A6); empty if they
    do.
    """
    gap = manifest.get("gap")
    if gap is None or gap <= ADDS_UP:
        return ""
    return (
        f"in-edges do NOT add up: they miss up to {100 * gap:.2g} % of a prompt's activations, "
        "where frozen graphs "
        f"should miss at most {100 * ADDS_UP:.2g} %. The target computes something that no rule "
        "covers. Do not "
        "rely on sums of edges here; mode unmasked does not claim them"
    )


def part(shard: Mapping[str, Any]) -> str:
    """The name of a group's file in each of its tables' folders."""
    return f"part-{shard['rank']}-{shard['n']}.parquet"


def ledger_path(folder: Path, rank: int) -> Path:
    """Where a rank keeps its ledger."""
    return folder / f"manifest-{rank}.json"


def read_settings(folder: Path) -> dict[str, Any]:
    """Read the settings of a harvest.

    Raises:
        BadInput: no manifest, one that cannot be read, or one of another schema.
    """
    path = folder / "manifest.json"
    if not path.exists():
        raise BadInput(
            f"harvest '{folder}': no manifest.json there; name a folder that `predict` wrote"
        )

    def this_version(held: Mapping[str, Any]) -> None:
        if "schema_version" in held:
            _check_version(folder, held["schema_version"])

    settings = json_files.read(path, Settings, _REMEDY, "harvest manifest ", first=this_version)
    _check_settings(path, settings)
    return dict(settings)


def _check_version(folder: Path, version: Any) -> None:
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise BadInput(
            f"harvest '{folder}': schema_version {version!r} is newer than {SCHEMA_VERSION}, the "
            "newest that this "
            "program reads; update spd_lightning"
        )
    if version < SCHEMA_VERSION:
        raise BadInput(
            f"harvest '{folder}': schema_version {version} is older than {SCHEMA_VERSION}, the one "
            "that this program "
            "reads; delete the folder and run the same predict again"
        )


def _check_settings(path: Path, settings: Settings) -> None:
    """Check a manifest beyond its types."""
    layers = settings["layers"]
    if len(set(layers)) < len(layers):
        twice = next(name for name in layers if layers.count(name) > 1)
        raise BadInput(
            f"harvest manifest '{path}': layers: '{twice[:60]}' appears twice; {_REMEDY}"
        )
    for layer, count in settings.get("C", {}).items():
        if not 0 <= count <= LARGEST_C:
            raise BadInput(
                f"harvest manifest '{path}': C.{layer[:60]}: {count} is not a number of "
                "components, which is from 0 to "
                f"{LARGEST_C}; {_REMEDY}"
            )


def read_ledgers(folder: Path) -> dict[int, Ledger]:
    """Every rank's ledger, by rank.

    Raises:
        BadInput: one cannot be read.
    """
    names = (path.stem.removeprefix("manifest-") for path in folder.glob("manifest-*.json"))
    ranks = sorted(int(name) for name in names if name.isascii() and name.isdecimal())
    return {rank: _read_ledger(ledger_path(folder, rank), rank) for rank in ranks}


def _read_ledger(path: Path, rank: int) -> Ledger:
    ledger = json_files.read(path, Ledger, _REMEDY, "harvest manifest ")
    seen = set[int]()
    for k, shard in enumerate(ledger["shards"]):
        if shard["rank"] != rank or shard["n"] < 0:
            raise BadInput(
                f"harvest manifest '{path}': shards[{k}]: not a group of rank {rank}; {_REMEDY}"
            )
        if shard["n"] in seen:
            raise BadInput(
                f"harvest manifest '{path}': shards[{k}]: group {shard['n']} appears twice; "
                f"{_REMEDY}"
            )
        seen.add(shard["n"])
        for table, piece in shard["tables"].items():
            if table not in TABLES or piece["rows"] < 0 or piece["bytes"] < 0:
                raise BadInput(
                    f"harvest manifest '{path}': shards[{k}].tables.{table[:60]}: not the file of "
                    f"a table; {_REMEDY}"
                )
    return ledger


def totals(world: int, ledgers: Mapping[int, Ledger], shards: Sequence[Shard]) -> dict[str, Any]:
    """Rows, prompts and groups of these shards; complete where every rank has said so and none is
    left out.

    gap: of frozen graphs, the largest of any group.
    """
    rows = {
        table: sum(s["tables"][table]["rows"] for s in shards if table in s["tables"])
        for table in TABLES
    }
    committed = sum(len(ledger["shards"]) for ledger in ledgers.values())
    said = all(rank in ledgers and ledgers[rank]["complete"] for rank in range(world))
    complete = said and committed == len(shards)
    gaps = [shard["gap"] for shard in shards if "gap" in shard]
    sums = {"gap": max(gaps)} if gaps else {}
    return {
        "rows": rows,
        "prompts": rows["prompts"],
        "shards": len(shards),
        "complete": complete,
        **sums,
    }


def check_same(folder: Path, held: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Rows made with different settings do not belong into one harvest.

    Raises:
        BadInput: a setting differs; the first that does is named.
    """
    for key in sorted({*held, *asked}):
        was, now = (side.get(key) for side in (held, asked))
        if isinstance(was, dict) and isinstance(now, dict):
            check_same(folder, was, now)
        elif was != now:
            was, now = (json.dumps(value)[:60] for value in (was, now))
            raise BadInput(
                f"harvest '{folder}': made with {key} {was}, not {now}; give this one another name "
                "or delete the folder"
            )
