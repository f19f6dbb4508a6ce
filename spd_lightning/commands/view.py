"""view: opens the viewer."""

from collections.abc import Sequence

from spd_lightning.commands import options


def main(argv: Sequence[str]) -> None:
    """Open the viewer, and a browser where there is a display."""
    asked = options.read("view", argv)
    from spd_lightning.viewer.app import launch

    launch(asked.path, asked.port, asked.host, open_browser=not asked.no_browser)
