"""The run page: what a run reached, how its losses fell, its figures and its config."""

from base64 import b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import polars as pl

from spd_lightning.errors import BadInput
from spd_lightning.runs import Run
from spd_lightning.store import Store, gap_warning
from spd_lightning.viewer import plots
from spd_lightning.viewer.library import Library
from spd_lightning.viewer.panel import Panel, name_element, problem, table

MOST_POINTS = 2000
MOST_LETTERS = 110  # of the names of a grid's columns


@dataclass(frozen=True)
class Grid:
    """Results named measure/thing, of measures that tell of the same things: the values of each
    measure, by thing.
    """

    things: list[str]
    measures: dict[str, list[str]]


@dataclass(frozen=True)
class RunPage:
    """A run, ready to draw.

    `facts`, `results` and `harvest` are (name, value) rows; `grids` are the results that several
    things share, such as sites or kinds of masks. `losses` and each group of `measures` hold a
    frame (step, value) by name; `figures` are PNG files as data URIs by name. `warning` says that
    frozen graphs of the harvest do not add up.
    """

    facts: list[tuple[str, str]]
    harvest: list[tuple[str, str]]
    grids: list[Grid]
    results: list[tuple[str, str]]
    losses: dict[str, pl.DataFrame]
    measures: dict[str, dict[str, pl.DataFrame]]
    figures: dict[str, str]
    config: str
    warning: str = ""


def page_data(run: Run, store: Store | None) -> RunPage:
    """The page of a run, and of one of its harvests where it has any.

    Raises:
        BadInput: a file cannot be read.
    """
    lines = _lines(run.metrics())
    losses = {name: line for name, line in lines.items() if is_loss(name)}
    grids, results = gridded(rows(run.summary))
    return RunPage(
        facts=_facts(run),
        harvest=_harvest(store) if store else [],
        grids=grids,
        results=results,
        losses=losses,
        measures=_grouped({name: line for name, line in lines.items() if name not in losses}),
        figures={path.stem: _data_uri(path) for path in run.figures},
        config=_config(run),
        warning=gap_warning(store.manifest) if store else "",
    )


def is_loss(name: str) -> bool:
    """Whether a logged number is one of the losses that training follows (L7: each is logged
    raw).
    """
    return name.startswith(("train/", "loss")) and not (
        "gradient_norm" in name or "lr" in name.split("/")[-1]
    )


def gridded(results: list[tuple[str, str]]) -> tuple[list[Grid], list[tuple[str, str]]]:
    """Split results into grids, of two measures or more that tell of the same things, and the
    rest.
    """
    told: dict[str, dict[str, str]] = {}
    for name, value in results:
        measure, _, thing = name.partition("/")
        if thing:
            told.setdefault(measure, {})[thing] = value
    alike: dict[tuple[str, ...], list[str]] = {}
    for measure, values in told.items():
        alike.setdefault(tuple(values), []).append(measure)
    shared = {
        things: measures
        for things, measures in alike.items()
        if len(things) > 1 and len(measures) > 1
    }
    grids = [
        Grid(list(things), {m: list(told[m].values()) for m in ms}) for things, ms in shared.items()
    ]
    inside = {measure for measures in shared.values() for measure in measures}
    return grids, [(name, value) for name, value in results if name.partition("/")[0] not in inside]


def rows(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as (name, value) rows, inner names joined by slashes: {"a": {"b": 1}} gives
    ("a/b", "1").
    """
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
    return [
        ("run", run.name),
        ("state", run.state),
        ("last written", written),
        ("folder", str(run.path)),
    ]


def _harvest(store: Store) -> list[tuple[str, str]]:
    manifest = store.manifest
    named = {
        name: manifest[name]
        for name in ("harvest", "mode", "threshold", "checkpoint_digest")
        if name in manifest
    }
    counts = {
        "prompts": manifest["prompts"],
        "nodes": manifest["rows"]["nodes"],
        "edges": manifest["rows"]["edges"],
    }
    counted = [(name, f"{count:,}") for name, count in counts.items()]
    if "gap" in manifest:
        counted.append(
            (
                "largest gap of in-edges",
                f"{manifest['gap']:.2g}" if manifest["gap"] < 0.01 else f"{manifest['gap']:.0%}",
            )
        )
    return (
        rows(named)
        + counted
        + [("complete", "yes" if manifest["complete"] else "no, harvesting was cut short")]
    )


def _lines(metrics: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """Every numeric column over steps, thinned to what a plot can show."""
    if "step" not in metrics.columns:
        return {}
    numeric = [
        name for name, dtype in metrics.schema.items() if dtype.is_numeric() and name != "step"
    ]
    lines = {
        name: metrics.select("step", value=pl.col(name).cast(pl.Float64)).drop_nulls()
        for name in sorted(numeric)
    }
    return {
        name: line.gather_every(-(-len(line) // MOST_POINTS))
        for name, line in lines.items()
        if len(line)
    }


def _grouped(lines: dict[str, pl.DataFrame]) -> dict[str, dict[str, pl.DataFrame]]:
    """Lines by all of their name but its last word; the last word tells them apart."""
    groups: dict[str, dict[str, pl.DataFrame]] = {}
    for name, line in lines.items():
        group, _, last = name.rpartition("/")
        groups.setdefault(group or name, {})[last] = line
    return groups


def _data_uri(path: Path) -> str:
    try:
        return "data:image/png;base64," + b64encode(path.read_bytes()).decode()
    except OSError as error:
        raise BadInput(
            f"figure '{path}': cannot be read ({error.strerror}); delete it or mend its rights"
        ) from error


def _config(run: Run) -> str:
    path = run.path / "config.yaml"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def widgets(library: Library) -> Panel:
    """The page's tables and plots."""
    import gradio as gr

    tables = gr.HTML(apply_default_css=False)
    charts = [
        gr.Plot(label=name, container=False, show_label=False) for name in ("losses", "measures")
    ]
    gallery = gr.HTML(apply_default_css=False)
    config = gr.Code(label="config.yaml", language="yaml", interactive=False, max_lines=40)

    def draw(run: str, harvest: str | None) -> list[Any]:
        try:
            store = library.store(run, harvest) if harvest is not None else None
            page = page_data(library.run(run), store)
        except BadInput as error:
            return [
                problem(str(error)),
                *[gr.update(visible=False)] * 2,
                "",
                gr.update(visible=False),
            ]
        drawn = [gr.update(value=figure, visible=figure is not None) for figure in figures(page)]
        return [
            _tables(page),
            *drawn,
            _gallery(page),
            gr.update(value=page.config, visible=bool(page.config)),
        ]

    return Panel(draw, outputs=[tables, *charts, gallery, config])


def figures(page: RunPage) -> list[Any]:
    """The page's plots: losses on a log axis, and all else that was logged in small; None where
    there is nothing.
    """
    losses = plots.curves(page.losses, "Losses") if page.losses else None
    return [losses, plots.small_curves(page.measures) if page.measures else None]


def _tables(page: RunPage) -> str:
    lists = (
        table(page.facts, "Run") + table(page.harvest, "Harvest") + table(page.results, "Results")
    )
    warning = problem(f"Harvest: {page.warning}") if page.warning else ""
    grids = f'<div class="spd-grids">{"".join(map(_grid, page.grids))}</div>'
    return f'{warning}{grids}<div class="spd-tables">{lists}</div>'


def _grid(grid: Grid) -> str:
    """One grid; things whose names would not fit side by side stand below each other."""
    if sum(map(len, grid.things)) > MOST_LETTERS:
        head = "".join(f"<th>{escape(measure)}</th>" for measure in grid.measures)
        by_thing = zip(*grid.measures.values(), strict=True)
        rows = [
            f"<tr>{name_element('th', thing, 60)}{_cells(values)}</tr>"
            for thing, values in zip(grid.things, by_thing, strict=True)
        ]
        body = "".join(rows)
        return f'<table class="spd-table"><tr><th></th>{head}</tr>{body}</table>'
    head = "".join(name_element("th", thing) for thing in grid.things)
    body = "".join(
        f"<tr><th>{escape(measure)}</th>{_cells(values)}</tr>"
        for measure, values in grid.measures.items()
    )
    return f'<table class="spd-table"><tr><th></th>{head}</tr>{body}</table>'


def _cells(values: Iterable[str]) -> str:
    return "".join(f"<td>{escape(value)}</td>" for value in values)


def _gallery(page: RunPage) -> str:
    if not page.figures:
        return ""
    pictures = (
        f'<figure><img src="{uri}" '
        f'alt="{escape(name)}"><figcaption>{escape(name)}</figcaption></figure>'
        for name, uri in page.figures.items()
    )
    return f'<h3 class="spd-title">Figures</h3><div class="spd-gallery">{"".join(pictures)}</div>'
