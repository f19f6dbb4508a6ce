"""The contribution of each attention head to the edges of a graph (section A of docs/method.md).

An edge from queries, keys or values to an output map is a sum over heads. Its terms follow from the
same closed forms, one head at a time. They are recomputed for the edges of graphs that exist
already, so graphs without them cost nothing extra.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from spd_lightning.attribution.closed_form.attention import add_attention_edges
from spd_lightning.attribution.closed_form.prompt import TracedPrompt, trace_batch
from spd_lightning.attribution.closed_form.sinks import TableSink
from spd_lightning.attribution.closed_form.trace import closed_form_obstacle
from spd_lightning.attribution.graph import EdgeTable, GraphSpec, Mode, joined
from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.targets.transformer import Decoder


class HeadTable(NamedTuple):
    """Contributions of heads to edges [rows]: prompt, numbers of both nodes, head, and value."""

    prompt: Tensor
    source: Tensor
    target: Tensor
    head: Tensor
    attribution: Tensor


def head_edges_obstacle(model: ComponentModel, mode: Mode) -> str | None:
    """Return the reason why a model's edges cannot be split by head, or None if they can be."""
    if why := closed_form_obstacle(model, mode):
        return why
    assert isinstance(model.target, Decoder)
    for block in model.target.layout.blocks:
        for name in block.attention_maps:
            if name not in model.sites:
                return f"'{name}' is not decomposed"
    return None


def head_edges(spec: GraphSpec, edges: Iterable[EdgeTable]) -> Iterator[HeadTable]:
    """Split the edges that run through attention into terms that add up to them, one for each head.

    Args:
        spec: the specification of the graphs; it must have no `head_edges_obstacle`.
        edges: one table for each prompt, as the closed forms give them for the same specification.
            Terms of other edges are left out, and so are terms between positions that are exactly
            zero.
    """
    batch = trace_batch(spec)
    for number, kept in enumerate(edges):
        with torch.no_grad():
            terms = list(_terms(TracedPrompt(batch, number), kept))
        yield from terms


def _terms(prompt: TracedPrompt, kept: EdgeTable) -> Iterator[HeadTable]:
    """Yield the terms of one prompt's edges, head by head."""
    wanted = _pair_keys(kept).sort().values
    for block in prompt.layout.blocks:
        if not prompt.all_sites(*block.attention_maps):
            continue
        for head in range(prompt.target.get_submodule(block.attn).n_heads):
            tables = list[EdgeTable]()
            sink = TableSink(prompt.prompt, tables.append)
            add_attention_edges(prompt, block, sink, heads=slice(head, head + 1))
            every = joined(tables)
            terms = every.select(_rows_among(_pair_keys(every), wanted))
            heads = torch.full_like(terms.source, head)
            yield HeadTable(terms.prompt, terms.source, terms.target, heads, terms.attribution)


def _pair_keys(edges: EdgeTable) -> Int[Tensor, " edges"]:
    """Return one number that stands for both ends of each edge."""
    return edges.source.long() << 32 | edges.target.long()


def _rows_among(keys: Int[Tensor, " edges"], wanted: Int[Tensor, " kept"]) -> Int[Tensor, " rows"]:
    """Return the rows whose keys are wanted; `wanted` is in ascending order."""
    if not len(wanted):
        return wanted
    place = torch.searchsorted(wanted, keys).clamp(max=len(wanted) - 1)
    return (wanted[place] == keys).nonzero()[:, 0]
