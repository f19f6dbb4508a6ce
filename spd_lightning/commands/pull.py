"""pull: fetch a run from a tracker."""

from collections.abc import Sequence

from spd_lightning import runs
from spd_lightning.commands import options


def main(argv: Sequence[str]) -> None:
    """Fetch a run from a tracker."""
    arguments = options.read("pull", argv)
    path = runs.pull(arguments.reference)
    print(f"run: {path}    view it: python -m spd_lightning view {path}")
