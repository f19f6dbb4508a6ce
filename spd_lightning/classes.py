"""The class paths that configs and files can name: a closed list, since building them runs code.

`ALLOWED` names this package and the parts of Lightning that configs choose: trackers, profilers,
callbacks, and the hardware that a Trainer uses. A path below one of its entries is allowed, and a
path below an entry of `DENIED` is not; the longest matching entry decides. For one command, the
option `--allow_classes PACKAGE` adds a package that the user trusts.
"""

import importlib
from collections.abc import Sequence

from spd_lightning.errors import BadInput

ALLOWED = (
    "spd_lightning",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "lightning.fabric.plugins",
    "lightning.fabric.strategies",
    "lightning.fabric.accelerators",
    "lightning.pytorch.accelerators",
)
DENIED = (
    "*",
    "lightning.pytorch.callbacks.LambdaCallback",  # it takes functions by name
    "lightning.pytorch.callbacks.lambda_function",
)

_trusted: set[str] = set()
_revoked: set[str] = set()


def trust(packages: Sequence[str]) -> None:
    """Allow the classes of these packages, until the process ends or `trust` is called again.

    Raises:
        BadInput: one of them is not the name of a package.
    """
    for package in packages:
        if not all(part.isidentifier() for part in package.split(".")):
            raise BadInput(
                f"--allow_classes '{package}': not a package; for example: --allow_classes "
                "mypackage"
            )
    _revoked.update(_trusted)
    _revoked.difference_update(packages)
    _trusted.clear()
    _trusted.update(packages)


def verdicts() -> tuple[list[str], list[str]]:
    """Return the denied and the allowed entries; the longest one that matches a path decides."""
    denied = [*DENIED, *_revoked]
    allowed_entries = [*ALLOWED, *_trusted]
    return denied, allowed_entries


def allowed(path: str) -> bool:
    """Return whether a class path is allowed."""
    denied, allowed_entries = verdicts()
    parts = path.split(".")
    for count in range(len(parts), 0, -1):  # the longest entry first
        entry = ".".join(parts[:count])
        if entry in allowed_entries:
            return True
        if entry in denied:
            return False
    return False


def check(path: str) -> None:
    """Raise BadInput if a class path is not allowed. Nothing is imported."""
    if not allowed(path):
        raise _not_allowed(path)


def _not_allowed(path: str) -> BadInput:
    return BadInput(
        f"class_path '{path[:100]}': not one that a config may name; allow your own package on "
        "the command line: --allow_classes PACKAGE"
    )


def imported(path: str) -> type:
    """Import a class whose path a config names, where jsonargparse does not do so.

    Raises:
        BadInput: the path is not allowed, or not a class.
    """
    check(path)
    module, _, name = path.rpartition(".")
    try:
        value = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:  # ValueError: no module in the path
        raise BadInput(f"class_path '{path}': {error}; write package.Class") from error
    if not isinstance(value, type) or not allowed(f"{value.__module__}.{value.__qualname__}"):
        raise _not_allowed(path)
    return value


def allowed_by_user(path: str) -> bool:
    """Return whether the user has allowed a class path, or a package that contains it."""
    return any(path == package or path.startswith(f"{package}.") for package in _trusted)
