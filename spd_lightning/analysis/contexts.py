"""Examples of where a component fires, with the text around them."""

from typing import Literal

import polars as pl

from spd_lightning.analysis.names import MOST_ROWS, component_of
from spd_lightning.analysis.statistics import require
from spd_lightning.errors import BadInput, check_range, nearest
from spd_lightning.store import Store
from spd_lightning.store.columns import EXAMPLE_KINDS

ExampleKind = Literal["uniform", "importance", "positive", "negative"]


def contexts(
    store: Store, name: str, kind: ExampleKind = "importance", window: int = 20
) -> pl.DataFrame:
    """Return examples of a component's firings, each with the tokens around it.

    Columns prompt_id, pos, importance, activation, first (the position of the first token shown),
    tokens (their texts). Uniform examples are in random order; the others begin with the largest.

    Args:
        store: a harvest of statistics.
        name: `layer:component`.
        kind: "uniform" for a random sample of all firings; or those with the largest importance,
            or the largest activation of one sign.
        window: the number of tokens to show before and after the firing.

    Raises:
        BadInput: the harvest has no such component, no examples, or not this kind.
    """
    if kind not in EXAMPLE_KINDS:
        raise BadInput(f"kind '{kind[:60]}' of examples: {nearest(kind, EXAMPLE_KINDS)}")
    check_range("examples", least=0, most=MOST_ROWS, whole=True, window=window)
    layer, number = component_of(store, name)
    require(store, "examples")
    is_own = (pl.col("layer") == layer) & (pl.col("component") == number)
    candidates = store.scan("examples").filter(is_own, pl.col("kind") == kind)
    # Each group of prompts has written its own smallest keys; the smallest of all are the sample.
    kept = store.require("examples").manifest["examples"][kind]
    firings = candidates.sort("key", "prompt_id", "pos").head(kept)
    prompts = store.scan("prompts").select("prompt_id", "tokens")
    pos = pl.col("pos").cast(pl.Int64)
    first = (pos - window).clip(0)
    rows = firings.join(prompts, on="prompt_id", how="left", maintain_order="left").select(
        "prompt_id",
        "pos",
        "importance",
        "activation",
        first=first,
        tokens=pl.col("tokens").list.slice(first, pos + window + 1 - first),
    )
    return store.collect(rows)
