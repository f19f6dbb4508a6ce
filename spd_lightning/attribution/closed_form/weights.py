"""Edges that follow from the weights alone, without running a prompt (section A of docs/method.md).

Closed forms of edges are products of what the model does on a prompt and of its weights. This
module computes the second part, for every pair of components at once, and for each head where
attention joins them:

    residual    residual writer → reader     U_i · γ V_j         γ: gain of the norm between
    mlp         first MLP map → down         U_i · V_j           without φ' and the other gate
    ov          v → o, of each head          (U_i · V_j)_h
    qk          score of k and q, by head    (U_i · U_j)_h / √d  for a key at the query's position

LayerNorm subtracts the mean of U_i. Denominators of norms depend on the prompt and are left out;
all writers to a reader share them. The score in `qk` is what component i of k adds to it if
component j of q has an inner activation of 1, as i has. At other positions the rotary angles change
it.

If V is scaled up and U down, a component does the same. So weights are those of components whose
inputs have unit length along V_i, read by V_j of unit length. For an embedding, whose inputs are
tokens, V_i counts as its largest entry. In `qk` both ends are such inputs.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.errors import BadInput
from spd_lightning.targets.decoder_layout import BlockLayout
from spd_lightning.targets.transformer import Decoder

WeightKind = Literal["residual", "mlp", "ov", "qk"]


class Link(NamedTuple):
    """Two sites that are joined by weights alone; through one head if attention joins them."""

    source: str
    target: str
    kind: WeightKind
    head: int | None = None


def links(model: ComponentModel) -> list[Link]:
    """Return the pairs of sites of a decoder that are joined directly, by target in forward order.

    Raises:
        BadInput: the model is not a supported decoder.
    """
    decoder = model.target
    if not isinstance(decoder, Decoder):
        raise BadInput(
            f"weights: {type(decoder).__name__} is not a supported decoder; decompose a GPT-2, "
            "Llama, Mistral or Qwen2 checkpoint as decoder:NAME in place of hf:NAME"
        )
    layout = decoder.layout
    every = list[Link]()
    writers = [layout.embeddings[0]]
    for block in layout.blocks:
        attn: Any = decoder.get_submodule(block.attn)
        every += _block_links(block, writers, attn.n_heads)
        # All blocks behind this one read what it writes.
        writers += [block.o_proj, block.down_proj]
    every += [Link(writer, layout.unembedding, "residual") for writer in writers]
    sites = model.sites
    return [link for link in every if link.source in sites and link.target in sites]


def _block_links(block: BlockLayout, writers: list[str], n_heads: int) -> Iterator[Link]:
    """Yield the links into and inside a block; writers: the maps that write before it."""
    q, k, v = block.qkv
    for reader in (q, k, v):
        for writer in writers:
            yield Link(writer, reader, "residual")
    for head in range(n_heads):
        yield Link(k, q, "qk", head)
    for head in range(n_heads):
        yield Link(v, block.o_proj, "ov", head)
    for reader in block.neuron_maps:
        for writer in (*writers, block.o_proj):
            yield Link(writer, reader, "residual")
    for writer in block.neuron_maps:
        yield Link(writer, block.down_proj, "mlp")


def weight_graph(
    model: ComponentModel, normalized: bool = True
) -> Iterator[tuple[Link, Float[Tensor, "sources targets"]]]:
    """Yield the weights between all components that are joined directly, by pair of sites.

    Args:
        model: a decomposed decoder; not all of its maps need to be sites.
        normalized: whether the scale of a component's V and U is taken out; if not, inner
            activations count as 1.

    Returns:
        Each link and its weights.

    Raises:
        BadInput: the model is not a supported decoder.

    Examples:
        >>> from collections import Counter
        >>> from spd_lightning import ComponentModel, Decoder, weight_graph
        >>> decoder = Decoder(vocab=50, d_model=16, n_layers=1, n_heads=4, context=12)
        >>> model = ComponentModel(decoder, sites={"h.*.attn.*": 6, "h.*.mlp.*": 9})
        >>> Counter(link.kind for link, weights in weight_graph(model))
        Counter({'qk': 4, 'ov': 4, 'residual': 1, 'mlp': 1})
    """
    every = links(model)
    return ((link, weights(model, link, normalized)) for link in every)


@torch.no_grad()
def weights(
    model: ComponentModel, link: Link, normalized: bool = True
) -> Float[Tensor, "sources targets"]:
    """Return the weights of one link."""
    plain = _between_inner_activations(model, link)
    if not normalized:
        return plain
    source_length = _read_length(model, link.source)
    target_length = _read_length(model, link.target)
    by_source = plain * source_length[:, None]
    if link.kind == "qk":  # both ends are activations
        return by_source * target_length
    return by_source / target_length


def _between_inner_activations(
    model: ComponentModel, link: Link
) -> Float[Tensor, "sources targets"]:
    """Return the weights between inner activations of 1."""
    U = model[link.source].U  # [sources, d]
    reader = model[link.target]
    if link.kind == "mlp":
        return U @ reader.V
    if link.kind == "residual":
        return U @ _read_before_norm(model, link.target)

    # Attention: queries, and what o_proj reads, have a part for each head; keys and values have one
    # for each group of heads that share it.
    assert link.head is not None
    decoder: Any = model.target
    block = link.target.rpartition(".")[0]
    attn = decoder.get_submodule(block)
    kv_head = link.head * attn.n_kv_heads // attn.n_heads
    written = U.unflatten(1, (attn.n_kv_heads, -1))  # [sources, kv_head, d_head]
    written = written[:, kv_head]  # [sources, d_head]
    if link.kind == "ov":
        read = reader.V.unflatten(0, (attn.n_heads, -1))  # [head, d_head, targets]
        return written @ read[link.head]
    queries = reader.U.unflatten(1, (attn.n_heads, -1))  # [targets, head, d_head]
    queries = queries[:, link.head]  # [targets, d_head]
    d_head = queries.shape[1]
    return written @ queries.T / d_head**0.5


def _read_before_norm(model: ComponentModel, site: str) -> Float[Tensor, "d C"]:
    """Return what a site reads from the residual stream, ignoring the norm's denominator."""
    decoder: Any = model.target
    V = model[site].V
    name = decoder.layout.norm_before(site)
    norm = decoder.get_submodule(name)
    match norm:
        case nn.RMSNorm():
            return norm.weight[:, None] * V  # γ V
        case nn.LayerNorm():
            scaled = norm.weight[:, None] * V
            mean = scaled.mean(0)
            return scaled - mean
    return V


def _read_length(model: ComponentModel, site: str) -> Float[Tensor, " C"]:
    """Return the length of each V; 1 if it is zero."""
    V = model[site].V  # [d, C]
    if model.sites[site].kind == "embedding":
        # Its inputs are tokens, and each reads a single row of V.
        length = V.abs().amax(0)
    else:
        length = V.norm(dim=0)
    return torch.where(length > 0, length, 1.0)
