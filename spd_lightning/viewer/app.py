"""The viewer: `gradio app.py`, or `python -m spd_lightning view`. It only reads the files of runs.

By default it listens on this machine only. It sends no analytics, and opens only files below the
given path: requests name runs, harvests and prompts, never paths.
"""

import os
import socket
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr

from spd_lightning.errors import BadInput
from spd_lightning.runs import Run
from spd_lightning.viewer import api, component_page, graph_page, run_page, serving, token_page
from spd_lightning.viewer.library import Library, harvest_names
from spd_lightning.viewer.panel import Panel

HERE = Path(__file__).parent
TITLE = '<h1 class="spd-brand">spd_lightning</h1>'
PAGES = {"Graph": graph_page, "Tokens": token_page, "Components": component_page, "Run": run_page}
STYLES = ("widget.css", "graph.css", "tokens.css", "page.css")
EMPTY = (HERE / "empty.html").read_text(encoding="utf-8")
# A plot that was drawn while its page was hidden has the wrong size until the window is resized.
FIT = "() => { setTimeout(() => window.dispatchEvent(new Event('resize')), 60); }"
FONT = ["ui-sans-serif", "system-ui", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]


def build(path: str | None = None) -> gr.Blocks:
    """Build the pages for the runs below `path` (see `Library`); `serve` serves them.

    Raises:
        BadInput: `path` does not exist.
    """
    library = Library(path)
    plain: dict[str, Any] = {"show_label": False, "container": False, "choices": []}
    with gr.Blocks(title="spd_lightning", analytics_enabled=False, fill_width=True) as demo:
        with gr.Row(elem_id="top"):
            gr.HTML(TITLE, apply_default_css=False, min_width=180)
            run = gr.Dropdown(label="Run", scale=3, min_width=340, **plain)
            harvest = gr.Dropdown(label="Harvest", scale=1, min_width=160, visible=False, **plain)
            refresh = gr.Button("Refresh", scale=0, min_width=100, size="md")
        message = gr.HTML(visible=False, apply_default_css=False)
        with gr.Tabs(visible=False) as pages:
            panels = [_build_page(name, module, library) for name, module in PAGES.items()]
        outputs = [run, harvest, message, pages]
        _connect(demo, library, refresh, outputs, panels)
    return demo


def _build_page(name: str, module: Any, library: Library) -> Panel:
    with gr.Tab(name, id=name.lower()) as tab:
        panel = module.widgets(library)
    tab.select(None, js=FIT, queue=False)
    return panel


def _connect(
    demo: gr.Blocks, library: Library, refresh: gr.Button, top: list[Any], panels: list[Panel]
) -> None:
    """Connect the events of the pages with the functions that fill them.

    Args:
        demo: The pages.
        library: The runs.
        refresh: The button that looks for new runs.
        top: The choice of run, the choice of harvest, the message, and the tabs.
        panels: The pages' widgets.
    """
    run, harvest = top[:2]
    # Without `preprocess`, gradio does not compare a value with choices that another event may have
    # changed. `Library.choose` checks the values.
    quick: dict[str, Any] = {
        "queue": False,
        "preprocess": False,
        "show_progress": "hidden",
        "api_visibility": "private",
    }

    def look(wanted_run: Any, wanted_harvest: Any) -> list[Any]:
        return _look(library, wanted_run, wanted_harvest)

    def arrive(wanted_run: Any, wanted_harvest: Any) -> list[Any]:
        values = look(wanted_run, wanted_harvest)
        pages = _pages(library, wanted_run, wanted_harvest)
        return [*values[:-1], pages]

    looked = gr.on([refresh.click, run.input], look, [run, harvest], top, **quick)
    arrived = demo.load(arrive, [run, harvest], top, **quick)
    for panel in panels:
        draw = _draw_chosen(library, panel)
        inputs = [run, harvest, *panel.inputs]
        outputs = list(panel.outputs)
        looked.then(draw, inputs, outputs, **quick)
        arrived.then(draw, inputs, outputs, **quick)
        changes = [control.input for control in inputs[1:]]
        gr.on(changes, draw, inputs, outputs, **quick)


def _draw_chosen(library: Library, panel: Panel) -> Callable[..., Any]:
    """Return a function that draws a panel for the run and harvest that a browser names.

    The names can be a moment older than the last result of `_look`, so they are resolved again.
    """

    def draw(wanted_run: Any, wanted_harvest: Any, *values: Any) -> Any:
        chosen = library.choose(wanted_run, wanted_harvest)
        if chosen is None:
            drawn = [gr.skip()] * len(panel.outputs)
        else:
            run, harvest = chosen
            drawn = panel.draw(run.name, harvest, *values)
        return drawn if len(panel.outputs) > 1 else drawn[0]

    return draw


def _look(library: Library, wanted_run: Any, wanted_harvest: Any) -> list[Any]:
    """Return updates for the choice of run, the choice of harvest, the message, and the tabs."""
    chosen = library.choose(wanted_run, wanted_harvest)
    if chosen is None:
        nothing = gr.update(choices=[], value=None)
        return [nothing, nothing, gr.update(value=EMPTY, visible=True), gr.update(visible=False)]
    run, harvest = chosen
    harvests = harvest_names(run)
    choices = [(_describe(known), known.name) for known in library.runs()]
    return [
        gr.update(choices=choices, value=run.name),
        gr.update(choices=harvests, value=harvest, visible=len(harvests) > 1),
        gr.update(visible=False),
        gr.update(visible=True),
    ]


def _pages(library: Library, wanted_run: Any, wanted_harvest: Any) -> Any:
    """Return the tabs for a new visitor: Tokens is selected if the harvest has no graphs."""
    chosen = library.choose(wanted_run, wanted_harvest)
    if chosen is None:
        return gr.update(visible=False)
    run, harvest = chosen
    try:
        mode = library.store(run.name, harvest).manifest["mode"]
    except BadInput:
        mode = None
    selected = "tokens" if mode in ("nodes", "statistics") else "graph"
    return gr.update(visible=True, selected=selected)


def _describe(run: Run) -> str:
    changed = datetime.fromtimestamp(run.changed)
    return f"{run.name} · {run.state} · {changed:%Y-%m-%d %H:%M}"


def launch(
    path: str | None = None,
    port: int | None = None,
    host: str = "127.0.0.1",
    open_browser: bool = False,
    wait: bool = True,
) -> str:
    """Serve the viewer until it is interrupted, and return its address.

    Args:
        path: A folder of runs, a run, a harvest or a tracker's reference; the default folder of
            runs if None.
        port: The port to listen on; the first free port from 7860 on if None.
        host: The interface to listen on; by default, only this machine can connect.
        open_browser: Whether to open a browser window if there is a display.
        wait: Whether to block; if not, the caller keeps the process alive.

    Raises:
        BadInput: `path` does not exist, or the port is taken.
    """
    listening = serving.listen(host, port)  # first, since building the pages takes seconds
    try:
        return _serve(build(path), path, listening, host, open_browser, wait)
    except BaseException:
        listening.close()
        raise


def serve(
    demo: gr.Blocks,
    path: str | None = None,
    port: int | None = None,
    host: str = "127.0.0.1",
    open_browser: bool = False,
    wait: bool = True,
) -> str:
    """Serve pages that `build` made for `path`; arguments and errors as for `launch`."""
    listening = serving.listen(host, port)
    return _serve(demo, path, listening, host, open_browser, wait)


def _serve(
    demo: gr.Blocks,
    path: str | None,
    listening: socket.socket,
    host: str,
    open_browser: bool,
    wait: bool,
) -> str:
    appearance = {"theme": theme(), "css_paths": [HERE / name for name in STYLES]}
    endpoints = api.build(Library(path))
    app = serving.protected(demo, endpoints, host, appearance)
    return serving.serve(app, listening, host, open_browser, wait)


def theme() -> gr.themes.Base:
    """Return quiet colors and system fonts, so that no page loads anything from the network."""
    return gr.themes.Default(
        primary_hue="blue", neutral_hue="slate", font=FONT, font_mono=MONO
    ).set(
        body_background_fill="white",
        body_background_fill_dark="#0d131e",
        block_border_width="0px",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
    )
