"""The weights-only graph of a run as a table, which needs no prompts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from spd_lightning.attribution.closed_form.weights import Link, links, weights
from spd_lightning.attribution.graph import MODES
from spd_lightning.decomposition.metrics import sizeable
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.harvest.native_decoder import as_native_decoder
from spd_lightning.harvest.rows import array

COLUMNS: dict[str, Any] = {
    "source_layer": pl.Categorical(),
    "source": pl.UInt32,
    "target_layer": pl.Categorical(),
    "target": pl.UInt32,
    "kind": pl.Enum(["residual", "mlp", "ov", "qk"]),
    "head": pl.UInt16,
    "weight": pl.Float32,
}
"""The columns of the table, and their types; `head` is null if a weight passes no attention."""

MIN_SHARE = 0.3
"""The share of the largest weight into a component below which weights are not written."""

Groups = Iterable[list[Link]]


def weight_table(
    model: ComponentModel,
    min_share: float = MIN_SHARE,
    bar: Callable[[Sequence[list[Link]]], Groups] = iter,
) -> pl.DataFrame:
    """Return the strongest weights between components, sorted by size.

    Args:
        model: a decomposed decoder, or a HuggingFace model that has an equivalent decoder.
        min_share: the least share that a weight needs of the largest weight of its kind into the
            same component, over all sources and heads. Remnants (components with a norm of at most
            5 % of their site's largest) have no weights.
        bar: a function that shows progress over the targets.

    Returns:
        One row per weight, with the columns of `COLUMNS`.

    Raises:
        BadInput: the model is not a supported decoder.

    Examples:
        >>> from spd_lightning import ComponentModel, Decoder, weight_table
        >>> decoder = Decoder(vocab=50, d_model=16, n_layers=1, n_heads=4, context=12)
        >>> table = weight_table(ComponentModel(decoder, sites={"h.*.mlp.*": 9}), min_share=1.0)
        >>> table.columns
        ['source_layer', 'source', 'target_layer', 'target', 'kind', 'head', 'weight']
        >>> table.height  # the largest weight into each component of the second map
        9
    """
    mode = MODES["unmasked"]
    decoder = as_native_decoder(model, mode)
    every_link = links(decoder.model)
    by_target = groupby(every_link, lambda link: (link.target, link.kind))
    groups = [list(group) for _, group in by_target]
    frames = [pl.DataFrame(schema=COLUMNS)]
    for group in bar(groups):
        frames += _rows(decoder.model, group, min_share)
    rows = pl.concat(frames)
    model_names = {decoder_name: name for name, decoder_name in decoder.names.items()}
    layers = pl.col("source_layer", "target_layer")
    renamed = layers.cast(pl.String).replace(model_names)
    rows = rows.with_columns(renamed.cast(pl.Categorical()))
    size = pl.col("weight").abs()
    return rows.sort(size, descending=True, maintain_order=True)


def _rows(model: ComponentModel, group: list[Link], min_share: float) -> Iterator[pl.DataFrame]:
    """Yield the strong weights of one kind into the components of one site, link by link."""
    values_by_link = [_weights_of_sizeable(model, link) for link in group]  # [C_source, C] each
    largest_by_link = [values.abs().amax(0) for values in values_by_link]
    largest = torch.stack(largest_by_link).amax(0)  # [C]
    for link, values in zip(group, values_by_link, strict=True):
        least = min_share * largest
        is_large = values.abs() >= least
        strong = is_large & (values != 0)
        source, target = strong.nonzero(as_tuple=True)
        columns = {
            "source": array(source, np.uint32),
            "target": array(target, np.uint32),
            "weight": array(values[source, target]),
        }
        constants = {
            "source_layer": link.source,
            "target_layer": link.target,
            "kind": link.kind,
            "head": link.head,
        }
        frame = pl.DataFrame(columns)
        for name, value in constants.items():
            frame = frame.with_columns(pl.lit(value, dtype=COLUMNS[name]).alias(name))
        yield frame.select(*COLUMNS)


def _weights_of_sizeable(model: ComponentModel, link: Link) -> Tensor:
    """Return the weights of a link [C_source, C_target], with zeros for remnants at either end."""
    source = model[link.source]
    target = model[link.target]
    row_stays = sizeable(source.V, source.U)  # [C_source]
    row_stays = row_stays.unsqueeze(1)
    column_stays = sizeable(target.V, target.U)  # [C_target]
    values = weights(model, link)
    values = values * row_stays
    return values * column_stays
