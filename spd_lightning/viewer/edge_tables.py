"""Two tables below a component: what drives it over the corpus, and what it drives."""

from dataclasses import dataclass
from html import escape
from typing import Any

from spd_lightning.analysis.dataset_edges import MIN_EDGES, Side, corpus_harvests, named, strongest
from spd_lightning.errors import BadInput
from spd_lightning.runs import Run
from spd_lightning.store import Store
from spd_lightning.viewer.panel import name_element, shortened

TOP_K = 12
HEADS = ("", "to activation", "95 % interval", "to |activation|", "edges")


EdgeRow = tuple[str, float, float | None, float | None, float, int]


@dataclass(frozen=True)
class EdgeTables:
    """The strongest sources and targets of a component, normalized.

    Rows are name, sum to activation, low and high end of its interval, sum to |activation|, number
    of edges. `note` says which corpus they are of.
    """

    component: str
    sources: list["EdgeRow"]
    targets: list["EdgeRow"]
    note: str


def page_data(store: Store, layer: str, component: int, top_k: int = TOP_K) -> EdgeTables:
    """The tables of one component, from a harvest of sums.

    Raises:
        BadInput: the harvest has no such component, or a file cannot be read.
    """

    def rows(side: Side) -> list[EdgeRow]:
        found = strongest(store, layer, component, side, top_k=top_k)
        values = (
            found[name].to_list() for name in ("to_activation", "low", "high", "to_size", "edges")
        )
        return list(zip(named(store, found), *values, strict=True))

    prompts = store.manifest["prompts"]
    mode = store.manifest["mode"]
    note = (
        f"Edges of {prompts:,} {mode} graphs, summed, over the source's importance and the "
        "target's usual size. Pairs "
        f"with fewer than {MIN_EDGES} edges are left out; rows are in order of how far their "
        "interval over prompts "
        "stays above 0."
    )
    return EdgeTables(f"{layer}:{component}", rows("sources"), rows("targets"), note)


def of_run(run: Run, layer: str, component: int) -> EdgeTables | None:
    """The tables of one component from the latest harvest of sums that a run has; None where it has
    none.
    """
    found = corpus_harvests(run.harvests)
    return (
        page_data(Store(found[0]).require("mode", "token_layers"), layer, component)
        if found
        else None
    )


def html(page: EdgeTables) -> str:
    """The tables side by side."""
    sides = (("sources", page.sources), ("targets", page.targets))
    grids = "".join(
        _grid(f"Strongest {side} of {shortened(page.component)}", page.component, rows)
        for side, rows in sides
    )
    return f'<div class="spd-grids">{grids}</div><p class="spd-note">{escape(page.note)}</p>'


def _grid(title: str, component: str, rows: list[EdgeRow]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in HEADS)
    body = "".join(f"<tr>{_line(row)}</tr>" for row in rows)
    body = body or f'<tr><td colspan="{len(HEADS)}">none</td></tr>'
    table = f'<table class="spd-table"><tr>{head}</tr>{body}</table>'
    return f'<section><h3 title="{escape(component)}">{escape(title)}</h3>{table}</section>'


def _line(row: EdgeRow) -> str:
    name, signed, low, high, size, count = row
    interval = "–" if low is None else f"{low:+.3g} to {high:+.3g}"
    values = (f"{signed:+.3g}", interval, f"{size:+.3g}", f"{count:,}")
    return name_element("td", name) + "".join(f"<td>{value}</td>" for value in values)


def update(run: Run, layer: str, wanted: Any, default: int, count: int) -> tuple[int | None, str]:
    """Return the component to show, and its tables as HTML.

    The component is the one asked for if it exists, else the default. It is None if the run has no
    sums over a corpus.
    """
    asked = int(wanted) if isinstance(wanted, int | float) and 0 <= wanted < count else default
    try:
        page = of_run(run, layer, asked)
    except BadInput as error:
        return asked, f'<p class="spd-problem" role="alert">{escape(str(error))}</p>'
    return (asked, html(page)) if page else (None, "")
