"""The run page: a run's results, loss curves, figures and config."""

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
MOST_LETTERS = 110  # in the names of a grid's columns together


@dataclass(frozen=True)
class Grid:
    """Results named measure/thing, for measures of the same things.

    `measures` holds the values of each measure, in the order of `things`.
    """

    things: list[str]
    measures: dict[str, list[str]]


@dataclass(frozen=True)
class RunPage:
    """A run, ready to draw.

    `facts`, `results` and `harvest` are rows of name and value. `grids` are the results that exist
    for several things, such as sites or kinds of masks. `losses` and each group of `measures` hold
    a frame (step, value) by name. `figures` are PNG files as data URIs, by name. `warning` is not
    empty if frozen graphs of the harvest do not add up.
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
    """Return the page of a run, and of one of its harvests if there is one.

    Raises:
        BadInput: a file cannot be read.
    """
    lines = _lines(run.metrics())
    losses = {name: line for name, line in lines.items() if is_loss(name)}
    others = {name: line for name, line in lines.items() if name not in losses}
    grids, results = gridded(rows(run.summary))
    return RunPage(
        facts=_facts(run),
        harvest=_harvest(store) if store else [],
        grids=grids,
        results=results,
        losses=losses,
        measures=_grouped(others),
        figures={path.stem: _data_uri(path) for path in run.figures},
        config=_config(run),
        warning=gap_warning(store.manifest) if store else "",
    )


def is_loss(name: str) -> bool:
    """Return whether a logged number is one of the training losses, which are logged raw (L7)."""
    if not name.startswith(("train/", "loss")):
        return False
    last_part = name.split("/")[-1]
    return "gradient_norm" not in name and "lr" not in last_part


def gridded(results: list[tuple[str, str]]) -> tuple[list[Grid], list[tuple[str, str]]]:
    """Split results into grids, each of at least two measures of the same things, and the rest."""
    by_measure: dict[str, dict[str, str]] = {}
    for name, value in results:
        measure, _, thing = name.partition("/")
        if thing:
            by_measure.setdefault(measure, {})[thing] = value
    by_things: dict[tuple[str, ...], list[str]] = {}
    for measure, values in by_measure.items():
        by_things.setdefault(tuple(values), []).append(measure)

    grids = []
    inside = set[str]()
    for things, measures in by_things.items():
        if len(things) > 1 and len(measures) > 1:
            values = {measure: list(by_measure[measure].values()) for measure in measures}
            grids.append(Grid(list(things), values))
            inside.update(measures)
    rest = [(name, value) for name, value in results if name.partition("/")[0] not in inside]
    return grids, rest


def rows(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Flatten a nested mapping into rows of name and value.

    Inner names are joined by slashes: {"a": {"b": 1}} gives ("a/b", "1").
    """
    flat = []
    for name, value in values.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat += rows(value, f"{path}/")
        else:
            flat.append((path, _text(value)))
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
    """Return the facts about a harvest."""
    manifest = store.manifest
    names = ("harvest", "mode", "threshold", "checkpoint_digest")
    settings = {name: manifest[name] for name in names if name in manifest}
    counts = {
        "prompts": manifest["prompts"],
        "nodes": manifest["rows"]["nodes"],
        "edges": manifest["rows"]["edges"],
    }
    facts = rows(settings)
    facts += [(name, f"{count:,}") for name, count in counts.items()]
    if "gap" in manifest:
        gap = manifest["gap"]
        text = f"{gap:.2g}" if gap < 0.01 else f"{gap:.0%}"
        facts.append(("largest gap of in-edges", text))
    complete = "yes" if manifest["complete"] else "no, the harvest was interrupted"
    facts.append(("complete", complete))
    return facts


def _lines(metrics: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """Return every numeric column over steps, with at most `MOST_POINTS` points."""
    if "step" not in metrics.columns:
        return {}
    numeric = [name for name, dtype in metrics.schema.items() if dtype.is_numeric()]
    lines = {}
    for name in sorted(numeric):
        if name == "step":
            continue
        value = pl.col(name).cast(pl.Float64)
        line = metrics.select("step", value=value).drop_nulls()
        if len(line):
            stride = -(-len(line) // MOST_POINTS)
            lines[name] = line.gather_every(stride)
    return lines


def _grouped(lines: dict[str, pl.DataFrame]) -> dict[str, dict[str, pl.DataFrame]]:
    """Group lines by their names without the last part, which tells the lines of a group apart."""
    groups: dict[str, dict[str, pl.DataFrame]] = {}
    for name, line in lines.items():
        group, _, last = name.rpartition("/")
        lines_of_group = groups.setdefault(group or name, {})
        lines_of_group[last] = line
    return groups


def _data_uri(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInput(
            f"figure '{path}': cannot be read ({error.strerror}); delete it or make it readable"
        ) from error
    return "data:image/png;base64," + b64encode(content).decode()


def _config(run: Run) -> str:
    path = run.path / "config.yaml"
    if not path.is_file():
        return ""
    return path.read_text(encoding="utf-8", errors="replace")


def widgets(library: Library) -> Panel:
    """Create the page's tables and plots."""
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
            hidden = gr.update(visible=False)
            return [problem(str(error)), hidden, hidden, "", hidden]
        drawn = [gr.update(value=figure, visible=figure is not None) for figure in figures(page)]
        config_file = gr.update(value=page.config, visible=bool(page.config))
        return [_tables(page), *drawn, _gallery(page), config_file]

    return Panel(draw, outputs=[tables, *charts, gallery, config])


def figures(page: RunPage) -> list[Any]:
    """Return the page's plots, each None if it has no data.

    The first plot shows the losses on a log axis; the second shows everything else that was logged,
    in small plots.
    """
    losses = measures = None
    if page.losses:
        losses = plots.curves(page.losses, "Losses")
    if page.measures:
        measures = plots.small_curves(page.measures)
    return [losses, measures]


def _tables(page: RunPage) -> str:
    warning = ""
    if page.warning:
        warning = problem(f"Harvest: {page.warning}")
    grids = "".join(_grid(grid) for grid in page.grids)
    tables = (
        table(page.facts, "Run"),
        table(page.harvest, "Harvest"),
        table(page.results, "Results"),
    )
    return (
        f'{warning}<div class="spd-grids">{grids}</div>'
        f'<div class="spd-tables">{"".join(tables)}</div>'
    )


def _grid(grid: Grid) -> str:
    """Return a grid as an HTML table, with a column for each thing.

    If the names of the things are too long for that, it has a row for each thing.
    """
    if sum(len(thing) for thing in grid.things) <= MOST_LETTERS:
        head = [name_element("th", thing) for thing in grid.things]
        body = [
            f"<tr><th>{escape(measure)}</th>{_cells(values)}</tr>"
            for measure, values in grid.measures.items()
        ]
    else:
        head = [f"<th>{escape(measure)}</th>" for measure in grid.measures]
        by_thing = zip(*grid.measures.values(), strict=True)
        body = [
            f"<tr>{name_element('th', thing, 60)}{_cells(values)}</tr>"
            for thing, values in zip(grid.things, by_thing, strict=True)
        ]
    first_row = f"<tr><th></th>{''.join(head)}</tr>"
    return f'<table class="spd-table">{first_row}{"".join(body)}</table>'


def _cells(values: Iterable[str]) -> str:
    cells = [f"<td>{escape(value)}</td>" for value in values]
    return "".join(cells)


def _gallery(page: RunPage) -> str:
    if not page.figures:
        return ""
    pictures = []
    for name, uri in page.figures.items():
        image = f'<img src="{uri}" alt="{escape(name)}">'
        pictures.append(f"<figure>{image}<figcaption>{escape(name)}</figcaption></figure>")
    title = '<h3 class="spd-title">Figures</h3>'
    return f'{title}<div class="spd-gallery">{"".join(pictures)}</div>'
