"""Components across prompts: how important each one is, and how often it fires."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import polars as pl
from jaxtyping import Float32, Int64
from scipy.optimize import linear_sum_assignment

from spd_lightning.errors import BadInput, nearest, shown
from spd_lightning.store import Store


def importance_matrix(
    store: Store, prompts: Sequence[int], layer: str, over: Literal["largest", "mean"] = "largest"
) -> Float32[np.ndarray, "prompt C"]:
    """Return the causal importance of every component of a site, with one row per prompt.

    A component that is not a node at a position has importance 0 there. If a prompt has several
    positions, an entry is the largest importance or the mean over all positions. Rows follow the
    order of `prompts`.

    Raises:
        BadInput: the harvest has no such site, or a file is damaged.
    """
    rows = pl.LazyFrame({"prompt_id": prompts}, schema={"prompt_id": pl.UInt64})
    rows = rows.with_row_index("row")
    site_name = site(store, layer)
    nodes = store.scan("nodes_by_component").filter(
        pl.col("layer") == site_name, pl.col("kind") == "component"
    )
    combined = pl.col("importance")
    if over == "largest":
        combined = combined.max()
    else:
        combined = combined.sum()
    wanted = nodes.join(rows, on="prompt_id")
    groups = wanted.group_by("row", "component")
    cells = store.collect(groups.agg(combined))

    C = store.manifest["C"][layer]
    shape = (len(prompts), C)
    matrix = np.zeros(shape, dtype=np.float32)
    row = cells["row"].to_numpy()
    column = cells["component"].to_numpy()
    matrix[row, column] = cells["importance"].to_numpy()
    if over == "largest":
        return matrix
    positions = _count_positions(store, rows)
    return matrix / positions[:, None]


def _count_positions(store: Store, rows: pl.LazyFrame) -> Float32[np.ndarray, " prompt"]:
    """Return the number of positions of each prompt; a vector has one."""
    if store.manifest["kind"] == "vectors":
        count = store.collect(rows.select(pl.len())).item()
        return np.ones(count, dtype=np.float32)
    prompts = store.scan("prompts")
    length = pl.col("token_ids").list.len()
    lengths = prompts.select("prompt_id", length=length)
    joined = rows.join(lengths, on="prompt_id", how="left")
    in_order = store.collect(joined.sort("row"))
    positions = in_order["length"].to_numpy()
    return positions.astype("f4")


def identity_order(matrix: Float32[np.ndarray, "prompt C"]) -> Int64[np.ndarray, " C"]:
    """Return the order of columns that makes a matrix look most like the identity.

    The Hungarian algorithm assigns a different column to each row so that the sum along the
    diagonal is largest. Columns that no row claims, or that a row claims with importance 0, follow
    in order of decreasing sum.
    """
    rows, columns = linear_sum_assignment(matrix, maximize=True)
    importances = matrix[rows, columns]
    claimed = columns[importances > 0]
    C = matrix.shape[1]
    rest = np.setdiff1d(np.arange(C), claimed)
    unclaimed = matrix[:, rest]
    by_size = size_order(unclaimed)
    rest = rest[by_size]
    order = np.concatenate([claimed, rest])
    return order.astype(np.int64)


def size_order(matrix: Float32[np.ndarray, "prompt C"]) -> Int64[np.ndarray, " C"]:
    """Return the order of columns by decreasing sum."""
    sums = matrix.sum(axis=0)
    order = np.argsort(-sums, kind="stable")
    return order.astype(np.int64)


def component_summary(store: Store, layer: str) -> pl.DataFrame:
    """Return density, mean importance, norm and aliveness of each component of a site.

    There is one row per component, in order. Counts are summed over the shards before they are
    divided: `density` = firings/positions, `mean_importance` = importance_sum/positions. `norm` is
    the Frobenius norm of U[c] V[:,c]ᵀ.

    Raises:
        BadInput: the harvest has no such site, or a file is damaged.
    """
    in_site = pl.col("layer") == site(store, layer)
    counts = store.scan("components").filter(in_site)
    merged = counts.group_by("component").agg(
        pl.col("firings").sum(),
        pl.col("positions").sum(),
        pl.col("importance_sum").sum(),
        pl.col("norm").first(),
        pl.col("alive").first(),
    )
    summary = merged.select(
        "component",
        density=pl.col("firings") / pl.col("positions"),
        mean_importance=pl.col("importance_sum") / pl.col("positions"),
        norm="norm",
        alive="alive",
    )
    return store.collect(summary.sort("component"))


def sites(store: Store) -> list[str]:
    """List the layers of a harvest that have components, in forward order."""
    counts = store.manifest["C"]
    return [layer for layer in store.layers if counts.get(layer)]


def site(store: Store, layer: str) -> str:
    """Return the layer itself if it is a site of the harvest.

    Raises:
        BadInput: it is not a site.
    """
    known = sites(store)
    if layer in known:
        return layer
    harvest = store.path
    remedy = nearest(layer, known)
    raise BadInput(f"site '{shown(layer)}' is not in harvest '{harvest}'; {remedy}")
