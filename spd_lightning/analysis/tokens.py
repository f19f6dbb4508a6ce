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
IN_FORWARD_ORDER = pl.col("layer").to_physical()


def component_spread(store: Store) -> pl.DataFrame:
    """Return how much each component's importance varies between positions, most variable first.

    Columns layer, component, share (of positions where it is a node), mean, and spread, the
    standard deviation of its importance over all positions. Components that are never a node are
    left out.

    Raises:
        BadInput: a file is damaged.
    """
    positions = _count_positions(store) or 1
    is_component = pl.col("kind") == "component"
    nodes = store.scan("nodes_by_component").filter(is_component)
    moments = nodes.group_by("layer", "component").agg(
        share=pl.len() / positions,
        mean=IMPORTANCE.sum() / positions,
        square=IMPORTANCE.pow(2).sum() / positions,
    )
    square_of_mean = pl.col("mean").pow(2)
    variance = pl.col("square") - square_of_mean
    spread = variance.clip(0).sqrt()
    spreads = moments.with_columns(spread=spread)
    ranked = spreads.sort(-pl.col("spread"), IN_FORWARD_ORDER, "component")
    return store.collect(ranked.drop("square"))


def _count_positions(store: Store) -> int:
    """Return the number of positions of all prompts together."""
    length = pl.col("token_ids").list.len()
    total = store.scan("prompts").select(length.sum())
    return store.collect(total).item()


def component_places(store: Store, layer: str, component: int) -> pl.DataFrame:
    """Return every position where a component is a node, the most important first.

    Columns prompt_id, pos, importance, activation.

    Raises:
        BadInput: the harvest has no such component, or a file is damaged.
    """
    site_name = site(store, layer)
    count = store.manifest["C"][site_name]
    if not 0 <= component < count:
        raise BadInput(
            f"component {component} of site '{layer}': it has {count} components; take one from 0 "
            f"to {count - 1}"
        )
    place = (site_name, component)
    nodes = store.scan("nodes_by_component", component=place).filter(pl.col("kind") == "component")
    ranked = nodes.sort(-IMPORTANCE, -SIZE, "prompt_id", "pos")
    columns = ranked.select("prompt_id", "pos", "importance", "activation")
    return store.collect(columns)


def token_components(store: Store, prompt: int, pos: int) -> pl.DataFrame:
    """Return the components that are nodes at one position, the most important first.

    Columns layer, component, importance, activation. Ties are broken by |activation|, the largest
    first.
    """
    nodes = store.scan("nodes", prompt).filter(pl.col("pos") == pos, pl.col("kind") == "component")
    ranked = nodes.sort(-IMPORTANCE, -SIZE, IN_FORWARD_ORDER, "component")
    columns = ranked.select("layer", "component", "importance", "activation")
    return store.collect(columns)


def token_outputs(store: Store, prompt: int, pos: int) -> pl.DataFrame:
    """Return the likeliest next tokens at one position under CI masks (A3), the likeliest first.

    Columns token_id, token, ci_probability, target_probability.
    """
    at_position = pl.col("pos") == pos
    outputs = store.scan("outputs", prompt).filter(at_position)
    columns = outputs.select("token_id", "token", "ci_probability", "target_probability")
    likeliest_first = -pl.col("ci_probability")
    ranked = columns.sort(likeliest_first, "token_id")
    return store.collect(ranked)
