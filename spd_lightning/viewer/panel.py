"""The parts that the viewer's pages share: their interface to the app, requests of a browser, and
values for one.
"""

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
        inputs: The page's own controls; a change of one redraws the page.
        outputs: The widgets that `draw` fills.
    """

    draw: Callable[..., Any]
    outputs: Sequence[Any]
    inputs: Sequence[Any] = ()


def problem(text: str) -> str:
    """One line that says what is wrong, as HTML."""
    return f'<p class="spd-problem" role="alert">{escape(text)}</p>' if text else ""


def sentence(text: str) -> str:
    """A remark, as HTML."""
    return f'<p class="spd-note">{escape(text)}</p>' if text else ""


NAME = 34
"""Letters of a name where room is short."""


def shortened(name: str, most: int = NAME) -> str:
    """Return a name that fits: a long one loses its middle, since both ends tell modules apart.

    >>> shortened("model.layers.11.block_sparse_moe.experts.3.down_proj")
    'model.layers.11.blo…ts.3.down_proj'
    """
    if len(name) <= most:
        return name
    end = most * 3 // 7
    return f"{name[: most - 1 - end]}…{name[-end:]}"


def name_element(tag: str, name: str, most: int = NAME) -> str:
    """An HTML element with a name in it, and the whole name as its title where it was shortened."""
    shown = shortened(name, most)
    title = f' title="{escape(name)}"' if shown != name else ""
    return f"<{tag}{title}>{escape(shown)}</{tag}>"


def table(rows: Sequence[tuple[str, str]], title: str) -> str:
    """(name, value) rows as an HTML table; nothing where there are none."""
    if not rows:
        return ""
    body = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows
    )
    return f'<section><h3>{escape(title)}</h3><table class="spd-table">{body}</table></section>'


# Questions from a browser, which may hold anything, and values for one.


def prompt_id(question: Mapping[str, Any]) -> int:
    """The prompt that a browser asked for; ids travel as decimal strings, since they exceed a
    JavaScript number.
    """
    text = question.get("prompt")
    if not (isinstance(text, str) and text.isdecimal() and len(text) <= 20 and int(text) < 2**64):
        raise BadInput(
            f"prompt {repr(text)[:40]}: expected the id of a prompt, a number from 0 to 2^64 − 1"
        )
    return int(text)


def number(question: Mapping[str, Any], name: str, low: int, high: int) -> float:
    """A number that a browser asked for.

    Raises:
        BadInput: it is none, or outside its range.
    """
    value = question.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise BadInput(f"{name} {repr(value)[:40]}: expected a number from {low} to {high}")
    return float(value)


def integer(question: Mapping[str, Any], name: str, high: int) -> int:
    """A whole number from 0 that a browser asked for; what stands behind the point is dropped."""
    return int(number(question, name, 0, high))


def finite(frame: pl.DataFrame) -> pl.DataFrame:
    """JSON has no infinities: they become null."""
    floats = pl.col(pl.Float32, pl.Float64)
    return frame.with_columns(pl.when(floats.is_finite()).then(floats))
