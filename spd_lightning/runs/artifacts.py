"""Checks of run folders before an upload and after a download: known files, correct digests."""

import logging
import re
import shutil
from pathlib import Path

from spd_lightning import json_files
from spd_lightning.digests import digest
from spd_lightning.errors import BadInput
from spd_lightning.runs.shapes import RESTORE, Factorization, Record, read_summary

log = logging.getLogger(__name__)

_HARVEST = (
    r"(manifest|manifest-\d+|merged)\.json|manifest-\d+\.jsonl"
    r"|[a-z_]+/(part|merged)-\d+-\d+\.(parquet|safetensors)"
)
_KNOWN = re.compile(
    r"config\.yaml|(run|summary|decomposition|pulled)\.json"
    r"|decomposition\.safetensors|metrics\.jsonl"
    rf"|figures/[A-Za-z0-9._-]+\.png|{_HARVEST}|harvest/[A-Za-z0-9_][A-Za-z0-9._-]*/({_HARVEST})"
)
_PAGE = re.compile(r"(harvest/[^/]+/)?summary\.html")
"""A page for the tracker's own viewer. It is not kept, since it could run scripts."""


def keep_known(folder: Path, what: str) -> None:
    """Remove all links from a downloaded folder, and all files that no run or harvest has.

    Anybody may have uploaded files to a tracker, so only data files with the names that this
    package uses are accepted.

    Args:
        folder: the downloaded folder.
        what: the name of the download, for messages.

    Raises:
        BadInput: no file remains; the folder is deleted.
    """
    removed = []
    for path in sorted(folder.rglob("*"), reverse=True):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.is_symlink() or not path.is_file() or not _KNOWN.fullmatch(name):
            if not _PAGE.fullmatch(name):
                removed.append(name)
            path.unlink()
    if removed:
        log.warning(
            "%s: skipped %d files that do not belong to a run: %s",
            what,
            len(removed),
            ", ".join(sorted(removed)[:5]),
        )
    if not any(folder.iterdir()):
        shutil.rmtree(folder)
        raise BadInput(f"'{what}': none of its files belongs to a run or a harvest; name another")


def factorization(folder: Path) -> Factorization:
    """Compare a run's weights with their digest, and return the facts needed to read them.

    Raises:
        BadInput: decomposition.json is damaged, or it describes other weights.
    """
    weights = folder / "decomposition.safetensors"
    remedy = "run the fit again, or pull the run again"
    facts = json_files.read(folder / "decomposition.json", Factorization, remedy)
    if digest(weights) != facts["digest"]:
        raise BadInput(f"'{weights}': not the weights that decomposition.json describes; {remedy}")
    return facts


def check_whole(folder: Path) -> None:
    """Compare every file of a run with its digest, before an upload and after a download.

    Raises:
        BadInput: a file is damaged; the error names it.
    """
    record = folder / "run.json"
    if record.exists():
        json_files.read(record, Record, RESTORE)
    summary = folder / "summary.json"
    if summary.exists():
        read_summary(summary)
    description = folder / "decomposition.json"
    weights = folder / "decomposition.safetensors"
    if description.exists() and weights.exists():
        factorization(folder)
    manifests = {*folder.glob("manifest.json"), *folder.glob("harvest/*/manifest.json")}
    if manifests:
        from spd_lightning.store import Store

        for manifest in sorted(manifests):
            Store(manifest.parent).check()
