"""Plotly figures in one quiet style, readable on light and dark backgrounds."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import accumulate
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl
from jaxtyping import Float
from plotly.subplots import make_subplots

from spd_lightning.viewer.panel import shortened

PLUS, MINUS, QUIET = "#3a7ebf", "#d2693c", "#8592a6"
GRID, EMPTY = "rgba(133,146,166,0.22)", "rgba(133,146,166,0.10)"
SEQUENTIAL = [[0, EMPTY], [0.02, "rgba(58,126,191,0.16)"], [1, "rgba(35,103,168,1)"]]
DIVERGING = [[0, "rgba(194,81,42,1)"], [0.5, EMPTY], [1, "rgba(35,103,168,1)"]]
SERIES = [PLUS, MINUS, "#4f9d7a", "#9a6fb0", "#c79a2b", "#5aa9b8", "#b0637d", "#7f8c4f"]


def heat_map(
    values: Float[np.ndarray, "row component"],
    rows: Sequence[str],
    components: Sequence[str],
    *,
    title: str,
    entry: str,
    left: int,
    signed: bool = False,
) -> go.Figure:
    """Draw a matrix as colors.

    The scale goes from transparent (0) to blue. If `signed`, it is symmetric about 0 and goes from
    orange over transparent to blue.

    Args:
        values: The matrix.
        rows: The names of the rows, from the top.
        components: The names of the components, one per column.
        title: The title of the plot.
        entry: The name of one entry, for the hover text.
        left: Width of the margin for the names of the rows, in pixels.
        signed: Whether negative values are expected.
    """
    rows = [escape(name, quote=False) for name in rows]  # plotly interprets markup
    largest = float(np.abs(values).max(initial=0)) or 1.0
    gap = 1 if max(values.shape) <= 120 else 0
    place = "%{customdata[0]}<br>component %{customdata[1]}"
    heat = go.Heatmap(
        z=values,
        customdata=_names(rows, components),
        zmin=-largest if signed else 0,
        zmax=largest if signed else max(1.0, largest),
        colorscale=DIVERGING if signed else SEQUENTIAL,
        colorbar={
            "thickness": 8,
            "outlinewidth": 0,
            "x": 1.01,
            "xpad": 4,
            "nticks": 5,
            "tickfont": {"size": 11},
        },
        xgap=gap,
        ygap=gap,
        hovertemplate=f"{place}<br>{entry} %{{z:.4g}}<extra></extra>",
    )
    figure = go.Figure(heat)
    matrix_height = int(np.clip(24 * len(rows), 60, 420))
    _style(figure, 100 + matrix_height)
    figure.update_layout(title=_title(title), margin={"l": left, "r": 84})
    figure.update_xaxes(title="component", **_ticks(components))
    return figure.update_yaxes(autorange="reversed", automargin=False, **_ticks(rows))


def _names(rows: Sequence[str], columns: Sequence[str]) -> np.ndarray:
    """Return the names of each entry's row and column, [row, column, 2]."""
    names = np.meshgrid(rows, columns, indexing="ij")
    return np.stack(names, axis=-1)


def _ticks(names: Sequence[str], most: int = 40) -> dict[str, Any]:
    """Return axis settings that show every n-th name, so that at most `most` are shown."""
    step = -(-len(names) // most) or 1
    places = list(range(0, len(names), step))
    return {
        "tickvals": places,
        "ticktext": [names[i] for i in places],
        "showgrid": False,
        "ticks": "",
    }


def ranked_bars(summary: pl.DataFrame) -> go.Figure:
    """Plot activation density and mean importance of a site's components, each sorted by size.

    The mean importance is shown on a linear and on a logarithmic axis.
    """
    titles = ["Activation density", "Mean importance", "Mean importance on a log axis"]
    figure = make_subplots(rows=1, cols=3, subplot_titles=titles, horizontal_spacing=0.06)
    for place, column in enumerate(["density", "mean_importance", "mean_importance"], 1):
        ranked = summary.sort(column, "component", descending=[True, False])
        colors = [PLUS if alive else QUIET for alive in ranked["alive"]]
        style = {
            "y": ranked[column],
            "customdata": ranked["component"],
            "marker": {"color": colors},
            "hovertemplate": "component %{customdata}<br>%{y:.4g}<extra></extra>",
        }
        is_log = place == 3  # a bar has no length on a log axis
        trace = go.Scatter(mode="markers", **style) if is_log else go.Bar(**style)
        figure.add_trace(trace, row=1, col=place)
    figure.update_xaxes(title="rank", showgrid=False)
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(type="log", exponentformat="power", rangemode="normal", row=1, col=3)
    return _style(figure, 260)


def curves(lines: Mapping[str, pl.DataFrame], title: str) -> go.Figure:
    """Plot values over training steps on a log axis; values that are not positive are left out.

    Args:
        lines: By name, a frame with columns step and value.
        title: The title of the plot.
    """
    figure = go.Figure(_lines(lines))
    _style(figure, 320)
    legend = {"x": 1.01, "xanchor": "left", "y": 1, "font": {"size": 12}}
    figure.update_layout(title=_title(title), showlegend=True, legend=legend)
    figure.update_xaxes(title="step", showgrid=False)
    return figure.update_yaxes(
        type="log", exponentformat="power", dtick=_decades_per_tick(lines, ticks=7)
    )


def small_curves(groups: Mapping[str, Mapping[str, pl.DataFrame]], across: int = 4) -> go.Figure:
    """Plot groups of lines over training steps, each group in a small plot.

    The title of a plot contains the names of its lines in their colors. A group whose positive
    values span more than two powers of ten gets a log axis.

    Args:
        groups: By title and name, a frame with columns step and value.
        across: The number of plots in a row.
    """
    down = -(-len(groups) // across)
    figure = make_subplots(
        down,
        across,
        subplot_titles=[_colored(title, list(lines)) for title, lines in groups.items()],
        horizontal_spacing=0.05,
        vertical_spacing=0.3 / down,
    )
    for place, lines in enumerate(groups.values()):
        row = place // across + 1
        col = place % across + 1
        for line in _lines(lines):
            figure.add_trace(line, row, col)
        if _needs_log_axis(lines):
            dtick = _decades_per_tick(lines, ticks=4)
            figure.update_yaxes(type="log", dtick=dtick, row=row, col=col)
    _style(figure, 190 * down + 40)
    figure.update_yaxes(exponentformat="power")
    figure.update_xaxes(showgrid=False)
    return figure.update_annotations(font={"size": 12.5})


def _needs_log_axis(lines: Mapping[str, pl.DataFrame]) -> bool:
    """Return whether no value is negative and the values span more than two powers of ten."""
    if _decades(lines) <= 2:
        return False
    return not any((line["value"] < 0).any() for line in lines.values())


def _lines(frames: Mapping[str, pl.DataFrame]) -> list[go.Scatter]:
    """Draw each frame as a line, in different colors."""
    numbered = enumerate(frames.items())
    return [_line(name, frame, number) for number, (name, frame) in numbered]


def _line(name: str, line: pl.DataFrame, number: int) -> go.Scatter:
    return go.Scatter(
        x=line["step"],
        y=line["value"],
        name=shortened(name, 48),
        line={"color": _series_color(number), "width": 1.6},
        marker={"size": 4},
        mode="lines" if len(line) > 20 else "lines+markers",
        hovertemplate=f"{name}<br>step %{{x}}<br>%{{y:.4g}}<extra></extra>",
    )


def _series_color(number: int) -> str:
    return SERIES[number % len(SERIES)]


def _decades_per_tick(lines: Mapping[str, pl.DataFrame], ticks: int) -> int:
    """Return the distance of ticks on a log axis, in powers of ten, for about this many ticks."""
    return max(1, round(_decades(lines) / ticks))


def _decades(lines: Mapping[str, pl.DataFrame]) -> float:
    """Return how many powers of ten the positive values span."""
    values = np.concatenate([line["value"].to_numpy() for line in lines.values()])
    positive = values[np.isfinite(values) & (values > 0)]
    if not positive.size:
        return 0.0
    ratio = positive.max() / positive.min()
    return float(np.log10(ratio))


def _colored(title: str, names: list[str], room: int = 34) -> str:
    """Return a title with the names of its lines in their colors, as many as fit."""
    if names == [title]:
        return title
    ends = list(accumulate(len(name) + 1 for name in names))
    fitting = sum(len(title) + end <= room for end in ends)
    count = max(1, fitting)
    words = [title]
    for number, name in enumerate(names[:count]):
        color = _series_color(number)
        words.append(f'<span style="color:{color}">{shortened(name, room)}</span>')
    if count < len(names):
        words.append("…")
    return " ".join(words)


def _title(text: str) -> dict[str, Any]:
    place = {
        "x": 0,
        "xanchor": "left",
        "xref": "paper",
        "y": 1,
        "yref": "container",
        "pad": {"t": 12},
    }
    return {"text": text, "font": {"size": 14.5}, **place}


def _style(figure: go.Figure, height: int) -> go.Figure:
    """Apply the common style to a figure."""
    transparent = "rgba(0,0,0,0)"
    figure.update_layout(
        template="none",
        font={"family": "system-ui, sans-serif", "size": 12, "color": QUIET},
        paper_bgcolor=transparent,
        plot_bgcolor=transparent,
        showlegend=False,
        height=height,
        margin={"l": 60, "r": 20, "t": 34, "b": 44},
        bargap=0.25,
    )
    figure.update_annotations(font={"size": 14.5})
    axis = {"zeroline": False, "automargin": True, "title_standoff": 8}
    figure.update_xaxes(linecolor=GRID, **axis)
    return figure.update_yaxes(gridcolor=GRID, **axis)
