"""Class paths that a config or a file may name: what builds an object runs code, so this is a
closed list.

`ALLOWED` names this package and the parts of Lightning that configs choose: trackers, profilers,
callbacks and what a Trainer runs on. A path below an entry is allowed, and one below an entry of
`DENIED` is not. The command line's option `--allow_classes PACKAGE` adds what the user trusts, for
the length of a command.
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
    "lightning.pytorch.callbacks.LambdaCallback",  # it takes functions, by their names
    "lightning.pytorch.callbacks.lambda_function",
)

_trusted: set[str] = set()
_revoked: set[str] = set()


def trust(packages: Sequence[str]) -> None:
    """Allow the classes of these packages, until the process ends or `trust` is called again.

    Raises:
        BadInput: one is not a package's name.
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
    """Return what is denied and what is allowed, for jsonargparse: the longest entry that fits a
    path decides.
    """
    return [*DENIED, *_revoked], [*ALLOWED, *_trusted]


def allowed(path: str) -> bool:
    """Whether a class path may be named: the longest entry that it lies below decides."""
    denied, allowed_here = verdicts()
    parts = path.split(".")
    for count in range(len(parts), 0, -1):  # the longest first
        entry = ".".join(parts[:count])
        if entry in allowed_here:
            return True
        if entry in denied:
            return False
    return False


def check(path: str) -> None:
    """Raise BadInput if a class path may not be named; nothing is imported."""
    if not allowed(path):
        raise _not_allowed(path)


def _not_allowed(path: str) -> BadInput:
    return BadInput(
        f"class_path '{path[:100]}': not one that a config may name; a package of your own is "
        "named on the "
        "command line: --allow_classes PACKAGE"
    )


def imported(path: str) -> type:
    """The class of a path that a config names, where jsonargparse does not import it.

    Raises:
        BadInput: it is not allowed, or not a class.
    """
    check(path)
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (
        ImportError,
        AttributeError,
        ValueError,
    ) as error:  # ValueError: the path names no module
        raise BadInput(f"class_path '{path}': {error}; write package.Class") from error
    if not isinstance(found, type) or not allowed(f"{found.__module__}.{found.__qualname__}"):
        raise _not_allowed(path)
    return found


def allowed_by_user(path: str) -> bool:
    """Whether the user allowed a class path, or a package that it lies in."""
    return any(path == package or path.startswith(f"{package}.") for package in _trusted)
