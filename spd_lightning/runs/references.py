"""Find the run folder that a reference names: a name, a path, or a copy on a tracker.

A copy on a tracker is downloaded once.
"""

import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from spd_lightning.errors import BadInput, shown
from spd_lightning.files import make_folder, mark, root, sweep, sync_folder
from spd_lightning.runs.artifacts import check_whole, keep_known
from spd_lightning.runs.files import held, lock, read_json, writable, write_json
from spd_lightning.runs.folders import Run, is_run, runs, unknown
from spd_lightning.runs.lineage import check_lineage
from spd_lightning.runs.shapes import Origin
from spd_lightning.runs.trackers import pull_mlflow, pull_wandb

log = logging.getLogger(__name__)

_KEPT = "this copy is kept, and the new one gets the next free number"
_PULLS = {"mlflow": pull_mlflow, "wandb": pull_wandb}


def find(reference: str) -> Run:
    """Find the run that a reference names; a run on a tracker is downloaded the first time.

    Args:
        reference: a run's name, the path of a run or of a harvest, or a reference that `pull`
            accepts.

    Raises:
        BadInput: the run does not exist (the error suggests the nearest name), or its tracker does
            not answer.
    """
    if reference.partition(":")[0] in _PULLS:
        for run in runs():
            origin = read_json(run.path / "pulled.json", Origin)
            if origin.get("reference") == reference:
                return run
        return Run(pull(reference))
    for path in (root() / reference, Path(reference)):
        if reference and is_run(path):
            return Run(path)
    if os.sep in reference:
        raise BadInput(
            f"run '{shown(reference)}': not a run or a harvest; name a folder with config.yaml or "
            "manifest.json"
        )
    raise unknown(reference)


def pull(reference: str) -> Path:
    """Download a run or harvest from a tracker to <root>/<its name>-pulled, and return that path.

    The folder appears only when the download is complete. It replaces an older copy, unless that
    copy has files that the tracker does not have, for example a harvest that was made in it. In
    that case, the folder is called <its name>-pulled-2, and so on.

    Args:
        reference: `mlflow:<run id or name>` or `wandb:<entity>/<project>/<artifact>:<version>`.

    Raises:
        BadInput: the run or artifact does not exist, the tracker does not answer, a file is damaged
            or has a name that points outside the folder, the files are not the ones whose digest
            the tracker recorded, or a process works on the older copy.
    """
    tracker, _, what = reference.partition(":")
    if tracker not in _PULLS or not what:
        raise BadInput(
            f"reference '{reference}': write mlflow:<run> or "
            "wandb:<entity>/<project>/<artifact>:<version>"
        )
    with writable(root()):
        make_folder(root())
        sweep(root())
        with tempfile.TemporaryDirectory(dir=root(), prefix=".pull.", suffix=mark()) as temporary:
            folder = Path(temporary) / "run"
            folder.mkdir()
            name, origin, recorded = _PULLS[tracker](what, folder)
            keep_known(folder, reference)
            check_whole(folder)
            check_lineage(folder, recorded, reference)
            write_json(folder / "pulled.json", {"reference": reference, "origin": origin})
            safe_name = re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip(".-")
            return _move_into_root(folder, safe_name or "run", origin)


def _move_into_root(folder: Path, name: str, origin: str) -> Path:
    """Move a downloaded folder into the root folder, and return its new path.

    It replaces an older copy of the same run, and gets another number than copies of other runs.
    """
    for number in count(1):
        numbered = f"{name}-pulled" if number == 1 else f"{name}-pulled-{number}"
        path = root() / numbered
        if not path.exists():
            folder.rename(path)
            sync_folder(path.parent)
            return path
        if read_json(path / "pulled.json", Origin).get("origin") != origin:
            continue
        with _locked(path):
            only_local = sorted(_files(path) - _files(folder))
            if only_local:
                log.info(
                    "'%s': the tracker does not have its file %s; %s", path, only_local[0], _KEPT
                )
                continue
            path.rename(folder.with_name("old"))
            folder.rename(path)
            sync_folder(path.parent)
            return path
    raise AssertionError("unreachable: count() never ends")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a pulled run's lock.

    Raises:
        BadInput: another process works on the run, or on one of its harvests, which have separate
            locks.
    """
    handle = lock(path)
    try:
        harvest_locks = path.rglob(".lock-*")
        if handle is None or any(held(file.parent, file.name) for file in harvest_locks):
            raise BadInput(
                f"run '{path}': another process is working on it; pull it again after that process "
                "has ended"
            )
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _files(folder: Path) -> set[str]:
    """Return the files below a folder, without locks and temporary files (names with a dot)."""
    names = set()
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.startswith("."):
            names.add(path.relative_to(folder).as_posix())
    return names
