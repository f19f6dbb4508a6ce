"""From what a user writes to a run folder here: a name, a path, or a tracker's copy, downloaded
once.
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
from spd_lightning.runs.shapes import Origin
from spd_lightning.runs.trackers import pull_mlflow, pull_wandb

log = logging.getLogger(__name__)

_KEPT = "this copy is kept, and the new one gets the next free number"
_PULLS = {"mlflow": pull_mlflow, "wandb": pull_wandb}


def find(reference: str) -> Run:
    """The run that a reference means; one that only a tracker has is pulled, once.

    Args:
        reference: a run's name, the path of a run or of a harvest, or what `pull` takes.

    Raises:
        BadInput: there is no such run (the nearest name is suggested), or its tracker does not
            answer.
    """
    if reference.partition(":")[0] in _PULLS:
        had = [
            run
            for run in runs()
            if read_json(run.path / "pulled.json", Origin).get("reference") == reference
        ]
        return had[0] if had else Run(pull(reference))
    for path in (root() / reference, Path(reference)):
        if reference and is_run(path):
            return Run(path)
    if os.sep in reference:
        raise BadInput(
            f"run '{shown(reference)}': no run or harvest there; name a folder with config.yaml or "
            "manifest.json"
        )
    raise unknown(reference)


def pull(reference: str) -> Path:
    """Download a tracked run or harvest; it lands whole as <root>/<its name>-pulled.

    It takes the place of an older copy, unless that holds files that the tracker does not have,
    such as a harvest that was made there: then it lands as <its name>-pulled-2, and so on.

    Args:
        reference: `mlflow:<run id or name>` or `wandb:<entity>/<project>/<artifact>:<version>`.

    Raises:
        BadInput: no such run or artifact, no answer, file names that point outside the folder, a
            damaged file, or an older copy on which a process works.
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
            name, origin = _PULLS[tracker](what, folder)
            keep_known(folder, reference)
            check_whole(folder)
            write_json(folder / "pulled.json", {"reference": reference, "origin": origin})
            return _land(
                folder, re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip(".-") or "run", origin
            )


def _land(folder: Path, name: str, origin: str) -> Path:
    """Move a downloaded folder to its place: over an older copy of the same thing, next to one of
    another.
    """
    for number in count(1):
        path = root() / (f"{name}-pulled" if number == 1 else f"{name}-pulled-{number}")
        if not path.exists():
            folder.rename(path)
            sync_folder(path.parent)
            return path
        if read_json(path / "pulled.json", Origin).get("origin") != origin:
            continue
        with _locked(path):
            if more := sorted(_files(path) - _files(folder)):
                log.info("'%s': the tracker does not have its file %s; %s", path, more[0], _KEPT)
                continue
            path.rename(folder.with_name("old"))
            folder.rename(path)
            sync_folder(path.parent)
            return path
    raise AssertionError("numbers do not end")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a pulled run's lock.

    Raises:
        BadInput: another process works on the run, or on one of its harvests, which have locks of
            their own.
    """
    handle = lock(path)
    try:
        if handle is None or any(held(file.parent, file.name) for file in path.rglob(".lock-*")):
            raise BadInput(
                f"run '{path}': another process is working on it; pull it again when that has ended"
            )
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _files(folder: Path) -> set[str]:
    """The files below a folder; locks and temporary files, whose names begin with a dot, are left
    out.
    """
    found = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix() for path in found}
