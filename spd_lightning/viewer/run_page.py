"""The run page: what a run reached, how its losses fell, its figures and its config."""

from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import polars as pl

from spd_lightning.errors import BadInput
from spd_lightning.runs import Run
from spd_lightning.store import Store
from spd_lightning.viewer import plots
from spd_lightning.viewer.library import Library
from spd_lightning.viewer.panel import Panel, problem, table

MOST_POINTS = 2000


@dataclass(frozen=True)
class RunPage:
    """A run, ready to draw.

    `facts`, `results` and `harvest` are (name, value) rows; `losses` and `measures` hold a frame (step, value) by
    name; `figures` are PNG files as data URIs by name.
    """

    facts: list[tuple[str, str]]
    results: list[tuple[str, str]]
    harvest: list[tuple[str, str]]
    losses: dict[str, pl.DataFrame]
    measures: dict[str, pl.DataFrame]
    figures: dict[str, str]
    config: str


def page_data(run: Run, store: Store | None) -> RunPage:
    """The page of a run, and of one of its harvests where it has any.

    Raises:
        BadInput: a file cannot be read.
    """
    lines = _lines(run.metrics())
    losses = {name: line for name, line in lines.items() if "loss" in name}
    return RunPage(
        facts=_facts(run),
        results=rows(run.summary),
        harvest=_harvest(store) if store else [],
        losses=losses,
        measures={name: line for name, line in lines.items() if name not in losses},
        figures={path.stem: _data_uri(path) for path in run.figures},
        config=_config(run),
    )


def rows(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as (name, value) rows, inner names joined by slashes: {"a": {"b": 1}} gives ("a/b", "1")."""
    flat = []
    for name, value in values.items():
        inner = isinstance(value, Mapping)
        flat += rows(value, f"{prefix}{name}/") if inner else [(f"{prefix}{name}", _text(value))]
    return flat


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}".replace("-", "−")
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return str(value)


def _facts(run: Run) -> list[tuple[str, str]]:
    written = datetime.fromtimestamp(run.changed).strftime("%Y-%m-%d %H:%M")
    return [("run", run.name), ("state", run.state), ("last written", written), ("folder", str(run.path))]


def _harvest(store: Store) -> list[tuple[str, str]]:
    manifest = store.manifest
    named = {name: manifest[name] for name in ("harvest", "mode", "threshold", "checkpoint_digest") if name in manifest}
    counts = {"prompts": manifest["prompts"], "nodes": manifest["rows"]["nodes"], "edges": manifest["rows"]["edges"]}
    counted = [(name, f"{count:,}") for name, count in counts.items()]
    return rows(named) + counted + [("complete", "yes" if manifest["complete"] else "no, harvesting was cut short")]


def _lines(metrics: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """Every numeric column over steps, thinned to what a plot can show."""
    if "step" not in metrics.columns:
        return {}
    numeric = [name for name, dtype in metrics.schema.items() if dtype.is_numeric() and name != "step"]
    lines = {name: metrics.select("step", value=pl.col(name).cast(pl.Float64)).drop_nulls() for name in sorted(numeric)}
    return {name: line.gather_every(-(-len(line) // MOST_POINTS)) for name, line in lines.items() if len(line)}


def _data_uri(path: Path) -> str:
    try:
        return "data:image/png;base64," + b64encode(path.read_bytes()).decode()
    except OSError as error:
        raise BadInput(f"figure '{path}': cannot be read ({error.strerror}); delete it or mend its rights") from error


def _config(run: Run) -> str:
    path = run.path / "config.yaml"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def widgets(library: Library) -> Panel:
    """The page's tables and plots."""
    import gradio as gr

    tables = gr.HTML(apply_default_css=False)
    charts = [gr.Plot(label=name, container=False, show_label=False) for name in ("losses", "measures")]
    gallery = gr.HTML(apply_default_css=False)
    config = gr.Code(label="config.yaml", language="yaml", interactive=False, max_lines=40)

    def draw(run: str, harvest: str | None) -> list[Any]:
        try:
            store = library.store(run, harvest) if harvest is not None else None
            page = page_data(library.run(run), store)
        except BadInput as error:
            return [problem(str(error)), *[gr.update(visible=False)] * 2, "", gr.update(visible=False)]
        drawn = [gr.update(value=figure, visible=figure is not None) for figure in figures(page)]
        return [_tables(page), *drawn, _gallery(page), gr.update(value=page.config, visible=bool(page.config))]

    return Panel(draw, outputs=[tables, *charts, gallery, config])


def figures(page: RunPage) -> list[Any]:
    """The page's plots: losses on a log axis, all else that was logged on a linear one; None where there is nothing."""
    losses = plots.curves(page.losses, "Losses", log=True) if page.losses else None
    return [losses, plots.curves(page.measures, "Measures", log=False) if page.measures else None]


def _tables(page: RunPage) -> str:
    sections = {"Run": page.facts, "Reached": page.results, "Harvest": page.harvest}
    return f'<div class="spd-tables">{"".join(table(rows, title) for title, rows in sections.items())}</div>'


def _gallery(page: RunPage) -> str:
    if not page.figures:
        return ""
    pictures = (
        f'<figure><img src="{uri}" alt="{escape(name)}"><figcaption>{escape(name)}</figcaption></figure>'
        for name, uri in page.figures.items()
    )
    return f'<h3 class="spd-title">Figures</h3><div class="spd-gallery">{"".join(pictures)}</div>'
