"""view: opens the viewer."""

from collections.abc import Sequence
from pathlib import Path

from spd_lightning import runs
from spd_lightning.commands import options


def main(argv: Sequence[str]) -> None:
    """Open the viewer, and a browser where there is a display."""
    asked = options.read("view", argv)
    if asked.path is not None and not Path(asked.path).is_dir():
        runs.find(asked.path)  # before gradio is imported, which takes seconds
    from spd_lightning.viewer.app import launch

    launch(asked.path, asked.port, asked.host, open_browser=not asked.no_browser)
