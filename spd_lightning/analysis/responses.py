"""The results of queries as JSON values: what `--json` prints, and what the web endpoints return.

Ids of prompts are strings, since JavaScript would round such large numbers. Numbers that are not
finite are null. Long lists come in pages: `items`, `total` (on all pages together), and `next`, the
number of the next page, or null on the last.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from spd_lightning.analysis.contexts import ExampleKind
from spd_lightning.analysis.graphs import node_name
from spd_lightning.analysis.names import component_name
from spd_lightning.analysis.neighbors import SIDES, Side
from spd_lightning.analysis.normalize import Normalization
from spd_lightning.analysis.search import Mode
from spd_lightning.analysis.statistics import OF, Of
from spd_lightning.analysis.store import Store
from spd_lightning.errors import BadInput, check_range

LARGEST_PAGE = 1000
"""The largest number of items on a page."""

Json = dict[str, Any]


def meta(store: Store) -> Json:
    """Return the facts about a harvest: its run, settings, layers, and numbers of rows."""
    manifest = store.manifest
    keys = ("harvest", "run", "kind", "mode", "threshold", "layers", "C", "rows", "prompts")
    facts = {key: manifest.get(key) for key in keys}
    return {
        **facts,
        "complete": manifest["complete"],
        "checkpoint": manifest.get("checkpoint_digest"),
    }


def components(
    store: Store, layer: str | None = None, sort: str = "density", page: int = 0, size: int = 100
) -> Json:
    """Return a page of components, with their statistics."""
    return _page(store.components(layer, sort), page, size)


def component(store: Store, name: str) -> Json:
    """Return the statistics of one component, and its histograms."""
    row = store.component(name)
    histogram = store.histogram(name) if "histograms" in store.tables else None
    item = _item({**row, "layer": str(row["layer"])})
    item["histogram"] = [] if histogram is None else _items(histogram)
    return item


def correlations(
    store: Store, name: str, sort: str = "pmi", page: int = 0, size: int = 100
) -> Json:
    """Return a page of the components that fire together with one component."""
    return _page(store.correlations(name, sort), page, size)


def tokens(store: Store, name: str, of: Of | None = None, sort: str = "pmi", top: int = 20) -> Json:
    """Return the top tokens at a component's firings, and the top tokens predicted there.

    of: "input" or "output"; both if omitted.
    """
    check_range("tokens", least=1, most=LARGEST_PAGE, whole=True, top=top)
    sides = OF if of is None else (of,)
    lists: Json = {}
    for side in sides:
        rows = store.tokens(name, side, sort)
        known = rows.filter(pl.col("token_id").is_not_null())
        rest = rows.filter(pl.col("token_id").is_null())
        lists[side] = {
            "items": _items(known.head(top)),
            "total": known.height,
            "remainder": float(rest["count"].sum()),
        }
    return lists


def activation_contexts(
    store: Store, name: str, kind: ExampleKind = "importance", window: int = 20, top: int = 20
) -> Json:
    """Return examples of a component's firings, with the text around each of them."""
    check_range("activation_contexts", least=1, most=LARGEST_PAGE, whole=True, top=top)
    rows = store.contexts(name, kind, window)
    return {"items": _items(rows.head(top)), "total": rows.height}


def search(
    store: Store,
    names: Sequence[str],
    mode: Mode = "all",
    min_importance: float = 0.0,
    page: int = 0,
    size: int = 100,
) -> Json:
    """Return a page of the prompts on which components fire."""
    matches = store.search(names, mode, min_importance)
    rows = _slice(matches, page, size)
    texts = _texts_of(store, rows["prompt_id"].to_list())
    with_texts = rows.with_columns(text=pl.Series(texts, dtype=pl.String))
    return _page(matches, page, size, with_texts)


def prompts(
    store: Store, text: str | None = None, regex: str | None = None, page: int = 0, size: int = 100
) -> Json:
    """Return a page of the prompts of a harvest, or of those whose text matches."""
    return _page(store.prompts(text, regex), page, size)


def prompt(
    store: Store,
    prompt_id: int,
    top_k: int = 200,
    ci_threshold: float = 0.0,
    max_mean_ci: float = 1.0,
    output_prob_threshold: float = 0.0,
    normalize: Normalization = "none",
) -> Json:
    """Return one prompt: its tokens, nodes and strongest edges, and the likely next tokens.

    Nodes are named `layer:pos:component`, and edges name their ends `src` and `tgt`.
    """
    view = store.prompt(
        prompt_id, top_k, ci_threshold, max_mean_ci, output_prob_threshold, normalize
    )
    names = {node["node"]: node_name(node) for node in view.nodes.iter_rows(named=True)}
    edges = []
    for source, target, value in view.edges.select("source", "target", "attribution").iter_rows():
        edges.append({"src": names[source], "tgt": names[target], "val": _number(value)})
    nodes = []
    for node in view.nodes.iter_rows(named=True):
        item = _item({key: value for key, value in node.items() if key != "node"})
        item["name"] = names[node["node"]]
        nodes.append(item)
    return {
        "prompt_id": str(view.prompt_id),
        "text": view.text,
        "tokens": view.tokens,
        "nodes": nodes,
        "edges": edges,
        "edges_total": view.edges_total,
        "outputs": _items(view.outputs),
    }


def neighbors(store: Store, name: str, side: Side | None = None, top: int = 20) -> Json:
    """Return the strongest sources of a component, and its strongest targets.

    side: "sources" or "targets"; both if omitted.
    """
    check_range("neighbors", least=1, most=LARGEST_PAGE, whole=True, top=top)
    sides = SIDES if side is None else (side,)
    return {each: _items(store.neighbors(name, each, top)) for each in sides}


# ---- conversion ----------------------------------------------------------------------------------


def _page(frame: pl.DataFrame, page: int, size: int, rows: pl.DataFrame | None = None) -> Json:
    """Return a page of a frame.

    rows: the rows of the page with further columns; if omitted, those of the frame.
    """
    if rows is None:
        rows = _slice(frame, page, size)
    is_last = (page + 1) * size >= frame.height
    return {"items": _items(rows), "total": frame.height, "next": None if is_last else page + 1}


def _slice(frame: pl.DataFrame, page: int, size: int) -> pl.DataFrame:
    check_range("page", least=0, whole=True, page=page)
    check_range("page", least=1, most=LARGEST_PAGE, whole=True, size=size)
    if page and page * size >= frame.height:
        last = max(0, (frame.height - 1) // size)
        raise BadInput(f"page {page}: the last page of {size} items is {last}")
    return frame.slice(page * size, size)


def _texts_of(store: Store, ids: Sequence[int]) -> list[str]:
    """Return the texts of some prompts, in their order."""
    wanted = pl.DataFrame({"prompt_id": ids}, schema={"prompt_id": pl.UInt64})
    joined = wanted.join(store.prompts(), on="prompt_id", how="left", maintain_order="left")
    return joined["text"].to_list()


def _items(frame: pl.DataFrame) -> list[Json]:
    return [_item(row) for row in frame.iter_rows(named=True)]


def _item(row: Mapping[str, Any]) -> Json:
    """Return a row as a JSON value; a component also gets its name."""
    item: Json = {}
    for key, value in row.items():
        if key == "prompt_id":
            value = str(value)
        item[key] = _number(value) if isinstance(value, float) else value
    if "layer" in item and "component" in item and "pos" not in item:
        item["name"] = component_name(item["layer"], item["component"])
    return item


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
