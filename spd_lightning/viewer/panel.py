"""What a page of the viewer hands to the app: its widgets, and the function that fills them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any


@dataclass(frozen=True)
class Panel:
    """A page's widgets, built inside the Blocks that show them.

    Attributes:
        draw: Takes the names of a run and of its harvest (None if it has none), then the values of `inputs`; returns
            the values of `outputs`.
        inputs: The page's own controls; a change of one draws the page anew.
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


def table(rows: Sequence[tuple[str, str]], title: str) -> str:
    """(name, value) rows as an HTML table; nothing where there are none."""
    if not rows:
        return ""
    body = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<section><h3>{escape(title)}</h3><table class="spd-table">{body}</table></section>'
