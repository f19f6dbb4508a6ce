"""Components on text: where one is important, which are at one token, and which are worth looking
at first.

A component that is not a node at a position has importance 0 there; all shares and means count
every position.
"""

import polars as pl

from spd_lightning.analysis.components import site
from spd_lightning.errors import BadInput
from spd_lightning.store import Store

IMPORTANCE = pl.col("importance").cast(pl.Float64)


def component_spread(store: Store) -> pl.DataFrame:
    """How much the importance of each component differs between positions, those of the widest
    spread first.

    Columns layer, component, share (of positions where it is a node), mean, and spread, the
    standard deviation of its importance over all positions. Components that are a node nowhere are
    left out.

    Raises:
        BadInput: a file is damaged.
    """
    positions = (
        store.collect(store.scan("prompts").select(pl.col("token_ids").list.len().sum())).item()
        or 1
    )
    own = store.scan("nodes_by_component").filter(pl.col("kind") == "component")
    sums = own.group_by("layer", "component").agg(
        share=pl.len() / positions,
        mean=IMPORTANCE.sum() / positions,
        square=IMPORTANCE.pow(2).sum() / positions,
    )
    spread = (pl.col("square") - pl.col("mean").pow(2)).clip(0).sqrt()
    order = pl.col("layer").to_physical()
    ranked = (
        sums.with_columns(spread=spread).sort(-pl.col("spread"), order, "component").drop("square")
    )
    return store.collect(ranked)


def component_places(store: Store, layer: str, component: int) -> pl.DataFrame:
    """Every position where a component is a node: prompt_id, pos, importance, activation, the most
    important first.

    Raises:
        BadInput: the harvest has no such component, or a file is damaged.
    """
    count = store.manifest["C"][site(store, layer)]
    if not 0 <= component < count:
        raise BadInput(f"component {component} of site '{layer}': it has {count}, numbered from 0")
    own = store.scan("nodes_by_component").filter(
        pl.col("component") == component, pl.col("layer") == layer, pl.col("kind") == "component"
    )
    order: list[pl.Expr | str] = [-IMPORTANCE, -pl.col("activation").abs(), "prompt_id", "pos"]
    return store.collect(own.sort(order).select("prompt_id", "pos", "importance", "activation"))


def token_components(store: Store, prompt: int, pos: int) -> pl.DataFrame:
    """The components that are nodes at one position: layer, component, importance, activation.

    The most important come first; among equals those of larger |activation|.
    """
    own = store.scan("nodes", prompt).filter(pl.col("pos") == pos, pl.col("kind") == "component")
    order: list[pl.Expr | str] = [
        -IMPORTANCE,
        -pl.col("activation").abs(),
        pl.col("layer").to_physical(),
        "component",
    ]
    return store.collect(own.sort(order).select("layer", "component", "importance", "activation"))


def token_outputs(store: Store, prompt: int, pos: int) -> pl.DataFrame:
    """Return the likeliest next tokens at one position under the importances (A3), the likeliest
    first.

    Columns token_id, token, ci_probability, target_probability.
    """
    own = store.scan("outputs", prompt).filter(pl.col("pos") == pos)
    held = own.select("token_id", "token", "ci_probability", "target_probability")
    return store.collect(held.sort(-pl.col("ci_probability"), "token_id"))
