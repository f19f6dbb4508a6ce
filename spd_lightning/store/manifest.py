"""The manifest of a harvest: its settings, and what its ledgers add up to."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from spd_lightning import json_files
from spd_lightning.errors import BadInput
from spd_lightning.store.ledgers import REMEDY, Shard, Snapshot
from spd_lightning.store.places import Place, place_of, read_json
from spd_lightning.store.tables import SCHEMA_VERSION, TABLES

MANIFEST = "manifest.json"

LARGEST_C = 1 << 20
"""The largest number of components of a layer, since pages allocate arrays of that width."""

LARGEST_WORLD = 1 << 16
"""The largest number of processes of a harvest, since the ledger of each is looked for."""


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
    examples: NotRequired[dict[str, int]]
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


def read_settings(where: Path | Place) -> dict[str, Any]:
    """Read the settings of a harvest.

    Raises:
        BadInput: the manifest is missing, cannot be read, or has another schema.
    """
    place = place_of(where)
    folder = place.name
    try:
        place.size(MANIFEST)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadInput(
            f"harvest '{folder}': manifest.json not found; name a folder that `predict` wrote"
        ) from error
    except OSError as error:
        why = error.strerror or error
        raise BadInput(f"harvest '{folder}': cannot be read ({why}); check the path") from error

    def check_version(content: Mapping[str, Any]) -> None:
        if "schema_version" in content:
            _check_version(folder, content["schema_version"])

    settings = read_json(place, MANIFEST, Settings, REMEDY, first=check_version)
    _check_settings(f"{folder}/{MANIFEST}", settings)
    return dict(settings)


def _check_version(folder: str, version: Any) -> None:
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


def _check_settings(path: str, settings: Settings) -> None:
    """Check the values of a manifest whose types have been checked."""
    layers = settings["layers"]
    if len(set(layers)) < len(layers):
        repeated = next(name for name in layers if layers.count(name) > 1)
        raise BadInput(
            f"harvest manifest '{path}': layers: '{repeated[:60]}' appears twice; {REMEDY}"
        )
    world = settings["world"]
    if not 1 <= world <= LARGEST_WORLD:
        raise BadInput(
            f"harvest manifest '{path}': world: {world} is not a number of processes, which must "
            f"be from 1 to {LARGEST_WORLD}; {REMEDY}"
        )
    for layer, count in settings.get("C", {}).items():
        if not 0 <= count <= LARGEST_C:
            raise BadInput(
                f"harvest manifest '{path}': C.{layer[:60]}: {count} is not a number of "
                f"components, which must be from 0 to {LARGEST_C}; {REMEDY}"
            )


def totals(world: int, snapshot: Snapshot, shards: Sequence[Shard]) -> dict[str, Any]:
    """Count the rows, prompts and groups of shards.

    The harvest is complete if every rank has completed its share and `shards` are all shards of the
    ledgers. For frozen graphs, `gap` is the largest gap of any group.
    """
    rows = dict.fromkeys(TABLES, 0)
    for shard in shards:
        for table, piece in shard["tables"].items():
            rows[table] += piece["rows"]
    committed = len(snapshot.shards)
    complete_ranks = {rank for rank, ledger in snapshot.ledgers.items() if ledger["complete"]}
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
