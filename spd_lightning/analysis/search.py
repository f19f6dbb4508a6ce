"""Prompts by the components that fire on them, and by their text."""

from collections.abc import Sequence
from typing import Literal
from weakref import WeakKeyDictionary

import polars as pl

from spd_lightning.analysis.names import component_of
from spd_lightning.analysis.prompts import prompt_text, search_key
from spd_lightning.errors import BadInput, check_range, nearest, shown
from spd_lightning.store import Store

Mode = Literal["all", "any"]
MODES: tuple[Mode, ...] = ("all", "any")

MOST_COMPONENTS = 100
"""The largest number of components in one search."""

LONGEST_TEXT = 10_000
"""The largest number of characters of a text or an expression to search for."""


def search(
    store: Store, components: Sequence[str], mode: Mode = "all", min_importance: float = 0.0
) -> pl.DataFrame:
    """Return the prompts on which components fire, sorted by `matched`, then by importance.

    Columns prompt_id, matched (the number of these components that fire on the prompt), importance.
    Each component has its largest importance on the prompt; `importance` is the smallest of these
    for mode "all", and the largest for "any".

    Args:
        store: a harvest with the table `nodes`.
        components: names, `layer:component`.
        mode: "all" if every component must fire on the prompt; "any" if one is enough.
        min_importance: a component counts where its importance is at least this.

    Raises:
        BadInput: the harvest has no such component, or no nodes.
    """
    if mode not in MODES:
        raise BadInput(f"mode '{mode[:60]}' of a search: {nearest(mode, MODES)}")
    check_range("search", least=0, most=1, min_importance=min_importance)
    if not components:
        raise BadInput("search: no component is given; name one or more, as layer:component")
    if len(components) > MOST_COMPONENTS:
        raise BadInput(f"search: {len(components)} components; name at most {MOST_COMPONENTS}")
    units = list(dict.fromkeys(component_of(store, name) for name in components))
    if "nodes" not in store.tables:
        raise BadInput(
            f"harvest '{store.path}': it has no table 'nodes', so it does not know which prompts "
            "need a component; harvest with spd_lightning.PromptNodes or PromptGraphs"
        )
    largest = store.prompts_with(units, mode, min_importance)
    importances = pl.exclude("prompt_id")  # one column per component; null where it does not fire
    importance = pl.min_horizontal(importances)
    if mode == "any":
        importance = pl.max_horizontal(importances)
    matched = pl.sum_horizontal(importances.is_not_null()).cast(pl.UInt32)
    prompts = largest.select("prompt_id", matched=matched, importance=importance)
    return prompts.sort("matched", "importance", "prompt_id", descending=[True, True, False])


def prompts(store: Store, text: str | None = None, regex: str | None = None) -> pl.DataFrame:
    """Return the prompts of a harvest, or those whose text matches.

    Columns prompt_id, split, source, positions, text, in the order of the harvest.

    Args:
        store: any harvest.
        text: only prompts that contain this text; case and spaces are ignored.
        regex: only prompts in whose text this regular expression is found, as written. The syntax
            is that of Rust's crate `regex`, whose searches take a time that is linear in the text.

    Raises:
        BadInput: the expression cannot be compiled, or is too long.
    """
    for name, value in (("text", text), ("regex", regex)):
        if value is not None and len(value) > LONGEST_TEXT:
            raise BadInput(f"{name}: {len(value)} characters; give at most {LONGEST_TEXT}")
    texts = _texts(store)
    if text:
        wanted = pl.lit(search_key(text))
        texts = texts.filter(pl.col("key").str.contains(wanted, literal=True))
    if regex:
        try:
            texts = texts.filter(pl.col("text").str.contains(regex))
        except pl.exceptions.PolarsError as error:
            reason = _reason(error)
            raise BadInput(f"regex '{shown(regex)}': {reason}; correct the expression") from error
    return texts.drop("key")


def _reason(error: Exception) -> str:
    """Return the reason in an error of polars about a regular expression.

    It is the last line before those about the query.
    """
    text = str(error).partition("This error occurred")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reason = lines[-1] if lines else "it cannot be compiled"
    return reason.removeprefix("error: ")[:200]


_TEXTS: WeakKeyDictionary[Store, pl.DataFrame] = WeakKeyDictionary()


def _texts(store: Store) -> pl.DataFrame:
    """Return the text of every prompt, and its key for searches; computed once for each store."""
    if store not in _TEXTS:
        rows = store.collect(store.scan("prompts"))
        texts = [prompt_text(row) for row in rows.iter_rows(named=True)]
        _TEXTS[store] = rows.select(
            "prompt_id",
            "split",
            "source",
            positions=pl.col("token_ids").list.len(),
            text=pl.Series(texts, dtype=pl.String),
            key=pl.Series([search_key(text) for text in texts], dtype=pl.String),
        )
    return _TEXTS[store]
