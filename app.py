"""Entry point of the viewer: `gradio app.py` or `python app.py`.

It serves the same pages as `python -m spd_lightning view`.
"""

import contextlib
import sys

from spd_lightning.errors import BadInput
from spd_lightning.viewer.app import build, serve

demo = build()

if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is the usual way to stop a viewer
        try:
            serve(demo)
        except BadInput as error:
            sys.exit(f"error: {error}")
