"""Components on text: where each one is important, and which are active at one token.

A component that is not a node at a position has importance 0 there; all shares and means count
every position.
"""

import polars as pl

from spd_lightning.analysis.components import site
from spd_lightning.errors import BadInput
from spd_lightning.store import Store

IMPORTANCE = pl.col("importance").cast(pl.Float64)
SIZE = pl.col("activation").abs()


def component_spread(store: Store) -> pl.DataFrame:
    """Return how much each component's importance varies between positions, most variable first.

    Columns layer, component, share (of positions where it is a node), mean, and spread, the
    standard deviation of its importance over all positions. Components that are never a node are
    left out.

    Raises:
        BadInput: a file is damaged.
    """
    length = pl.col("token_ids").list.len()
    total = store.collect(store.scan("prompts").select(length.sum())).item()
    positions = total or 1
    nodes = store.scan("nodes_by_component").filter(pl.col("kind") == "component")
    moments = nodes.group_by("layer", "component").agg(
        share=pl.len() / positions,
        mean=IMPORTANCE.sum() / positions,
        square=IMPORTANCE.pow(2).sum() / positions,
    )
    variance = pl.col("square") - pl.col("mean").pow(2)
    spread = variance.clip(0).sqrt()
    in_forward_order = pl.col("layer").to_physical()
    ranked = moments.with_columns(spread=spread).sort(
        -pl.col("spread"), in_forward_order, "component"
    )
    return store.collect(ranked.drop("square"))


def component_places(store: Store, layer: str, component: int) -> pl.DataFrame:
    """Return every position where a component is a node, the most important first.

    Columns prompt_id, pos, importance, activation.

    Raises:
        BadInput: the harvest has no such component, or a file is damaged.
    """
    count = store.manifest["C"][site(store, layer)]
    if not 0 <= component < count:
        raise BadInput(
            f"component {component} of site '{layer}': it has {count} components; take one from 0 "
            f"to {count - 1}"
        )
    nodes = store.scan("nodes_by_component").filter(
        pl.col("component") == component,
        pl.col("layer") == layer,
        pl.col("kind") == "component",
    )
    ranked = nodes.sort(-IMPORTANCE, -SIZE, "prompt_id", "pos")
    return store.collect(ranked.select("prompt_id", "pos", "importance", "activation"))


def token_components(store: Store, prompt: int, pos: int) -> pl.DataFrame:
    """Return the components that are nodes at one position, the most important first.

    Columns layer, component, importance, activation. Ties are broken by |activation|, the largest
    first.
    """
    nodes = store.scan("nodes", prompt).filter(
        pl.col("pos") == pos,
        pl.col("kind") == "component",
    )
    in_forward_order = pl.col("layer").to_physical()
    ranked = nodes.sort(-IMPORTANCE, -SIZE, in_forward_order, "component")
    return store.collect(ranked.select("layer", "component", "importance", "activation"))


def token_outputs(store: Store, prompt: int, pos: int) -> pl.DataFrame:
    """Return the likeliest next tokens at one position under CI masks (A3), the likeliest first.

    Columns token_id, token, ci_probability, target_probability.
    """
    outputs = store.scan("outputs", prompt).filter(pl.col("pos") == pos)
    columns = outputs.select("token_id", "token", "ci_probability", "target_probability")
    ranked = columns.sort(-pl.col("ci_probability"), "token_id")
    return store.collect(ranked)
