"""The lineage of uploads to trackers: the run, the weights and the config they come from.

A run is uploaded in parts: the run itself (`run`), and each of its harvests (`harvest/<name>`).
The tracker records the lineage of each part, with a digest of the part. A download is compared with
this digest.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spd_lightning import json_files
from spd_lightning.digests import digest, digest_of
from spd_lightning.errors import BadInput
from spd_lightning.runs.files import read_json

RUN = "run"
_RUN_FILES = ("config.yaml", "decomposition.json", "summary.json")
_LEDGERS = ("manifest.json", "manifest-*.json", "manifest-*.jsonl", "merged.json")


def parts(folder: Path, names: Sequence[str]) -> Iterator[str]:
    """Yield the parts of a run that are among some of its files and folders.

    names: relative to the run's folder: `config.yaml`, `harvest`, `harvest/graphs`, …
    """
    if "config.yaml" in names and (folder / "config.yaml").exists():
        yield RUN
    for manifest in sorted(folder.glob("harvest/*/manifest.json")):
        part = f"harvest/{manifest.parent.name}"
        if "harvest" in names or part in names:
            yield part


def lineage(folder: Path, part: str) -> dict[str, str]:
    """Return the lineage of a part of a run.

    Returns:
        run: the name of the run.
        config: the digest of its config.
        checkpoint: the digest of its weights.
        digest: the digest of the part. It covers the config and the JSON files of the part, which
            contain the digests of its weights and tables.
    """
    facts = {"run": folder.name}
    config = folder / "config.yaml"
    if config.exists():
        facts["config"] = digest(config)
    if part == RUN:
        weights = read_json(folder / "decomposition.json", dict[str, Any]).get("digest", "")
        files = [folder / name for name in _RUN_FILES]
    else:
        harvest = folder / part
        weights = read_json(harvest / "manifest.json", dict[str, Any]).get("checkpoint_digest", "")
        files = sorted({path for name in _LEDGERS for path in harvest.glob(name)})
    facts["checkpoint"] = str(weights)
    lines = [f"{path.name} {digest(path)}" for path in files if path.exists()]
    facts["digest"] = digest_of("\n".join(lines).encode())
    return facts


def check_lineage(folder: Path, recorded: Mapping[str, Any], reference: str) -> None:
    """Compare a downloaded run with the digests that its tracker recorded.

    Args:
        folder: the downloaded run.
        recorded: by part, the lineage that the tracker has. It is not trusted: the values can have
            any type.
        reference: the reference of the download, for messages.

    Raises:
        BadInput: a part has another digest.
    """
    for part in parts(folder, ("config.yaml", "harvest")):
        if part not in recorded:
            continue
        entry = recorded[part]
        expected = entry.get("digest") if isinstance(entry, Mapping) else entry
        found = lineage(folder, part)["digest"]
        if found != expected:
            raise BadInput(
                f"'{reference}': its part '{part}' has the digest {found}, but the tracker "
                f"recorded {str(expected)[:16]}; push the run again, or wait until its upload ends"
            )


# ---- tags of MLflow ------------------------------------------------------------------------------

_TAG = "spd."


def tags(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the lineage of the parts of a run that are among `names` (see `parts`), as tags."""
    return {f"{_TAG}{part}": json.dumps(lineage(folder, part)) for part in parts(folder, names)}


def recorded_in(tags: Mapping[str, str]) -> dict[str, Any]:
    """Return the lineage in tags, by part; the text of a tag that is not a lineage is kept."""
    recorded = dict[str, Any]()
    for key, text in tags.items():
        if not key.startswith(_TAG):
            continue
        part = key.removeprefix(_TAG)
        try:
            recorded[part] = json_files.parsed(text.encode(), dict[str, str])
        except ValueError:
            recorded[part] = text
    return recorded
