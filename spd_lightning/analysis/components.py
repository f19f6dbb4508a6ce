"""Components across prompts: who answers to which input, how often each fires, how important it is
on average.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import polars as pl
from jaxtyping import Float32, Int64
from scipy.optimize import linear_sum_assignment

from spd_lightning.errors import BadInput, nearest
from spd_lightning.store import Store


def importance_matrix(
    store: Store, prompts: Sequence[int], layer: str, over: Literal["largest", "mean"] = "largest"
) -> Float32[np.ndarray, "prompt C"]:
    """Causal importance of every component of a site on the given prompts, one row a prompt.

    A component that is not a node at a position has importance 0 there; of several positions the
    largest counts, or the mean over all. Rows follow the order of `prompts`.

    Raises:
        BadInput: the harvest has no such site, or a file is damaged.
    """
    rows = pl.LazyFrame({"prompt_id": prompts}, schema={"prompt_id": pl.UInt64}).with_row_index(
        "row"
    )
    own = store.scan("nodes_by_component").filter(
        pl.col("layer") == site(store, layer), pl.col("kind") == "component"
    )
    largest = pl.col("importance").max()
    total = pl.col("importance").sum()
    cells = (
        own.join(rows, on="prompt_id")
        .group_by("row", "component")
        .agg(largest if over == "largest" else total)
    )
    held = store.collect(cells)
    matrix = np.zeros((len(prompts), store.manifest["C"][layer]), dtype=np.float32)
    matrix[held["row"].to_numpy(), held["component"].to_numpy()] = held["importance"].to_numpy()
    return matrix if over == "largest" else matrix / _positions(store, rows)[:, None]


def _positions(store: Store, rows: pl.LazyFrame) -> Float32[np.ndarray, " prompt"]:
    """How many positions each prompt has; a vector has one."""
    if store.manifest["kind"] == "vectors":
        return np.ones(store.collect(rows.select(pl.len())).item(), dtype=np.float32)
    held = store.scan("prompts").select("prompt_id", length=pl.col("token_ids").list.len())
    return (
        store.collect(rows.join(held, on="prompt_id", how="left").sort("row"))["length"]
        .to_numpy()
        .astype("f4")
    )


def identity_order(matrix: Float32[np.ndarray, "prompt C"]) -> Int64[np.ndarray, " C"]:
    """The order of columns that makes a matrix look most like the identity (Hungarian assignment).

    Each row in turn gets a column of its own such that the sum along the diagonal is largest;
    columns that no row claims, or claims with importance 0 only, follow: first those of larger sum.
    """
    rows, columns = linear_sum_assignment(matrix, maximize=True)
    claimed = columns[matrix[rows, columns] > 0]
    rest = np.setdiff1d(np.arange(matrix.shape[1]), claimed)
    return np.concatenate([claimed, rest[size_order(matrix[:, rest])]]).astype(np.int64)


def size_order(matrix: Float32[np.ndarray, "prompt C"]) -> Int64[np.ndarray, " C"]:
    """The order of columns that puts those of larger sum first."""
    return np.argsort(-matrix.sum(axis=0), kind="stable").astype(np.int64)


def component_summary(store: Store, layer: str) -> pl.DataFrame:
    """Density, mean causal importance, norm and aliveness of a site's components, one row each, in
    order of component.

    The store's counts are additive, so shards are summed before anything is divided: `density` =
    firings/positions, `mean_importance` = importance_sum/positions. `norm` is the Frobenius norm of
    U[c] V[:,c]ᵀ.

    Raises:
        BadInput: the harvest has no such site, or a file is damaged.
    """
    own = store.scan("components").filter(pl.col("layer") == site(store, layer))
    sums = [pl.col(name).sum() for name in ("firings", "positions", "importance_sum")]
    merged = own.group_by("component").agg(*sums, pl.col("norm").first(), pl.col("alive").first())
    shares = {
        "density": pl.col("firings") / pl.col("positions"),
        "mean_importance": pl.col("importance_sum") / pl.col("positions"),
    }
    return store.collect(
        merged.select("component", **shares, norm="norm", alive="alive").sort("component")
    )


def sites(store: Store) -> list[str]:
    """The layers of a harvest that have components, in forward order."""
    return [layer for layer in store.layers if store.manifest["C"].get(layer)]


def site(store: Store, layer: str) -> str:
    """The layer itself, if it is one of the harvest's sites.

    Raises:
        BadInput: it is not.
    """
    if layer not in sites(store):
        raise BadInput(
            f"site '{layer}' is not in harvest '{store.path}'; {nearest(layer, sites(store))}"
        )
    return layer
