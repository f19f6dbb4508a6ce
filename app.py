"""The viewer's entry: `gradio app.py` serves it and reloads on save, `python app.py` serves it plainly."""

from spd_lightning.viewer.app import build, serve

demo = build()

if __name__ == "__main__":
    serve(demo)
