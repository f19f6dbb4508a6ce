"""The contribution of each attention head to the edges of a graph (section A of docs/method.md).

An edge from queries, keys or values to an output map is a sum over heads. Its terms are the same closed forms with one
head at a time, recomputed for the edges of graphs that are there already: graphs without them cost what they did.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from spd_lightning.attribution.closed_form.rows import batch_of
from spd_lightning.attribution.closed_form.sinks import Tables
from spd_lightning.attribution.closed_form.trace import why_not
from spd_lightning.attribution.closed_form.walk import Graph
from spd_lightning.attribution.graph import EdgeTable, Mode, Subject, joined
from spd_lightning.decomposition.model import ComponentModel


class HeadTable(NamedTuple):
    """Contributions of heads to edges [rows]: prompt in the batch, numbers of both nodes there, head, and value."""

    prompt: Tensor
    source: Tensor
    target: Tensor
    head: Tensor
    attribution: Tensor


def no_heads(model: ComponentModel, mode: Mode) -> str | None:
    """Return the reason why a model's edges cannot be split by head, or None if they can."""
    if why := why_not(model, mode):
        return why
    target: Any = model.target
    maps = [name for k in range(len(target.h)) for name in _maps(k)]
    return next((f"'{name}' is not decomposed" for name in maps if name not in model.sites), None)


def _maps(block: int) -> list[str]:
    """The maps of a block's attention."""
    return [f"h.{block}.attn.{x}_proj" for x in "qkvo"]


def head_edges(of: Subject, edges: Iterable[EdgeTable]) -> Iterator[HeadTable]:
    """The terms of those edges that run through attention: over its heads, they add up to the edge.

    edges: of each prompt one table, as `walk` gives them of the same subject; terms of other edges are left out,
    and so are those across positions that are exactly zero. `no_heads` must have nothing to say against the model.
    """
    batch = batch_of(of)
    for prompt, kept in enumerate(edges):
        with torch.no_grad():
            found = list(_terms(Graph(batch, prompt, Tables(prompt)), kept))
        yield from found


def _terms(graph: Graph[EdgeTable], kept: EdgeTable) -> Iterator[HeadTable]:
    """The terms of one prompt's edges, head by head."""
    wanted = _pairs(kept).sort().values
    for k, block in enumerate(graph.target.h):
        for head in range(block.attn.n_heads) if graph.all_sites(*_maps(k)) else ():
            every = joined(list(graph.of_head(k, head)))
            rows = _among(_pairs(every), wanted)
            prompt, source, target, term = (column.index_select(0, rows) for column in every)
            yield HeadTable(prompt, source, target, torch.full_like(source, head), term)


def _pairs(edges: EdgeTable) -> Int[Tensor, " edges"]:
    """One number for both ends of each edge."""
    return edges.source.long() << 32 | edges.target.long()


def _among(pairs: Int[Tensor, " edges"], wanted: Int[Tensor, " kept"]) -> Int[Tensor, " rows"]:
    """The places of those pairs that are wanted; wanted: in ascending order."""
    if not len(wanted):
        return wanted
    at = torch.searchsorted(wanted, pairs).clamp(max=len(wanted) - 1)
    return (wanted[at] == pairs).nonzero()[:, 0]
