"""pull: fetches a run from a tracker."""

from collections.abc import Sequence

from spd_lightning import runs
from spd_lightning.commands import options


def main(argv: Sequence[str]) -> None:
    """Fetch a run from a tracker."""
    path = runs.pull(options.read("pull", argv).reference)
    print(f"run: {path}    see it: python -m spd_lightning view {path}")
