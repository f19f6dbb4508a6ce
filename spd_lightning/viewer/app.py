"""The viewer: `gradio app.py`, or `python -m spd_lightning view`. It shows what runs left on disk
and changes nothing.

It listens on this machine alone unless told otherwise, sends no analytics, and opens only what lies
below the place it was given: a browser names runs, harvests and prompts, never paths.
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
from spd_lightning.viewer import component_page, graph_page, run_page, serving, token_page
from spd_lightning.viewer.library import Library, harvest_names
from spd_lightning.viewer.panel import Panel

HERE = Path(__file__).parent
TITLE = '<h1 class="spd-brand">spd_lightning</h1>'
PAGES = {"Graph": graph_page, "Tokens": token_page, "Components": component_page, "Run": run_page}
STYLES = ("widget.css", "graph.css", "tokens.css", "page.css")
EMPTY = (HERE / "empty.html").read_text(encoding="utf-8")
# Plots that were drawn while their page was hidden have the wrong size until the window is resized.
FIT = "() => { setTimeout(() => window.dispatchEvent(new Event('resize')), 60); }"
FONT = ["ui-sans-serif", "system-ui", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]


def build(path: str | None = None) -> gr.Blocks:
    """The pages, for the runs below `path` (see `Library`); `serve` serves them.

    Raises:
        BadInput: there is nothing at `path`.
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
            panels = [_page(name, module, library) for name, module in PAGES.items()]
        _wire(demo, library, refresh, [run, harvest, message, pages], panels)
    return demo


def _page(name: str, module: Any, library: Library) -> Panel:
    with gr.Tab(name, id=name.lower()) as tab:
        panel = module.widgets(library)
    tab.select(None, js=FIT, queue=False)
    return panel


def _wire(
    demo: gr.Blocks, library: Library, refresh: gr.Button, top: list[Any], panels: list[Panel]
) -> None:
    run, harvest = top[:2]
    # Without preprocess, gradio compares no value with choices that another event may have changed;
    # `choose` does it.
    quick: dict[str, Any] = {
        "queue": False,
        "preprocess": False,
        "show_progress": "hidden",
        "api_visibility": "private",
    }

    def look(wanted_run: Any, wanted_harvest: Any) -> list[Any]:
        return _look(library, wanted_run, wanted_harvest)

    def arrive(wanted_run: Any, wanted_harvest: Any) -> list[Any]:
        return [*look(wanted_run, wanted_harvest)[:-1], _pages(library, wanted_run, wanted_harvest)]

    looked = gr.on([refresh.click, run.input], look, [run, harvest], top, **quick)
    arrived = demo.load(arrive, [run, harvest], top, **quick)
    for panel in panels:
        draw = _chosen(library, panel)
        inputs = [run, harvest, *panel.inputs]
        outputs = list(panel.outputs)
        looked.then(draw, inputs, outputs, **quick)
        arrived.then(draw, inputs, outputs, **quick)
        gr.on([control.input for control in inputs[1:]], draw, inputs, outputs, **quick)


def _chosen(library: Library, panel: Panel) -> Callable[..., Any]:
    """The panel's `draw` on what a browser's wishes mean; they may be a moment older than what
    `_look` answered.
    """

    def draw(wanted_run: Any, wanted_harvest: Any, *values: Any) -> Any:
        chosen = library.choose(wanted_run, wanted_harvest)
        drawn = (
            panel.draw(chosen[0].name, chosen[1], *values)
            if chosen
            else [gr.skip()] * len(panel.outputs)
        )
        return drawn if len(panel.outputs) > 1 else drawn[0]

    return draw


def _look(library: Library, wanted_run: Any, wanted_harvest: Any) -> list[Any]:
    """The choice of run, the choice of harvest, a message, the pages."""
    chosen = library.choose(wanted_run, wanted_harvest)
    if chosen is None:
        nothing = gr.update(choices=[], value=None)
        return [nothing, nothing, gr.update(value=EMPTY, visible=True), gr.update(visible=False)]
    run, harvest = chosen
    harvests = harvest_names(run)
    return [
        gr.update(
            choices=[(_describe(held), held.name) for held in library.runs()], value=run.name
        ),
        gr.update(choices=harvests, value=harvest, visible=len(harvests) > 1),
        gr.update(visible=False),
        gr.update(visible=True),
    ]


def _pages(library: Library, wanted_run: Any, wanted_harvest: Any) -> Any:
    """The pages for one who arrives: where there are no graphs to see, the tokens are in front."""
    chosen = library.choose(wanted_run, wanted_harvest)
    if chosen is None:
        return gr.update(visible=False)
    try:
        bare = library.store(chosen[0].name, chosen[1]).manifest["mode"] == "nodes"
    except BadInput:
        bare = False
    return gr.update(visible=True, selected="tokens" if bare else "graph")


def _describe(run: Run) -> str:
    return f"{run.name} · {run.state} · {datetime.fromtimestamp(run.changed):%Y-%m-%d %H:%M}"


def launch(
    path: str | None = None,
    port: int | None = None,
    host: str = "127.0.0.1",
    open_browser: bool = False,
    wait: bool = True,
) -> str:
    """Serve the viewer until it is interrupted, and return its address.

    Args:
        path: A folder of runs, a run, a harvest or a tracker's reference; the usual root of runs if
            None.
        port: Where to listen; the first free port from 7860 on if None.
        host: Which interface to listen on: this machine alone by default.
        open_browser: Whether to open a browser window, where there is a display.
        wait: Whether to block; without it the caller keeps the process alive.

    Raises:
        BadInput: there is nothing at `path`, or the port is taken.
    """
    listening = serving.listen(host, port)  # before the pages are built, which takes seconds
    try:
        return _serve(build(path), listening, host, open_browser, wait)
    except BaseException:
        listening.close()
        raise


def serve(
    demo: gr.Blocks,
    port: int | None = None,
    host: str = "127.0.0.1",
    open_browser: bool = False,
    wait: bool = True,
) -> str:
    """Serve pages that `build` made; arguments and errors as for `launch`."""
    return _serve(demo, serving.listen(host, port), host, open_browser, wait)


def _serve(
    demo: gr.Blocks, listening: socket.socket, host: str, open_browser: bool, wait: bool
) -> str:
    appearance = {"theme": theme(), "css_paths": [HERE / name for name in STYLES]}
    return serving.serve(
        serving.protected(demo, host, appearance), listening, host, open_browser, wait
    )


def theme() -> gr.themes.Base:
    """Quiet colors and the system's own fonts, so that no page asks the network for anything."""
    return gr.themes.Default(
        primary_hue="blue", neutral_hue="slate", font=FONT, font_mono=MONO
    ).set(
        body_background_fill="white",
        body_background_fill_dark="#0d131e",
        block_border_width="0px",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
    )
