"""Plotly figures in one quiet style, readable on light and on dark paper."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl
from jaxtyping import Float
from plotly.subplots import make_subplots

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
    """A matrix as colours: from nothing to blue, or where signed from orange over nothing to blue, symmetric about 0.

    Args:
        values: The matrix.
        rows: The rows' names, from the top.
        components: The components' names, one a column.
        title: What the matrix is.
        entry: What one entry is called.
        left: Width of the margin for the rows' names, in pixels.
        signed: Whether negative values are expected.
    """
    largest = float(np.abs(values).max(initial=0)) or 1.0
    scale = {"zmin": -largest, "zmax": largest} if signed else {"zmin": 0, "zmax": max(1.0, largest)}
    gap = 1 if max(values.shape) <= 120 else 0
    label = f"%{{customdata[0]}}<br>component %{{customdata[1]}}<br>{entry} %{{z:.4g}}<extra></extra>"
    bar = {"thickness": 8, "outlinewidth": 0, "x": 1.01, "xpad": 4, "nticks": 5, "tickfont": {"size": 11}}
    colours = DIVERGING if signed else SEQUENTIAL
    style = {"colorscale": colours, "colorbar": bar, "xgap": gap, "ygap": gap, "hovertemplate": label}
    figure = go.Figure(go.Heatmap(z=values, customdata=_names(rows, components), **style, **scale))
    _quiet(figure, 100 + int(np.clip(24 * len(rows), 60, 420)))
    figure.update_layout(title=_title(title), margin={"l": left, "r": 84})
    figure.update_xaxes(title="component", **_ticks(components))
    return figure.update_yaxes(autorange="reversed", automargin=False, **_ticks(rows))


def _names(rows: Sequence[str], columns: Sequence[str]) -> np.ndarray:
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1)


def _ticks(names: Sequence[str], most: int = 40) -> dict[str, Any]:
    places = list(range(0, len(names), -(-len(names) // most) or 1))
    return {"tickvals": places, "ticktext": [names[i] for i in places], "showgrid": False, "ticks": ""}


def ranked_bars(summary: pl.DataFrame) -> go.Figure:
    """Activation density and mean importance (linear, logarithmic) of a site's components, each sorted by its size."""
    titles = ["Activation density", "Mean importance", "Mean importance on a log axis"]
    figure = make_subplots(rows=1, cols=3, subplot_titles=titles, horizontal_spacing=0.06)
    for place, column in enumerate(["density", "mean_importance", "mean_importance"], 1):
        ranked = summary.sort(column, "component", descending=[True, False])
        colours = [PLUS if alive else QUIET for alive in ranked["alive"]]
        label = "component %{customdata}<br>%{y:.4g}<extra></extra>"
        style = {"customdata": ranked["component"], "marker": {"color": colours}, "hovertemplate": label}
        dots = place == 3  # a bar has no length on a log axis
        trace = go.Scatter(y=ranked[column], mode="markers", **style) if dots else go.Bar(y=ranked[column], **style)
        figure.add_trace(trace, row=1, col=place)
    figure.update_xaxes(title="rank", showgrid=False)
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(type="log", exponentformat="power", rangemode="normal", row=1, col=3)
    return _quiet(figure, 260)


def curves(lines: Mapping[str, pl.DataFrame], title: str, log: bool) -> go.Figure:
    """Values over training steps, one line a name; on a log axis, values that are not positive are left out.

    Args:
        lines: By name, a frame with columns step and value.
        title: What they are.
        log: Whether the axis is logarithmic.
    """
    figure = go.Figure()
    for number, (name, line) in enumerate(lines.items()):
        shown = line.filter(pl.col("value") > 0) if log else line
        style = {"color": SERIES[number % len(SERIES)], "width": 1.6}
        label = f"{name}<br>step %{{x}}<br>%{{y:.4g}}<extra></extra>"
        mode = "lines" if len(shown) > 1 else "markers"
        trace = go.Scatter(x=shown["step"], y=shown["value"], name=name, line=style, mode=mode, hovertemplate=label)
        figure.add_trace(trace)
    _quiet(figure, 320)
    legend = {"x": 1.01, "xanchor": "left", "y": 1, "font": {"size": 12}}
    figure.update_layout(title=_title(title), showlegend=True, legend=legend)
    figure.update_xaxes(title="step", showgrid=False)
    return figure.update_yaxes(type="log", exponentformat="power", nticks=8) if log else figure


def _title(text: str) -> dict[str, Any]:
    place = {"x": 0, "xanchor": "left", "xref": "paper", "y": 1, "yref": "container", "pad": {"t": 12}}
    return {"text": text, "font": {"size": 14.5}, **place}


def _quiet(figure: go.Figure, height: int) -> go.Figure:
    font = {"family": "system-ui, sans-serif", "size": 12, "color": QUIET}
    clear = "rgba(0,0,0,0)"
    figure.update_layout(template="none", font=font, paper_bgcolor=clear, plot_bgcolor=clear, showlegend=False)
    figure.update_layout(height=height, margin={"l": 60, "r": 20, "t": 34, "b": 44}, bargap=0.25)
    figure.update_annotations(font={"size": 14.5})
    figure.update_xaxes(zeroline=False, linecolor=GRID, automargin=True, title_standoff=8)
    return figure.update_yaxes(zeroline=False, gridcolor=GRID, automargin=True, title_standoff=8)
