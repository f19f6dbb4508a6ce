"""The viewer's entry: `gradio app.py` and `python app.py` serve it, as `python -m spd_lightning
view` does.
"""

import contextlib
import sys

from spd_lightning.errors import BadInput
from spd_lightning.viewer.app import build, serve

demo = build()

if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is how a viewer ends
        try:
            serve(demo)
        except BadInput as error:
            sys.exit(f"error: {error}")
