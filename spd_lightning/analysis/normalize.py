"""The scale of a graph's edges, chosen when they are read.

    none        as computed: attributions to the activation of the target
    target      in-edges of a node add up to 1 in absolute value
    target_l2   the squares of a node's in-edges add up to 1
    layer_l2    the squares of all edges into a layer add up to 1

Signs are kept. All edges of a prompt are normalized, before any filter.
"""

from typing import Literal

import polars as pl

from spd_lightning.errors import BadInput, nearest

Normalization = Literal["none", "target", "target_l2", "layer_l2"]
NORMALIZATIONS: tuple[Normalization, ...] = ("none", "target", "target_l2", "layer_l2")


def normalized(edges: pl.DataFrame, nodes: pl.DataFrame, how: Normalization) -> pl.DataFrame:
    """Return all edges of a prompt with normalized attributions.

    Edges into a node whose in-edges are all 0 stay 0.

    Args:
        edges: columns source, target, attribution.
        nodes: columns node, layer.
        how: one of `NORMALIZATIONS`.

    Raises:
        BadInput: the normalization is unknown.
    """
    if how not in NORMALIZATIONS:
        raise BadInput(f"normalize '{how[:60]}': {nearest(how, NORMALIZATIONS)}")
    if how == "none":
        return edges
    group = "target"
    if how == "layer_l2":
        layers = nodes.select(target="node", target_layer=pl.col("layer").cast(pl.String))
        edges = edges.join(layers, on="target", how="left", maintain_order="left")
        group = "target_layer"
    value = pl.col("attribution").cast(pl.Float64)
    size = value.abs().sum() if how == "target" else value.pow(2).sum().sqrt()
    divisor = size.over(group)
    scaled = pl.when(divisor > 0).then(value / divisor).otherwise(0.0)
    return edges.with_columns(attribution=scaled).select("source", "target", "attribution")
