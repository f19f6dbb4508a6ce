"""The tokens page: prompts as text, colored by a component's importance; what is in use at a token,
and vice versa.
"""

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
MOST_PLACES = 50  # in the list of where a component is most important
MOST_HERE = 40  # components listed at one token
AROUND = 10  # tokens of context on either side
SHORT = (
    pl.col("importance", "activation").cast(pl.Float64).round_sig_figs(4)
)  # many numbers travel, to be looked at


@dataclass(frozen=True)
class TokenSelection:
    """The selected component; if None, the one of the layer, or of all, whose importance varies
    most.
    """

    layer: str | None = None
    component: int | None = None

    @classmethod
    def read(cls, question: Mapping[str, Any]) -> "TokenSelection":
        """The selection that a browser asked for.

        Raises:
            BadInput: a value has the wrong type or lies outside its range.
        """
        layer = question.get("layer")
        component = question.get("component")
        if layer is not None and not isinstance(layer, str):
            raise BadInput(f"layer {repr(layer)[:40]}: expected the name of a site")
        return cls(layer, None if component is None else integer(question, "component", 2**32 - 1))


@dataclass(frozen=True)
class TokenPage:
    """One component on all prompts, ready to draw.

    `components` are those of its layer, widest spread first, as {component, share, mean, spread}.
    `places` are parallel lists prompt (its number in the page's list), pos, importance, activation:
    where it is a node in the prompts shown. `top` are the positions of greatest importance in the
    whole harvest: {prompt (id), source, pos, before, token, after, importance, activation}. `total`
    counts the positions where it is a node, `positions` all.
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
    """One token: what is in use there, and what may follow.

    `components` are {layer, component, importance, activation}, the most important first, of
    `count` in all; `outputs` {token, ci, target, next}, likeliest first, where `next` says that the
    token does follow; `rest` is the probability of all other tokens, under CI masks and of the
    target. `follows` is the token that does follow, None at the end.
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
    """The page of the selected component.

    Raises:
        BadInput: the harvest has no such component, or a file is damaged.
    """
    layer, component = _chosen(store, selection)
    places = component_places(store, layer, component)
    number = _texts(store).head(MOST_PROMPTS).select("prompt_id", prompt="number")
    shown = finite(
        number.join(places.with_columns(SHORT), on="prompt_id", maintain_order="left")
    ).drop("prompt_id")
    return TokenPage(
        layer=layer,
        component=component,
        components=_spread(store).filter(pl.col("layer") == layer).drop("layer").to_dicts(),
        places=shown.to_dict(as_series=False),
        top=_in_context(store, finite(places.head(MOST_PLACES))),
        total=len(places),
        positions=int(_texts(store)["tokens"].list.len().sum()),
    )


def _chosen(store: Store, selection: TokenSelection) -> tuple[str, int]:
    ranked = _spread(store)
    if selection.layer is not None:
        ranked = ranked.filter(pl.col("layer").cast(pl.String) == selection.layer)
    widest = ranked.select(pl.col("layer").cast(pl.String), "component").head(1).rows()
    layer, component = widest[0] if widest else (selection.layer or sites(store)[0], 0)
    return layer, component if selection.component is None else selection.component


def _in_context(store: Store, places: pl.DataFrame) -> list[dict[str, Any]]:
    """Places with the text around them."""
    ids = places["prompt_id"].unique().implode()
    held = (
        _texts(store).filter(pl.col("prompt_id").is_in(ids)).select("prompt_id", "source", "tokens")
    )
    texts = {prompt: (source, tokens) for prompt, source, tokens in held.iter_rows()}
    found = []
    for prompt, pos, importance, activation in places.iter_rows():
        source, tokens = texts[prompt]
        before = tokens[max(0, pos - AROUND) : pos]
        after = tokens[pos + 1 : pos + 1 + AROUND]
        place = {"prompt": str(prompt), "source": source, "pos": pos, "importance": importance}
        found.append(
            place
            | {"activation": activation, "before": before, "token": tokens[pos], "after": after}
        )
    return found


def place_data(store: Store, prompt: int, pos: int) -> PlacePage:
    """Return the components in use at one token, and the tokens that may follow it.

    Raises:
        BadInput: the harvest has no such prompt or position, or a file is damaged.
    """
    rows = store.collect(store.scan("prompts", prompt)).to_dicts()
    if not rows or pos >= len(rows[0]["tokens"]):
        raise BadInput(
            f"position {pos} of prompt {prompt}: not in harvest '{store.path}'; refresh the page"
        )
    row = rows[0]
    end = pos + 1 == len(rows[0]["tokens"])
    here, likely = (finite(read(store, prompt, pos)) for read in (token_components, token_outputs))
    told = [float(likely[f"{name}_probability"].sum()) for name in ("ci", "target")]
    return PlacePage(
        source=row["source"],
        token=row["tokens"][pos],
        pos=pos,
        components=here.head(MOST_HERE).to_dicts(),
        count=len(here),
        outputs=[
            {
                "token": token,
                "ci": ci,
                "target": target,
                "next": not end and number == row["token_ids"][pos + 1],
            }
            for number, token, ci, target in likely.iter_rows()
        ],
        rest=(max(0.0, 1 - told[0]), max(0.0, 1 - told[1])),
        follows=None if end else row["tokens"][pos + 1],
    )


@lru_cache(maxsize=4)
def _texts(store: Store) -> pl.DataFrame:
    """All prompts in the order in which people look for them: prompt_id, number, source, split,
    tokens.
    """
    held = store.collect(store.scan("prompts").select("prompt_id", "source", "tokens"))
    order = prompt_list(store).select("prompt_id", "split").with_row_index("number")
    return order.join(held, on="prompt_id", maintain_order="left")


@lru_cache(maxsize=4)
def _spread(store: Store) -> pl.DataFrame:
    return component_spread(store)


# The browser's side of it.


def component_answer(library: Library, question: Any) -> dict[str, Any]:
    """The `TokenPage` that a browser asked for, as JSON values, or {"problem": one line}."""
    return library.answer(
        question, lambda store, asked: asdict(page_data(store, TokenSelection.read(asked)))
    )


def place_answer(library: Library, question: Any) -> dict[str, Any]:
    """The `PlacePage` that a browser asked for, as JSON values, or {"problem": one line}."""
    return library.answer(
        question,
        lambda store, asked: asdict(
            place_data(store, prompt_id(asked), integer(asked, "pos", 2**16 - 1))
        ),
    )


def contents(library: Library, run: str, harvest: str | None) -> dict[str, Any]:
    """Return the widget's first data: the harvest, its sites, and its prompts as text.

    Raises:
        BadInput: the run has no harvest, or one of vectors, or an empty one, or it cannot be read.
    """
    store = library.store(run, harvest)
    if store.manifest["kind"] != "tokens":
        raise BadInput(
            f"harvest '{harvest}' of run '{run}': its prompts are vectors; see pages Graph and "
            "Components"
        )
    texts = _texts(store)
    if texts.is_empty():
        raise BadInput(
            f"harvest '{harvest}' of run '{run}': no prompts yet; refresh when `predict` has "
            "written some"
        )
    shown = texts.head(MOST_PROMPTS).select("prompt_id", "source", "tokens")
    prompts = [_searchable(*row) for row in shown.iter_rows()]
    written = f"{store.manifest.get('checkpoint_digest')} {store.manifest['shards']}"
    own = {"layers": sites(store), "prompts": prompts, "total": len(texts), "written": written}
    return {"run": run, "harvest": harvest, "threshold": store.manifest.get("threshold"), **own}


def _searchable(prompt: int, source: str, tokens: list[str]) -> dict[str, Any]:
    """A prompt as the widget takes it; `text` only where it is not simply the labels of its tokens
    in a row.
    """
    text = labels.joined(tokens)
    plain = {"id": str(prompt), "source": source, "tokens": tokens}
    return plain if text == "".join(tokens) else plain | {"text": text}


def widgets(library: Library) -> Panel:
    """The interactive text: a `gr.HTML` whose value is `contents` or {"problem": one line}."""
    import gradio as gr

    def component(question: Any) -> dict[str, Any]:
        return component_answer(library, question)

    def place(question: Any) -> dict[str, Any]:
        return place_answer(library, question)

    def draw(run: str, harvest: str | None) -> list[dict[str, Any]]:
        try:
            return [contents(library, run, harvest)]
        except BadInput as error:
            return [{"problem": str(error)}]

    template, shared, script = (
        Path(__file__).with_name(name).read_text(encoding="utf-8")
        for name in ("tokens.html", "widget.js", "tokens.js")
    )
    shown = gr.HTML(
        value={},
        html_template=template,
        js_on_load=shared + script,
        server_functions=[component, place],
        apply_default_css=False,
        elem_id="tokens",
    )
    return Panel(draw, outputs=[shown])
