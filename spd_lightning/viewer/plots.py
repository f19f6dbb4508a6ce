"""Plotly figures in one quiet style, readable on light and on dark paper."""

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
    """A matrix as colors: from nothing to blue, or where signed from orange over nothing to blue,
    symmetric about 0.

    Args:
        values: The matrix.
        rows: The rows' names, from the top.
        components: The components' names, one a column.
        title: What the matrix is.
        entry: What one entry is called.
        left: Width of the margin for the rows' names, in pixels.
        signed: Whether negative values are expected.
    """
    rows = [escape(name, quote=False) for name in rows]  # plotly reads markup
    largest = float(np.abs(values).max(initial=0)) or 1.0
    scale = (
        {"zmin": -largest, "zmax": largest} if signed else {"zmin": 0, "zmax": max(1.0, largest)}
    )
    gap = 1 if max(values.shape) <= 120 else 0
    label = (
        f"%{{customdata[0]}}<br>component %{{customdata[1]}}<br>{entry} %{{z:.4g}}<extra></extra>"
    )
    bar = {
        "thickness": 8,
        "outlinewidth": 0,
        "x": 1.01,
        "xpad": 4,
        "nticks": 5,
        "tickfont": {"size": 11},
    }
    colors = DIVERGING if signed else SEQUENTIAL
    style = {
        "colorscale": colors,
        "colorbar": bar,
        "xgap": gap,
        "ygap": gap,
        "hovertemplate": label,
    }
    figure = go.Figure(go.Heatmap(z=values, customdata=_names(rows, components), **style, **scale))
    _quiet(figure, 100 + int(np.clip(24 * len(rows), 60, 420)))
    figure.update_layout(title=_title(title), margin={"l": left, "r": 84})
    figure.update_xaxes(title="component", **_ticks(components))
    return figure.update_yaxes(autorange="reversed", automargin=False, **_ticks(rows))


def _names(rows: Sequence[str], columns: Sequence[str]) -> np.ndarray:
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1)


def _ticks(names: Sequence[str], most: int = 40) -> dict[str, Any]:
    places = list(range(0, len(names), -(-len(names) // most) or 1))
    return {
        "tickvals": places,
        "ticktext": [names[i] for i in places],
        "showgrid": False,
        "ticks": "",
    }


def ranked_bars(summary: pl.DataFrame) -> go.Figure:
    """Activation density and mean importance (linear, logarithmic) of a site's components, each
    sorted by its size.
    """
    titles = ["Activation density", "Mean importance", "Mean importance on a log axis"]
    figure = make_subplots(rows=1, cols=3, subplot_titles=titles, horizontal_spacing=0.06)
    for place, column in enumerate(["density", "mean_importance", "mean_importance"], 1):
        ranked = summary.sort(column, "component", descending=[True, False])
        colors = [PLUS if alive else QUIET for alive in ranked["alive"]]
        label = "component %{customdata}<br>%{y:.4g}<extra></extra>"
        style = {
            "customdata": ranked["component"],
            "marker": {"color": colors},
            "hovertemplate": label,
        }
        dots = place == 3  # a bar has no length on a log axis
        trace = (
            go.Scatter(y=ranked[column], mode="markers", **style)
            if dots
            else go.Bar(y=ranked[column], **style)
        )
        figure.add_trace(trace, row=1, col=place)
    figure.update_xaxes(title="rank", showgrid=False)
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(type="log", exponentformat="power", rangemode="normal", row=1, col=3)
    return _quiet(figure, 260)


def curves(lines: Mapping[str, pl.DataFrame], title: str) -> go.Figure:
    """Values over training steps on a log axis, one line a name; what is not positive is left out.

    Args:
        lines: By name, a frame with columns step and value.
        title: What they are.
    """
    figure = go.Figure([_line(name, line, n) for n, (name, line) in enumerate(lines.items())])
    _quiet(figure, 320)
    legend = {"x": 1.01, "xanchor": "left", "y": 1, "font": {"size": 12}}
    figure.update_layout(title=_title(title), showlegend=True, legend=legend)
    figure.update_xaxes(title="step", showgrid=False)
    return figure.update_yaxes(
        type="log", exponentformat="power", dtick=max(1, round(_decades(lines) / 7))
    )


def small_curves(groups: Mapping[str, Mapping[str, pl.DataFrame]], across: int = 4) -> go.Figure:
    """Groups of lines over training steps, a small plot each; a plot's title names its lines in
    their colors.

    A group whose positive values span more than two powers of ten gets a log axis.

    Args:
        groups: By title and name, a frame with columns step and value.
        across: How many plots stand in a row.
    """
    down = -(-len(groups) // across)
    titles = [_colored(title, list(lines)) for title, lines in groups.items()]
    figure = make_subplots(
        down, across, subplot_titles=titles, horizontal_spacing=0.05, vertical_spacing=0.3 / down
    )
    for place, lines in enumerate(groups.values()):
        row = place // across + 1
        col = place % across + 1
        for n, (name, line) in enumerate(lines.items()):
            figure.add_trace(_line(name, line, n), row, col)
        if (decades := _decades(lines)) > 2 and not any(
            (line["value"] < 0).any() for line in lines.values()
        ):
            figure.update_yaxes(type="log", dtick=max(1, round(decades / 4)), row=row, col=col)
    _quiet(figure, 190 * down + 40)
    figure.update_yaxes(exponentformat="power")
    figure.update_xaxes(showgrid=False)
    return figure.update_annotations(font={"size": 12.5})


def _line(name: str, line: pl.DataFrame, number: int) -> go.Scatter:
    style = {"color": SERIES[number % len(SERIES)], "width": 1.6}
    label = f"{name}<br>step %{{x}}<br>%{{y:.4g}}<extra></extra>"
    mode = "lines" if len(line) > 20 else "lines+markers"
    marks = {"size": 4}
    return go.Scatter(
        x=line["step"],
        y=line["value"],
        name=shortened(name, 48),
        line=style,
        marker=marks,
        mode=mode,
        hovertemplate=label,
    )


def _decades(lines: Mapping[str, pl.DataFrame]) -> float:
    """How many powers of ten the positive values span."""
    values = np.concatenate([line["value"].to_numpy() for line in lines.values()])
    positive = values[np.isfinite(values) & (values > 0)]
    return float(np.log10(positive.max() / positive.min())) if positive.size else 0.0


def _colored(title: str, names: list[str], room: int = 34) -> str:
    """A title with the names of its lines in their colors, as many as there is room for."""
    if names == [title]:
        return title
    ends = list(accumulate(len(name) + 1 for name in names))
    shown = [
        name for name, end in zip(names, ends, strict=True) if len(title) + end <= room
    ] or names[:1]
    words = [
        f'<span style="color:{SERIES[n % len(SERIES)]}">{shortened(name, room)}</span>'
        for n, name in enumerate(shown)
    ]
    return " ".join([title, *words, *(["…"] if len(shown) < len(names) else [])])


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


def _quiet(figure: go.Figure, height: int) -> go.Figure:
    font = {"family": "system-ui, sans-serif", "size": 12, "color": QUIET}
    clear = "rgba(0,0,0,0)"
    figure.update_layout(
        template="none", font=font, paper_bgcolor=clear, plot_bgcolor=clear, showlegend=False
    )
    figure.update_layout(height=height, margin={"l": 60, "r": 20, "t": 34, "b": 44}, bargap=0.25)
    figure.update_annotations(font={"size": 14.5})
    figure.update_xaxes(zeroline=False, linecolor=GRID, automargin=True, title_standoff=8)
    return figure.update_yaxes(zeroline=False, gridcolor=GRID, automargin=True, title_standoff=8)
