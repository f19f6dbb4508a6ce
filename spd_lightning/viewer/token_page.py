"""The tokens page: prompts colored by a component's importance, and the components at a token."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import polars as pl

from spd_lightning import labels
from spd_lightning.analysis.components import sites
from spd_lightning.analysis.prompts import prompt_list
from spd_lightning.analysis.tokens import (
    component_places,
    component_spread,
    token_components,
    token_outputs,
)
from spd_lightning.errors import BadInput
from spd_lightning.store import Store
from spd_lightning.viewer.library import Library
from spd_lightning.viewer.panel import Panel, finite, integer, prompt_id

MOST_PROMPTS = 300  # shown as text
MOST_PLACES = 50  # in the list of places where a component is most important
MOST_HERE = 40  # components listed at one token
AROUND = 10  # tokens of context on either side
# Many numbers are sent to the browser, where nobody needs more digits.
SHORT = pl.col("importance", "activation").cast(pl.Float64).round_sig_figs(4)


@dataclass(frozen=True)
class TokenSelection:
    """The selected component; if None, the one whose importance varies most.

    Without a component, only those of `layer` are considered; without a layer, all of them are.
    """

    layer: str | None = None
    component: int | None = None

    @classmethod
    def read(cls, request: Mapping[str, Any]) -> "TokenSelection":
        """Read the selection from a browser's request.

        Raises:
            BadInput: a value has the wrong type or lies outside its range.
        """
        layer = request.get("layer")
        component = request.get("component")
        if layer is not None and not isinstance(layer, str):
            raise BadInput(f"layer {repr(layer)[:40]}: expected the name of a site")
        if component is not None:
            component = integer(request, "component", 2**32 - 1)
        return cls(layer, component)


@dataclass(frozen=True)
class TokenPage:
    """One component on all prompts, ready to draw.

    `components` lists the components of its layer, largest spread first, as {component, share,
    mean, spread}. `places` are the positions of the visible prompts at which the component is a
    node, as parallel lists prompt (its number in the page's list), pos, importance, activation.
    `top` are the positions of greatest importance in the whole harvest: {prompt (id), source, pos,
    before, token, after, importance, activation}. `total` is the number of positions at which the
    component is a node, `positions` the number of all positions.
    """

    layer: str
    component: int
    components: list[dict[str, Any]]
    places: dict[str, list[Any]]
    top: list[dict[str, Any]]
    total: int
    positions: int


@dataclass(frozen=True)
class PlacePage:
    """One token: the components that are active at it, and the predicted next tokens.

    `components` are {layer, component, importance, activation}, the most important first; `count`
    is the number of all active components. `outputs` are {token, ci, target, next}, likeliest
    first, where `next` says whether this token follows in the prompt. `rest` is the probability of
    all other tokens, under CI masks and of the target. `follows` is the token that follows in the
    prompt, None at the end.
    """

    source: str
    token: str
    pos: int
    components: list[dict[str, Any]]
    count: int
    outputs: list[dict[str, Any]]
    rest: tuple[float, float]
    follows: str | None


def page_data(store: Store, selection: TokenSelection) -> TokenPage:
    """Return the page of the selected component.

    Raises:
        BadInput: the harvest has no such component, or a file is damaged.
    """
    layer, component = _chosen(store, selection)
    texts = _texts(store)
    places = component_places(store, layer, component)
    visible = texts.head(MOST_PROMPTS).select("prompt_id", prompt="number")
    visible_places = visible.join(places.with_columns(SHORT), on="prompt_id", maintain_order="left")
    in_layer = _spread(store).filter(pl.col("layer") == layer)
    return TokenPage(
        layer=layer,
        component=component,
        components=in_layer.drop("layer").to_dicts(),
        places=finite(visible_places).drop("prompt_id").to_dict(as_series=False),
        top=_in_context(store, finite(places.head(MOST_PLACES))),
        total=len(places),
        positions=int(texts["tokens"].list.len().sum()),
    )


def _chosen(store: Store, selection: TokenSelection) -> tuple[str, int]:
    """Return the layer and number of the selected component."""
    ranked = _spread(store).select(pl.col("layer").cast(pl.String), "component")
    if selection.layer is not None:
        ranked = ranked.filter(pl.col("layer") == selection.layer)
    if ranked.is_empty():
        layer, component = selection.layer or sites(store)[0], 0
    else:
        layer, component = ranked.row(0)
    if selection.component is not None:
        component = selection.component
    return layer, component


def _in_context(store: Store, places: pl.DataFrame) -> list[dict[str, Any]]:
    """Return places with the text around them."""
    ids = places["prompt_id"].unique().implode()
    prompts = _texts(store).filter(pl.col("prompt_id").is_in(ids))
    columns = prompts.select("prompt_id", "source", "tokens")
    texts = {prompt: (source, tokens) for prompt, source, tokens in columns.iter_rows()}
    rows = []
    for prompt, pos, importance, activation in places.iter_rows():
        source, tokens = texts[prompt]
        rows.append(
            {
                "prompt": str(prompt),
                "source": source,
                "pos": pos,
                "importance": importance,
                "activation": activation,
                "before": tokens[max(0, pos - AROUND) : pos],
                "token": tokens[pos],
                "after": tokens[pos + 1 : pos + 1 + AROUND],
            }
        )
    return rows


def place_data(store: Store, prompt: int, pos: int) -> PlacePage:
    """Return the components that are active at one token, and the predicted next tokens.

    Raises:
        BadInput: the harvest has no such prompt or position, or a file is damaged.
    """
    rows = store.collect(store.scan("prompts", prompt)).to_dicts()
    if not rows or pos >= len(rows[0]["tokens"]):
        raise BadInput(
            f"position {pos} of prompt {prompt}: not in harvest '{store.path}'; refresh the page"
        )
    row = rows[0]
    tokens = row["tokens"]
    is_last = pos + 1 == len(tokens)
    next_id = None if is_last else row["token_ids"][pos + 1]
    active = finite(token_components(store, prompt, pos))
    likely = finite(token_outputs(store, prompt, pos))
    outputs = [
        {"token": token, "ci": ci, "target": target, "next": token_id == next_id}
        for token_id, token, ci, target in likely.iter_rows()
    ]
    ci_total = float(likely["ci_probability"].sum())
    target_total = float(likely["target_probability"].sum())
    return PlacePage(
        source=row["source"],
        token=tokens[pos],
        pos=pos,
        components=active.head(MOST_HERE).to_dicts(),
        count=len(active),
        outputs=outputs,
        rest=(max(0.0, 1 - ci_total), max(0.0, 1 - target_total)),
        follows=None if is_last else tokens[pos + 1],
    )


@lru_cache(maxsize=4)
def _texts(store: Store) -> pl.DataFrame:
    """Return all prompts as in `prompt_list`: number, prompt_id, split, source, tokens."""
    columns = store.scan("prompts").select("prompt_id", "source", "tokens")
    texts = store.collect(columns)
    order = prompt_list(store).select("prompt_id", "split")
    numbered = order.with_row_index("number")
    return numbered.join(texts, on="prompt_id", maintain_order="left")


@lru_cache(maxsize=4)
def _spread(store: Store) -> pl.DataFrame:
    return component_spread(store)


# ---- responses to a browser ----------------------------------------------------------------------


def component_response(library: Library, request: Any) -> dict[str, Any]:
    """Return the `TokenPage` that a browser requests, as JSON values, or {"problem": one line}."""

    def read(store: Store, request: Mapping[str, Any]) -> dict[str, Any]:
        selection = TokenSelection.read(request)
        return asdict(page_data(store, selection))

    return library.respond(request, read)


def place_response(library: Library, request: Any) -> dict[str, Any]:
    """Return the `PlacePage` that a browser requests, as JSON values, or {"problem": one line}."""

    def read(store: Store, request: Mapping[str, Any]) -> dict[str, Any]:
        prompt = prompt_id(request)
        pos = integer(request, "pos", 2**16 - 1)
        return asdict(place_data(store, prompt, pos))

    return library.respond(request, read)


def contents(library: Library, run: str, harvest: str | None) -> dict[str, Any]:
    """Return the widget's first data: the harvest, its sites, and its prompts as text.

    Raises:
        BadInput: the run has no harvest, or the harvest is of vectors, empty or unreadable.
    """
    store = library.store(run, harvest)
    if store.manifest["kind"] != "tokens":
        raise BadInput(
            f"harvest '{harvest}' of run '{run}': its prompts are vectors; see the pages Graph and "
            "Components"
        )
    texts = _texts(store)
    if texts.is_empty():
        raise BadInput(
            f"harvest '{harvest}' of run '{run}': no prompts yet; refresh when `predict` has "
            "written some"
        )
    visible = texts.head(MOST_PROMPTS).select("prompt_id", "source", "tokens")
    return {
        "run": run,
        "harvest": harvest,
        "threshold": store.manifest.get("threshold"),
        "layers": sites(store),
        "prompts": [_searchable(*row) for row in visible.iter_rows()],
        "total": len(texts),
        "written": f"{store.manifest.get('checkpoint_digest')} {store.manifest['shards']}",
    }


def _searchable(prompt: int, source: str, tokens: list[str]) -> dict[str, Any]:
    """Return a prompt for the widget; it has a `text` if that is not the joined tokens."""
    entry = {"id": str(prompt), "source": source, "tokens": tokens}
    text = labels.joined(tokens)
    if text != "".join(tokens):
        entry["text"] = text
    return entry


def widgets(library: Library) -> Panel:
    """Create the interactive text: a `gr.HTML` with `contents` or {"problem": one line}."""
    import gradio as gr

    def component(request: Any) -> dict[str, Any]:
        return component_response(library, request)

    def place(request: Any) -> dict[str, Any]:
        return place_response(library, request)

    def draw(run: str, harvest: str | None) -> list[dict[str, Any]]:
        try:
            return [contents(library, run, harvest)]
        except BadInput as error:
            return [{"problem": str(error)}]

    def file(name: str) -> str:
        return Path(__file__).with_name(name).read_text(encoding="utf-8")

    shown = gr.HTML(
        value={},
        html_template=file("tokens.html"),
        js_on_load=file("widget.js") + file("tokens.js"),
        server_functions=[component, place],
        apply_default_css=False,
        elem_id="tokens",
    )
    return Panel(draw, outputs=[shown])
