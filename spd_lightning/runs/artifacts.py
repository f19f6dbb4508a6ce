"""Check run folders that come from a tracker or go to one: only known files, each with the digest
on record.
"""

import logging
import re
import shutil
from pathlib import Path

from spd_lightning import json_files
from spd_lightning.digests import digest
from spd_lightning.errors import BadInput
from spd_lightning.runs.shapes import RESTORE, Factorization, Record, read_summary

log = logging.getLogger(__name__)

_HARVEST = r"(manifest|manifest-\d+)\.json|[a-z_]+/part-\d+-\d+\.parquet"
_KNOWN = re.compile(
    r"config\.yaml|(run|summary|decomposition|pulled)\.json|decomposition\.safetensors|metrics\.jsonl"
    rf"|figures/[A-Za-z0-9._-]+\.png|{_HARVEST}|harvest/[A-Za-z0-9_][A-Za-z0-9._-]*/({_HARVEST})"
)


def keep_known(folder: Path, what: str) -> None:
    """Remove from a downloaded folder whatever is not a file of a run or a harvest; links among
    them.

    A tracker holds what anybody put there: only data is taken, under the names that this tool
    itself gives.
    """
    strange = []
    for path in sorted(folder.rglob("*"), reverse=True):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.is_symlink() or not path.is_file() or not _KNOWN.fullmatch(name):
            strange.append(name)
            path.unlink()
    if strange:
        log.warning(
            "%s: skipped %d files that do not belong to a run: %s",
            what,
            len(strange),
            ", ".join(sorted(strange)[:5]),
        )
    if not any(folder.iterdir()):
        shutil.rmtree(folder)
        raise BadInput(f"'{what}': none of its files is one of a run or a harvest; name another")


def factorization(folder: Path) -> Factorization:
    """How a run's matrices are to be read, once its weights have been compared with their digest.

    Raises:
        BadInput: decomposition.json is damaged, or the weights are not those that it describes.
    """
    weights = folder / "decomposition.safetensors"
    remedy = "run the fit again, or pull the run again"
    facts = json_files.read(folder / "decomposition.json", Factorization, remedy)
    if digest(weights) != facts["digest"]:
        raise BadInput(f"'{weights}': not the weights that decomposition.json describes; {remedy}")
    return facts


def check_whole(folder: Path) -> None:
    """Compare every file of a run with its digest: before it is sent to a tracker, and after it
    came from one.

    Raises:
        BadInput: one is damaged; it is named.
    """
    if (folder / "run.json").exists():
        json_files.read(folder / "run.json", Record, RESTORE)
    if (folder / "summary.json").exists():
        read_summary(folder / "summary.json")
    if (folder / "decomposition.json").exists() and (folder / "decomposition.safetensors").exists():
        factorization(folder)
    manifests = sorted({*folder.glob("manifest.json"), *folder.glob("harvest/*/manifest.json")})
    if manifests:
        from spd_lightning.store import Store

        for manifest in manifests:
            Store(manifest.parent).check()
