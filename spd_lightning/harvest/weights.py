"""The weights-only graph of a run as a table: what needs no prompts."""

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
"""The columns of the table, and their types; `head` is null where no attention is between."""

MIN_SHARE = 0.3
"""The share of the largest weight into a component that others need to be written."""

Groups = Iterable[list[Link]]


def weight_table(
    model: ComponentModel,
    min_share: float = MIN_SHARE,
    bar: Callable[[Sequence[list[Link]]], Groups] = iter,
) -> pl.DataFrame:
    """Return the strongest weights between components, strongest first, whatever the prompt.

    Args:
        model: a decoder decomposed, or a HuggingFace model that has an equivalent decoder.
        min_share: of the weights of a kind into a component, all sources and heads together, those
            that are at least this share of the largest. Remnants (norm up to 5 % of their site's
            largest) have none.
        bar: what shows progress through the targets.

    Returns:
        One row a weight, with the columns of `COLUMNS`.

    Raises:
        BadInput: the model is not a supported decoder.
    """
    decoder = as_native_decoder(model, MODES["unmasked"])
    groups = [
        list(group)
        for _, group in groupby(links(decoder.model), lambda link: (link.target, link.kind))
    ]
    frames = [frame for group in bar(groups) for frame in _rows(decoder.model, group, min_share)]
    whole = pl.concat([pl.DataFrame(schema=COLUMNS), *frames])
    names = {theirs: own for own, theirs in decoder.names.items()}
    ends = (
        pl.col("source_layer", "target_layer").cast(pl.String).replace(names).cast(pl.Categorical())
    )
    return whole.with_columns(ends).sort(
        pl.col("weight").abs(), descending=True, maintain_order=True
    )


def _rows(model: ComponentModel, group: list[Link], min_share: float) -> Iterator[pl.DataFrame]:
    """The strong weights of one kind into the components of one site."""
    found = [(link, _of_sizeable(model, link)) for link in group]
    largest = torch.stack([values.abs().amax(0) for _, values in found]).amax(0)
    for link, values in found:
        source, target = ((values.abs() >= min_share * largest) & (values != 0)).nonzero(
            as_tuple=True
        )
        columns = {"source": array(source, np.uint32), "target": array(target, np.uint32)}
        columns["weight"] = array(values[source, target])
        ends = {
            "source_layer": link.source,
            "target_layer": link.target,
            "kind": link.kind,
            "head": link.head,
        }
        same = [pl.lit(value, dtype=COLUMNS[name]).alias(name) for name, value in ends.items()]
        yield pl.DataFrame(columns).with_columns(same).select(*COLUMNS)


def _of_sizeable(model: ComponentModel, link: Link) -> Tensor:
    """The weights of a link, zero where one of the two is a remnant."""
    source, target = (sizeable(model[site].V, model[site].U) for site in (link.source, link.target))
    return weights(model, link) * source[:, None] * target
