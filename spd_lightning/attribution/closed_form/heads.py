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
from spd_lightning.targets.decoder_layout import BlockLayout
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
    for number, prompt_edges in enumerate(edges):
        prompt = TracedPrompt(batch, number)
        with torch.no_grad():
            terms = list(_terms(prompt, prompt_edges))
        yield from terms


def _terms(prompt: TracedPrompt, edges: EdgeTable) -> Iterator[HeadTable]:
    """Yield the terms of one prompt's edges, head by head."""
    wanted = _pair_keys(edges).sort().values
    for block in prompt.layout.blocks:
        if not prompt.all_sites(*block.attention_maps):
            continue
        n_heads = prompt.target.get_submodule(block.attn).n_heads
        for head in range(n_heads):
            every_term = _edges_through(prompt, block, head)
            keys = _pair_keys(every_term)
            terms = every_term.select(_rows_among(keys, wanted))
            yield HeadTable(
                prompt=terms.prompt,
                source=terms.source,
                target=terms.target,
                head=torch.full_like(terms.source, head),
                attribution=terms.attribution,
            )


def _edges_through(prompt: TracedPrompt, block: BlockLayout, head: int) -> EdgeTable:
    """Return the edges through a single head, as if all others were constants."""
    tables = list[EdgeTable]()
    sink = TableSink(prompt.prompt, tables.append)
    only_head = slice(head, head + 1)
    add_attention_edges(prompt, block, sink, only_head)
    return joined(tables)


def _pair_keys(edges: EdgeTable) -> Int[Tensor, " edges"]:
    """Return one number that stands for both ends of each edge.

    The source is in the upper 32 bits, the target in the lower ones.
    """
    upper = edges.source.long() << 32
    return upper | edges.target.long()


def _rows_among(
    keys: Int[Tensor, " edges"], wanted: Int[Tensor, " wanted"]
) -> Int[Tensor, " rows"]:
    """Return the rows whose keys are wanted; `wanted` is in ascending order."""
    if not len(wanted):
        return wanted
    last = len(wanted) - 1
    place = torch.searchsorted(wanted, keys)  # [edges]; len(wanted) for keys above all wanted ones
    place = place.clamp(max=last)
    is_wanted = wanted[place] == keys
    return is_wanted.nonzero()[:, 0]
