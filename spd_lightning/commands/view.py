"""view: open the viewer."""

from collections.abc import Sequence
from pathlib import Path

from spd_lightning import runs
from spd_lightning.commands import options


def main(argv: Sequence[str]) -> None:
    """Start the viewer, and open it in a browser if there is a display."""
    arguments = options.read("view", argv)
    path = arguments.path
    if path is not None and not Path(path).is_dir():
        runs.find(path)  # report a wrong name before the seconds of importing gradio
    from spd_lightning.viewer.app import launch

    launch(path, arguments.port, arguments.host, open_browser=not arguments.no_browser)
