"""What a harvest's folder says about itself: the settings, one ledger a rank, and how they add up."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spd_lightning.errors import BadInput
from spd_lightning.store.tables import SCHEMA_VERSION, TABLES

Shard = dict[str, Any]
"""One committed group: {"rank": 0, "n": 3, "tables": {"nodes": {"rows": 120, "bytes": 4711}, …}}."""


ADDS_UP = 1e-4
"""The largest gap at which in-edges of frozen graphs add up to the activations, in single precision (law A6)."""


def gap_warning(manifest: Mapping[str, Any]) -> str:
    """One line about a harvest of frozen graphs whose in-edges do not add up (A6); empty if they do."""
    gap = manifest.get("gap")
    if gap is None or gap <= ADDS_UP:
        return ""
    return (
        f"in-edges do NOT add up: they miss up to {100 * gap:.2g} % of a prompt's activations, where frozen graphs "
        f"promise {100 * ADDS_UP:.2g} % at most; the target computes something that they have no rule for, so "
        "distrust sums of edges here, or take mode unmasked"
    )


def part(shard: Mapping[str, Any]) -> str:
    """The name of a group's file in each of its tables' folders."""
    return f"part-{shard['rank']}-{shard['n']}.parquet"


def ledger_path(folder: Path, rank: int) -> Path:
    """Where a rank keeps its ledger."""
    return folder / f"manifest-{rank}.json"


def _read(path: Path, needs: Sequence[str]) -> dict[str, Any]:
    remedy = "delete it and run the same predict again"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"harvest manifest '{path}': not JSON ({error}); {remedy}") from error
    except OSError as error:
        raise BadInput(f"harvest manifest '{path}': cannot be read ({error.strerror}); check the path") from error
    for key in needs:
        if not isinstance(value, dict) or key not in value:
            raise BadInput(f"harvest manifest '{path}': no '{key}' in it; {remedy}")
    return value


def read_settings(folder: Path) -> dict[str, Any]:
    """What was harvested, and how.

    Raises:
        BadInput: no manifest, one that cannot be read, or one of another schema.
    """
    path = folder / "manifest.json"
    if not path.exists():
        raise BadInput(f"harvest '{folder}': no manifest.json there; name a folder that `predict` wrote")
    settings = _read(path, ("schema_version", "layers", "world"))
    version = settings["schema_version"]
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise BadInput(
            f"harvest '{folder}': schema_version {version!r} is newer than {SCHEMA_VERSION}, the newest that this "
            "program reads; update spd_lightning"
        )
    if version < SCHEMA_VERSION:
        raise BadInput(
            f"harvest '{folder}': schema_version {version} is older than {SCHEMA_VERSION}, the one that this program "
            "reads; delete the folder and run the same predict again"
        )
    return settings


def read_ledgers(folder: Path) -> dict[int, dict[str, Any]]:
    """Every rank's ledger, by rank.

    Raises:
        BadInput: one cannot be read.
    """
    names = (path.stem.removeprefix("manifest-") for path in folder.glob("manifest-*.json"))
    ranks = sorted(int(name) for name in names if name.isdecimal())
    return {rank: _read(ledger_path(folder, rank), ("shards", "complete")) for rank in ranks}


def totals(world: int, ledgers: Mapping[int, Mapping[str, Any]], shards: Sequence[Shard]) -> dict[str, Any]:
    """Rows, prompts and groups of these shards; complete where every rank has said so and none is left out.

    gap: of frozen graphs, the largest of any group.
    """
    rows = {table: sum(s["tables"][table]["rows"] for s in shards if table in s["tables"]) for table in TABLES}
    committed = sum(len(ledger["shards"]) for ledger in ledgers.values())
    said = all(rank in ledgers and ledgers[rank]["complete"] for rank in range(world))
    complete = said and committed == len(shards)
    gaps = [shard["gap"] for shard in shards if shard.get("gap") is not None]
    sums = {"gap": max(gaps)} if gaps else {}
    return {"rows": rows, "prompts": rows["prompts"], "shards": len(shards), "complete": complete, **sums}


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
                f"harvest '{folder}': made with {key} {was}, not {now}; give this one another name or delete the folder"
            )
