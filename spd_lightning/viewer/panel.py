"""Shared parts of the viewer's pages: the interface to the app, HTML elements, and requests."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import polars as pl

from spd_lightning.errors import BadInput


@dataclass(frozen=True)
class Panel:
    """A page's widgets, built inside the Blocks that show them.

    Attributes:
        draw: Takes the names of a run and of its harvest (None if it has none), then the values of
            `inputs`; returns the values of `outputs`.
        inputs: The controls of the page; a change of one redraws the page.
        outputs: The widgets that `draw` fills.
    """

    draw: Callable[..., Any]
    outputs: Sequence[Any]
    inputs: Sequence[Any] = ()


def problem(text: str) -> str:
    """Return an error message as HTML; an empty string if there is no text."""
    if not text:
        return ""
    return f'<p class="spd-problem" role="alert">{escape(text)}</p>'


def sentence(text: str) -> str:
    """Return a note as HTML; an empty string if there is no text."""
    if not text:
        return ""
    return f'<p class="spd-note">{escape(text)}</p>'


NAME = 34
"""The largest number of letters of a name in a narrow place."""


def shortened(name: str, most: int = NAME) -> str:
    """Shorten a long name in its middle, since both ends tell modules apart.

    >>> shortened("model.layers.11.block_sparse_moe.experts.3.down_proj")
    'model.layers.11.blo…ts.3.down_proj'
    """
    if len(name) <= most:
        return name
    end = most * 3 // 7
    beginning = most - 1 - end
    return f"{name[:beginning]}…{name[-end:]}"


def name_element(tag: str, name: str, most: int = NAME) -> str:
    """Return an HTML element that shows a name; if shortened, the full name is its title."""
    text = shortened(name, most)
    title = ""
    if text != name:
        title = f' title="{escape(name)}"'
    return f"<{tag}{title}>{escape(text)}</{tag}>"


def table(rows: Sequence[tuple[str, str]], title: str) -> str:
    """Return rows of name and value as an HTML table; an empty string if there are no rows."""
    if not rows:
        return ""
    body = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows
    )
    return f'<section><h3>{escape(title)}</h3><table class="spd-table">{body}</table></section>'


# Requests of a browser, which can contain anything, and values for the response.


def prompt_id(request: Mapping[str, Any]) -> int:
    """Return the prompt that a browser requests.

    Ids are sent as decimal strings, since they are too large for a JavaScript number.

    Raises:
        BadInput: it is not an id.
    """
    text = request.get("prompt")
    if isinstance(text, str) and text.isdecimal() and len(text) <= 20:
        prompt = int(text)
        if prompt < 2**64:
            return prompt
    raise BadInput(
        f"prompt {repr(text)[:40]}: expected the id of a prompt, a number from 0 to 2^64 − 1"
    )


def number(request: Mapping[str, Any], name: str, low: int, high: int) -> float:
    """Return a number from a browser's request.

    Raises:
        BadInput: it is not a number, or outside its range.
    """
    value = request.get(name)
    is_bool = isinstance(value, bool)  # a kind of int in Python
    if is_bool or not isinstance(value, int | float) or not low <= value <= high:
        raise BadInput(f"{name} {repr(value)[:40]}: expected a number from {low} to {high}")
    return float(value)


def integer(request: Mapping[str, Any], name: str, high: int) -> int:
    """Return a whole number of at least 0 from a browser's request; decimals are dropped."""
    return int(number(request, name, 0, high))


def finite(frame: pl.DataFrame) -> pl.DataFrame:
    """Replace numbers that are not finite by null, since JSON cannot contain them."""
    floats = pl.col(pl.Float32, pl.Float64)
    finite_or_null = pl.when(floats.is_finite()).then(floats)
    return frame.with_columns(finite_or_null)
