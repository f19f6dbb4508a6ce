"""The tables of a harvest: their types, the order of their rows, and checks of new rows."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from spd_lightning.errors import BadInput, nearest
from spd_lightning.store import columns as described
from spd_lightning.store.columns import INDEX

SCHEMA_VERSION = 4

TABLES: dict[str, pl.Schema] = {
    name: pl.Schema({column: dtype for column, (dtype, _) in table.columns.items()})
    for name, table in described.TABLES.items()
}
"""The types of the columns of every table; `store.columns` says what they hold."""

SORTED: dict[str, tuple[str, ...]] = {
    name: table.sorted_by for name, table in described.TABLES.items()
}
"""The columns by which the rows of a shard are sorted."""

SAME = ("norm",)
"""Numbers in tables of sums that depend on the weights alone, so that they are not added up."""


def finite(value: pl.Expr) -> pl.Expr:
    """Replace NaN and infinite values by null."""
    return pl.when(value.is_finite()).then(value)


_EDGE = pl.col("attribution").cast(pl.Float64)
_FACTOR = pl.col("factor").cast(pl.Float64)
_MEASURED = pl.col("change").cast(pl.Float64) / (_FACTOR - 1)  # the edge predicts this quotient
_SQUARED_ERROR = (_MEASURED - _EDGE).pow(2).sum() / _EDGE.pow(2).sum()

AGREEMENT: dict[str, pl.Expr] = {
    "checked": pl.len().cast(pl.UInt32),
    "correlation": finite(pl.corr(_EDGE, _MEASURED)),
    "relative_error": finite(_SQUARED_ERROR.sqrt()),
}
"""The agreement of the rows of `checks` with their edges.

`relative_error` is ‖change/(factor − 1) − edge‖/‖edge‖. `correlation` is Pearson's correlation of
change/(factor − 1) and edge; it is null unless there are two different edges.
"""


def prompt_hash(content: bytes) -> int:
    """Return the id of a prompt: a 64-bit BLAKE2b hash of its content, equal on all machines."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


# The result is typed as a plain dict, since beartype cannot check pl.Schema or pl.DataType.
def schema(table: str, layers: Sequence[str]) -> dict[str, Any]:
    """Return the columns of a table and their polars types in a store with these layers.

    Raises:
        BadInput: the table does not exist.
    """
    if table not in TABLES:
        raise BadInput(f"table '{table}': not a table of a harvest; {nearest(table, TABLES)}")
    layer_names = pl.Enum(list(layers))
    columns: dict[str, Any] = {}
    for name, dtype in TABLES[table].items():
        columns[name] = layer_names if dtype == pl.Categorical else dtype
    return columns


def added(table: str, frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Return the rows of several frames of a table as one frame.

    In the tables of sums, rows with the same keys are added up.
    """
    rows = pl.concat(frames)
    if len(frames) == 1 or described.TABLES[table].merge != "add":
        return rows
    return summed(table, rows.lazy()).collect()


def summed(table: str, rows: pl.LazyFrame) -> pl.LazyFrame:
    """Add up the rows of a table of sums that have the same keys.

    Names, and facts that depend on the weights alone, are equal in all of these rows; the first is
    kept.
    """
    keys = list(SORTED[table])
    totals = []
    for name, dtype in TABLES[table].items():
        if name in keys:
            continue
        column = pl.col(name)
        is_same = name in SAME or not dtype.is_numeric()
        totals.append(column.first() if is_same else column.sum())
    columns = TABLES[table].names()
    return rows.group_by(keys).agg(totals).select(columns)


def smallest(rows: pl.DataFrame, by: Sequence[str], k: int | pl.Expr) -> pl.DataFrame:
    """Keep the k rows with the smallest keys of each group; equal keys are ordered by place."""
    in_order = rows.sort(*by, "key", "prompt_id", "pos")
    place_in_group = pl.int_range(pl.len()).over(by)
    return in_order.filter(place_in_group < k)


def trimmed(examples: pl.DataFrame, kept: Mapping[str, int]) -> pl.DataFrame:
    """Keep the examples of each component that a harvest of all their prompts would have kept (H1).

    kept: the number of examples of each kind.
    """
    number = pl.col("kind").cast(pl.String).replace_strict(kept, default=0, return_dtype=pl.Int64)
    return smallest(examples, ["layer", "component", "kind"], number)


def ordered(table: str, frame: pl.DataFrame) -> pl.DataFrame:
    """Sort the rows of a frame as a shard of the table requires."""
    if not SORTED[table]:
        return frame
    return frame.sort(SORTED[table], maintain_order=True)


def checked(tables: Mapping[str, pl.DataFrame], layers: Sequence[str]) -> dict[str, pl.DataFrame]:
    """Convert the frames of one batch to the types and orders of the store, and add the index.

    Raises:
        ValueError: a frame has the wrong columns, or rows of a prompt that is not in the batch.
    """
    frames = {}
    for table, frame in tables.items():
        frames[table] = ordered(table, _typed(table, frame, layers))
    if "nodes" in frames:
        frames[INDEX] = ordered(INDEX, frames["nodes"])
    if "prompts" not in frames or frames["prompts"].is_empty():
        raise ValueError(
            "table 'prompts': every batch needs its prompts, since a resumed harvest skips them"
        )
    ids = frames["prompts"]["prompt_id"]
    if ids.is_duplicated().any():
        raise ValueError("table 'prompts', column 'prompt_id': a prompt appears twice")
    for table, frame in frames.items():
        if "prompt_id" not in frame.columns:
            continue
        if not frame["prompt_id"].is_in(ids.implode()).all():
            raise ValueError(
                f"table '{table}', column 'prompt_id': a prompt that is not in this batch's "
                "'prompts'"
            )
    return frames


def _typed(table: str, frame: pl.DataFrame, layers: Sequence[str]) -> pl.DataFrame:
    if table not in TABLES or table == INDEX:
        raise ValueError(f"table '{table}': not one that a harvest writes")
    types = schema(table, layers)
    names = {*types, *frame.columns}
    for name in sorted(names):
        if name not in types:
            raise ValueError(f"table '{table}', column '{name}': unknown")
        if name not in frame.columns:
            raise ValueError(f"table '{table}', column '{name}': missing")
    columns = []
    for name, dtype in types.items():
        columns.append(_column(table, frame[name], dtype))
    return frame.select(columns)


def _column(table: str, column: pl.Series, dtype: Any) -> pl.Series:
    """Return a column in the type of the store; names become values of its Enum."""
    if column.dtype == dtype:
        return column
    if isinstance(dtype, pl.Enum) and column.dtype in (pl.String, pl.Categorical, pl.Enum):
        names = column.cast(pl.String)
        unknown = set(names.unique()).difference(dtype.categories)
        if unknown:
            raise ValueError(
                f"table '{table}', column '{column.name}': {unknown.pop()!r} is not one of its "
                "names"
            )
        return names.cast(dtype)
    raise ValueError(
        f"table '{table}', column '{column.name}': {column.dtype}, where the store has {dtype}"
    )
