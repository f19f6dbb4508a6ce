"""Two tables below a component: what drives it over the corpus, and what it drives."""

from dataclasses import dataclass
from html import escape
from typing import Any

from spd_lightning.analysis.dataset_edges import MIN_EDGES, Side, corpus_harvests, named, strongest
from spd_lightning.errors import BadInput
from spd_lightning.runs import Run
from spd_lightning.store import Store
from spd_lightning.viewer.panel import name_element, problem, shortened

TOP_K = 12
HEADS = ("", "to activation", "95 % interval", "to |activation|", "edges")


EdgeRow = tuple[str, float, float | None, float | None, float, int]
"""Name, sum to activation, low and high end of its interval, sum to |activation|, edges."""


@dataclass(frozen=True)
class EdgeTables:
    """The strongest sources and targets of a component, normalized.

    `note` describes the corpus.
    """

    component: str
    sources: list["EdgeRow"]
    targets: list["EdgeRow"]
    note: str


def page_data(store: Store, layer: str, component: int, top_k: int = TOP_K) -> EdgeTables:
    """Return the tables of one component, from a harvest of sums.

    Raises:
        BadInput: the harvest has no such component, or a file cannot be read.
    """

    def rows(side: Side) -> list[EdgeRow]:
        edges = strongest(store, layer, component, side, top_k=top_k)
        names = named(store, edges)
        columns = edges.select("to_activation", "low", "high", "to_size", "edges")
        return [(name, *values) for name, values in zip(names, columns.iter_rows(), strict=True)]

    prompts = store.manifest["prompts"]
    mode = store.manifest["mode"]
    note = (
        f"Edges of {prompts:,} {mode} graphs, summed, and divided by the source's importance and "
        f"the target's usual size. Pairs with fewer than {MIN_EDGES} edges are left out. Rows are "
        "ordered by how far their interval over prompts stays above 0."
    )
    return EdgeTables(
        component=f"{layer}:{component}",
        sources=rows("sources"),
        targets=rows("targets"),
        note=note,
    )


def of_run(run: Run, layer: str, component: int) -> EdgeTables | None:
    """Return the tables of a component from a run's latest harvest of sums; None without one."""
    harvests = corpus_harvests(run.harvests)
    if not harvests:
        return None
    store = Store(harvests[0]).require("mode", "token_layers")
    return page_data(store, layer, component)


def html(page: EdgeTables) -> str:
    """Return the two tables next to each other, as HTML."""
    component = shortened(page.component)
    sources = _grid(f"Strongest sources of {component}", page.component, page.sources)
    targets = _grid(f"Strongest targets of {component}", page.component, page.targets)
    note = f'<p class="spd-note">{escape(page.note)}</p>'
    return f'<div class="spd-grids">{sources}{targets}</div>{note}'


def _grid(title: str, component: str, rows: list[EdgeRow]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in HEADS)
    body = "".join(f"<tr>{_cells(row)}</tr>" for row in rows)
    if not rows:
        body = f'<tr><td colspan="{len(HEADS)}">none</td></tr>'
    heading = f'<h3 title="{escape(component)}">{escape(title)}</h3>'
    table = f'<table class="spd-table"><tr>{head}</tr>{body}</table>'
    return f"<section>{heading}{table}</section>"


def _cells(row: EdgeRow) -> str:
    name, to_activation, low, high, to_size, edges = row
    values = (
        f"{to_activation:+.3g}",
        "–" if low is None else f"{low:+.3g} to {high:+.3g}",
        f"{to_size:+.3g}",
        f"{edges:,}",
    )
    cells = [f"<td>{value}</td>" for value in values]
    return name_element("td", name) + "".join(cells)


def update(run: Run, layer: str, wanted: Any, default: int, count: int) -> tuple[int | None, str]:
    """Return the component to show, and its tables as HTML.

    It is the wanted component if that exists, else the default. It is None if the run has no sums
    over a corpus.
    """
    component = default
    if isinstance(wanted, int | float) and 0 <= wanted < count:
        component = int(wanted)
    try:
        page = of_run(run, layer, component)
    except BadInput as error:
        return component, problem(str(error))
    if page is None:
        return None, ""
    return component, html(page)
