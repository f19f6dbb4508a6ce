"""The tables of a harvest: their columns, how their rows are ordered, and what a frame must be to become one."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from spd_lightning.errors import BadInput, nearest

SCHEMA_VERSION = 2
KINDS = ("component", "input", "embedding", "output", "rest", "bias")
"""What a node of a graph can be; `importance` is null for all but components."""

INDEX = "nodes_by_component"
"""A second copy of `nodes`, in another order: the prompts of a component lie together."""

_NODES = {
    "prompt_id": pl.UInt64,
    "node": pl.UInt32,
    "kind": pl.Enum(KINDS),
    "layer": pl.Categorical(),
    "pos": pl.UInt16,
    "component": pl.UInt32,
    "importance": pl.Float32,
    "activation": pl.Float32,
}
_PROMPTS = {
    "prompt_id": pl.UInt64,
    "token_ids": pl.List(pl.UInt32),
    "tokens": pl.List(pl.String),
    "source": pl.String,
    "split": pl.String,
}
_EDGES = {"prompt_id": pl.UInt64, "source": pl.UInt32, "target": pl.UInt32, "attribution": pl.Float32}
_OUTPUTS = {
    "prompt_id": pl.UInt64,
    "pos": pl.UInt16,
    "token_id": pl.UInt32,
    "token": pl.String,
    "ci_probability": pl.Float32,
    "ci_logit": pl.Float32,
    "target_probability": pl.Float32,
    "target_logit": pl.Float32,
}
_COMPONENTS = {
    "layer": pl.Categorical(),
    "component": pl.UInt32,
    "firings": pl.Int64,
    "positions": pl.Int64,
    "importance_sum": pl.Float64,
    "activation_sum": pl.Float64,
    "norm": pl.Float32,
    "alive": pl.Boolean,
}
_FRONTIER = {
    "prompt_id": pl.UInt64,
    "lambda": pl.Float64,
    "chosen": pl.Boolean,
    "nodes": pl.UInt32,
    "important": pl.UInt32,
    "pos": pl.UInt16,
    "label": pl.UInt32,
    "token": pl.String,
    **{f"loss_{masks}": pl.Float32 for masks in ("ci", "stochastic", "adversarial")},
    **{f"p_{masks}": pl.Float32 for masks in ("target", "ci", "stochastic", "adversarial")},
    "kept": pl.Float32,
    "adversary_steps": pl.UInt32,
    "steps": pl.UInt32,
}

TABLES: dict[str, pl.Schema] = {
    "prompts": pl.Schema(_PROMPTS),
    "nodes": pl.Schema(_NODES),
    INDEX: pl.Schema(_NODES),
    "edges": pl.Schema(_EDGES),
    "outputs": pl.Schema(_OUTPUTS),
    "components": pl.Schema(_COMPONENTS),
    "frontier": pl.Schema(_FRONTIER),
}
"""Columns of every table. `layer` is categorical here; in a store it is an Enum over the manifest's layers, in forward
order. `components` holds additive counts, one row a component and group; `norm` and `alive` are the same in each.
`frontier` holds circuits of several sizes for each prompt, of which the chosen one is its graph, and in a row without
λ what the importance function says itself: the components left
(`important`: above a stated importance), how far the answer at `pos` is from the target's, and the probability of a
label under the target, ci, stochastic and adversarial masks (null on vectors); `kept` is the share of the target's
answer that the adversary leaves."""

SORTED: dict[str, tuple[str, ...]] = {
    "prompts": (),
    "nodes": ("prompt_id", "node"),
    INDEX: ("layer", "component", "prompt_id", "pos"),
    "edges": ("prompt_id", "source", "target"),
    "outputs": ("prompt_id", "pos"),
    "components": ("layer", "component"),
    "frontier": ("prompt_id", "lambda"),
}
"""The order of a shard's rows; prompts stay as they came, and so do rows that the order does not tell apart."""


def prompt_hash(content: bytes) -> int:
    """The id of a prompt: 64 bits of its content's BLAKE2b hash, the same on every machine and in every sitting."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def schema(table: str, layers: Sequence[str]) -> dict[str, Any]:  # beartype cannot read pl.Schema, nor pl.DataType
    """A table's columns and their polars types in a store with these layers.

    Raises:
        BadInput: there is no such table.
    """
    if table not in TABLES:
        raise BadInput(f"table '{table}': not a table of a harvest; {nearest(table, TABLES)}")
    names = pl.Enum(list(layers))
    return {name: names if name == "layer" else dtype for name, dtype in TABLES[table].items()}


def ordered(table: str, frame: pl.DataFrame) -> pl.DataFrame:
    """The rows as a shard of the table has them."""
    return frame.sort(SORTED[table], maintain_order=True) if SORTED[table] else frame


def checked(tables: Mapping[str, pl.DataFrame], layers: Sequence[str]) -> dict[str, pl.DataFrame]:
    """One batch's frames in the store's types and orders, the index among them.

    Raises:
        ValueError: a frame is not what its table holds, or speaks of a prompt that is not in the batch.
    """
    frames = {table: ordered(table, _typed(table, frame, layers)) for table, frame in tables.items()}
    if "nodes" in frames:
        frames[INDEX] = ordered(INDEX, frames["nodes"])
    if "prompts" not in frames or frames["prompts"].is_empty():
        raise ValueError("table 'prompts': every batch needs its prompts, they are what resuming goes by")
    ids = frames["prompts"]["prompt_id"]
    if ids.is_duplicated().any():
        raise ValueError("table 'prompts', column 'prompt_id': a prompt is there twice")
    for table, frame in frames.items():
        if "prompt_id" in frame.columns and not frame["prompt_id"].is_in(ids.implode()).all():
            raise ValueError(f"table '{table}', column 'prompt_id': a prompt that is not in this batch's 'prompts'")
    return frames


def _typed(table: str, frame: pl.DataFrame, layers: Sequence[str]) -> pl.DataFrame:
    if table not in TABLES or table == INDEX:
        raise ValueError(f"table '{table}': not one that a harvest writes")
    wanted = schema(table, layers)
    for name in sorted({*wanted, *frame.columns}):
        if name not in wanted or name not in frame.columns:
            raise ValueError(f"table '{table}', column '{name}': {'missing' if name in wanted else 'unknown'}")
    return frame.select(_column(table, frame[name], wanted) for name in wanted)


def _column(table: str, column: pl.Series, wanted: Mapping[str, Any]) -> pl.Series:
    dtype = wanted[column.name]
    if column.dtype == dtype:
        return column
    if isinstance(dtype, pl.Enum) and column.dtype in (pl.String, pl.Categorical, pl.Enum):
        words = column.cast(pl.String)
        if unknown := set(words.unique()).difference(dtype.categories):
            raise ValueError(f"table '{table}', column '{column.name}': {unknown.pop()!r} is not one of its names")
        return words.cast(dtype)
    raise ValueError(f"table '{table}', column '{column.name}': {column.dtype}, where the store has {dtype}")
