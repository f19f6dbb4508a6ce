"""The tables of a harvest: their columns, how their rows are ordered, and what a frame must be to
become one.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from spd_lightning.errors import BadInput, nearest

SCHEMA_VERSION = 3
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
_EDGES = {
    "prompt_id": pl.UInt64,
    "source": pl.UInt32,
    "target": pl.UInt32,
    "attribution": pl.Float32,
}
_HEAD_EDGES = {
    "prompt_id": pl.UInt64,
    "source": pl.UInt32,
    "target": pl.UInt32,
    "head": pl.UInt16,
    "attribution": pl.Float32,
}
_CHECKS = {
    "prompt_id": pl.UInt64,
    "source": pl.UInt32,
    "target": pl.UInt32,
    "attribution": pl.Float32,
    "factor": pl.Float32,
    "change": pl.Float32,
}
_GRAPHS = {
    "prompt_id": pl.UInt64,
    "nodes": pl.UInt32,
    "edges": pl.UInt32,
    "edges_total": pl.UInt32,
    "gap": pl.Float64,
    "checked": pl.UInt32,
    "correlation": pl.Float64,
    "relative_error": pl.Float64,
}
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

_DATASET_EDGES = {
    "source_kind": pl.Enum(KINDS),
    "source_layer": pl.Categorical(),
    "source": pl.UInt32,
    "target_layer": pl.Categorical(),
    "target": pl.UInt32,
    "edges": pl.UInt64,
    "sum": pl.Float64,
    "sum_abs_target": pl.Float64,
    "prompt_square_sum": pl.Float64,
    "prompt_square_sum_abs_target": pl.Float64,
}
_DATASET_NODES = {
    "kind": pl.Enum(KINDS),
    "layer": pl.Categorical(),
    "component": pl.UInt32,
    "firings": pl.Int64,
    "positions": pl.Int64,
    "importance_sum": pl.Float64,
    "activation_square_sum": pl.Float64,
}

TABLES: dict[str, pl.Schema] = {
    "prompts": pl.Schema(_PROMPTS),
    "nodes": pl.Schema(_NODES),
    INDEX: pl.Schema(_NODES),
    "edges": pl.Schema(_EDGES),
    "head_edges": pl.Schema(_HEAD_EDGES),
    "checks": pl.Schema(_CHECKS),
    "graphs": pl.Schema(_GRAPHS),
    "outputs": pl.Schema(_OUTPUTS),
    "components": pl.Schema(_COMPONENTS),
    "dataset_edges": pl.Schema(_DATASET_EDGES),
    "dataset_nodes": pl.Schema(_DATASET_NODES),
    "frontier": pl.Schema(_FRONTIER),
}
"""Columns of every table. Layers are categorical here; in a store they are an Enum over the
manifest's, in forward order. `components` holds additive counts, one row a component and group;
`norm` and `alive` are the same in each. `dataset_edges` and `dataset_nodes` hold sums over a
group's prompts: a component there may be the row of an embedding, and `sum_abs_target` is the sum
of edges to |activation|. `prompt_square_sum` and `prompt_square_sum_abs_target` are sums over
prompts of the squares of each prompt's own two sums, from which readers make intervals. `tokens` of
`prompts` are labels: the text of a token, or `<0xC3>` for each byte of a token that holds only a
part of a character. `labels.joined` gives the text back. `head_edges` holds what each attention
head adds to an edge through attention: its rows of an edge add up to it. `checks` holds edges that
were tried: what their target gained when their source was multiplied by a factor. `graphs` says of
each prompt how many edges were written, of how many; how far in-edges are from adding up; how
checks agree. `frontier` holds circuits of several sizes for each prompt, of which the chosen one is
its graph, and in a row without λ what the importance function says itself: the components left
(`important`: above a stated importance), how far the answer at `pos` is from the target's, and the
probability of a label under the target, ci, stochastic and adversarial masks (null on vectors);
`kept` is the share of the target's answer that the adversary leaves.
"""

SORTED: dict[str, tuple[str, ...]] = {
    "prompts": (),
    "nodes": ("prompt_id", "node"),
    INDEX: ("layer", "component", "prompt_id", "pos"),
    "edges": ("prompt_id", "source", "target"),
    "head_edges": ("prompt_id", "source", "target", "head"),
    "checks": ("prompt_id", "source", "target"),
    "graphs": ("prompt_id",),
    "outputs": ("prompt_id", "pos"),
    "components": ("layer", "component"),
    "dataset_edges": ("target_layer", "target", "source_layer", "source_kind", "source"),
    "dataset_nodes": ("layer", "kind", "component"),
    "frontier": ("prompt_id", "lambda"),
}
"""The order of a shard's rows; prompts stay as they came, and so do rows that the order does not
tell apart.
"""


_EDGE = pl.col("attribution").cast(pl.Float64)
_TRIED = pl.col("change").cast(pl.Float64) / (
    pl.col("factor").cast(pl.Float64) - 1
)  # what the edge predicts


def finite(value: pl.Expr) -> pl.Expr:
    """Null where a number is none, or infinite."""
    return pl.when(value.is_finite()).then(value)


AGREEMENT: dict[str, pl.Expr] = {
    "checked": pl.len().cast(pl.UInt32),
    "correlation": finite(pl.corr(_EDGE, _TRIED)),
    "relative_error": finite(((_TRIED - _EDGE).pow(2).sum() / _EDGE.pow(2).sum()).sqrt()),
}
"""How far the rows of `checks` bear their edges out: ‖change/(factor − 1) − edge‖/‖edge‖, and
Pearson's correlation of the two (null where there are not two different edges).
"""


def prompt_hash(content: bytes) -> int:
    """The id of a prompt: 64 bits of its content's BLAKE2b hash, the same on every machine and in
    every sitting.
    """
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def schema(
    table: str, layers: Sequence[str]
) -> dict[str, Any]:  # beartype cannot read pl.Schema, nor pl.DataType
    """A table's columns and their polars types in a store with these layers.

    Raises:
        BadInput: there is no such table.
    """
    if table not in TABLES:
        raise BadInput(f"table '{table}': not a table of a harvest; {nearest(table, TABLES)}")
    names = pl.Enum(list(layers))
    return {
        name: names if dtype == pl.Categorical else dtype for name, dtype in TABLES[table].items()
    }


def added(table: str, frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Frames of one table as one; rows of the same two ends, or of the same node, are added up
    where they are sums.
    """
    whole = pl.concat(frames)
    if len(frames) == 1 or not table.startswith("dataset_"):
        return whole
    keys = list(SORTED[table])
    return whole.group_by(keys).sum().select(whole.columns)


def ordered(table: str, frame: pl.DataFrame) -> pl.DataFrame:
    """The rows as a shard of the table has them."""
    return frame.sort(SORTED[table], maintain_order=True) if SORTED[table] else frame


def checked(tables: Mapping[str, pl.DataFrame], layers: Sequence[str]) -> dict[str, pl.DataFrame]:
    """One batch's frames in the store's types and orders, the index among them.

    Raises:
        ValueError: a frame is not what its table holds, or speaks of a prompt that is not in the
            batch.
    """
    frames = {
        table: ordered(table, _typed(table, frame, layers)) for table, frame in tables.items()
    }
    if "nodes" in frames:
        frames[INDEX] = ordered(INDEX, frames["nodes"])
    if "prompts" not in frames or frames["prompts"].is_empty():
        raise ValueError(
            "table 'prompts': every batch needs its prompts, they are what resuming goes by"
        )
    ids = frames["prompts"]["prompt_id"]
    if ids.is_duplicated().any():
        raise ValueError("table 'prompts', column 'prompt_id': a prompt is there twice")
    for table, frame in frames.items():
        if "prompt_id" in frame.columns and not frame["prompt_id"].is_in(ids.implode()).all():
            raise ValueError(
                f"table '{table}', column 'prompt_id': a prompt that is not in this batch's "
                "'prompts'"
            )
    return frames


def _typed(table: str, frame: pl.DataFrame, layers: Sequence[str]) -> pl.DataFrame:
    if table not in TABLES or table == INDEX:
        raise ValueError(f"table '{table}': not one that a harvest writes")
    wanted = schema(table, layers)
    for name in sorted({*wanted, *frame.columns}):
        if name not in wanted or name not in frame.columns:
            raise ValueError(
                f"table '{table}', column '{name}': {'missing' if name in wanted else 'unknown'}"
            )
    return frame.select(_column(table, frame[name], wanted) for name in wanted)


def _column(table: str, column: pl.Series, wanted: Mapping[str, Any]) -> pl.Series:
    dtype = wanted[column.name]
    if column.dtype == dtype:
        return column
    if isinstance(dtype, pl.Enum) and column.dtype in (pl.String, pl.Categorical, pl.Enum):
        words = column.cast(pl.String)
        if unknown := set(words.unique()).difference(dtype.categories):
            raise ValueError(
                f"table '{table}', column '{column.name}': {unknown.pop()!r} is not one of its "
                "names"
            )
        return words.cast(dtype)
    raise ValueError(
        f"table '{table}', column '{column.name}': {column.dtype}, where the store has {dtype}"
    )
