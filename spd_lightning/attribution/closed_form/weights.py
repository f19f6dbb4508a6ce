"""Edges that follow from the weights alone, without running a prompt (section A of docs/method.md).

Closed forms of edges are products of what the model does on a prompt and of what its weights are. The second part is
here, for every pair of components at once, and for each head where attention joins them:

    residual    residual writer → reader           U_i · γ V_j          γ: the gain of the norm before the reader
    mlp         first MLP map → down               U_i · V_j            φ', and a gate's other factor, left out
    ov          v → o, of each head                (U_i · V_j)_h
    qk          k, q: the score, of each head      (U_i · U_j)_h / √d   for a key at the query's own position

LayerNorm takes the mean off U_i. Norms' denominators depend on the prompt and are left out; all writers to a reader
share them. The score is what component i of k adds to it where component j of q asks, each at an inner activation of 1;
at other positions rotary angles turn it.
Components can be scaled, V up and U down, and do the same. So weights are those of components whose inputs have unit
length along V_i, read by V_j of unit length; of an embedding, whose tokens are what they are, V_i counts as its largest
entry. In `qk` both ends are such inputs.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spd_lightning.decomposition.model import ComponentModel
from spd_lightning.errors import BadInput

WeightKind = Literal["residual", "mlp", "ov", "qk"]


class Link(NamedTuple):
    """Two sites joined by weights alone, through one head where attention joins them."""

    source: str
    target: str
    kind: WeightKind
    head: int | None = None


def links(model: ComponentModel) -> list[Link]:
    """The pairs of sites of a decoder that are joined directly, by target in forward order; it need not be all sites.

    Raises:
        BadInput: the model is not a supported decoder.
    """
    target: Any = model.target
    if not getattr(target, "closed_forms", False):
        raise BadInput(
            f"weights: {type(target).__name__} is not a supported decoder; decompose a GPT-2, "
            "Llama, Mistral or Qwen2 checkpoint as decoder:NAME in place of hf:NAME"
        )
    found, writers = [], ["wte"]
    for k, block in enumerate(target.h):
        q, key, v, o = (f"h.{k}.attn.{x}_proj" for x in "qkvo")
        found += [Link(s, t, "residual") for t in (q, key, v) for s in writers]
        found += [Link(key, q, "qk", head) for head in range(block.attn.n_heads)]
        found += [Link(v, o, "ov", head) for head in range(block.attn.n_heads)]
        first, down = [f"h.{k}.mlp.{name}" for name in ("c_fc", "gate_proj", "up_proj")], f"h.{k}.mlp.down_proj"
        found += [Link(s, t, "residual") for t in first for s in (*writers, o)]
        found += [Link(s, down, "mlp") for s in first]
        writers += [o, down]
    found += [Link(s, "lm_head", "residual") for s in writers]
    return [link for link in found if link.source in model.sites and link.target in model.sites]


def weight_graph(model: ComponentModel, normalized: bool = True) -> Iterator[tuple[Link, Tensor]]:
    """The weight between every two components that are joined directly, a pair of sites at a time.

    Args:
        model: a decoder, of which all maps or some are decomposed.
        normalized: whether the scale of a component's V and U is taken out; if not, inner activations count as 1.

    Returns:
        Each link and its weights [components of the source, components of the target].

    Raises:
        BadInput: the model is not a supported decoder.
    """
    return ((link, weights(model, link, normalized)) for link in links(model))


@torch.no_grad()
def weights(model: ComponentModel, link: Link, normalized: bool = True) -> Float[Tensor, "sources targets"]:
    """The weights of one link."""
    found = _plain(model, link)
    if not normalized:
        return found
    sources, targets = _size(model, link.source)[:, None], _size(model, link.target)
    return found * sources * targets if link.kind == "qk" else found * sources / targets


def _plain(model: ComponentModel, link: Link) -> Float[Tensor, "sources targets"]:
    """The weights between inner activations."""
    source, reader = model[link.source], model[link.target]
    match link.kind:
        case "residual":
            return source.U @ _through(model.target.get_submodule(_norm_before(link.target)), reader.V)
        case "mlp":
            return source.U @ reader.V
    attn: Any = model.target.get_submodule(link.target.rpartition(".")[0])
    assert link.head is not None
    written = source.U.unflatten(1, (attn.n_kv_heads, -1))[:, link.head * attn.n_kv_heads // attn.n_heads]
    if link.kind == "ov":
        return written @ reader.V.unflatten(0, (attn.n_heads, -1))[link.head]
    asking = reader.U.unflatten(1, (attn.n_heads, -1))[:, link.head]
    return written @ asking.T / asking.shape[1] ** 0.5


def _norm_before(reader: str) -> str:
    """The norm that a map reads through."""
    if reader == "lm_head":
        return "norm_f"
    _, block, part, _ = reader.split(".")
    return f"h.{block}.norm_{1 if part == 'attn' else 2}"


def _through(norm: nn.Module, V: Float[Tensor, "d C"]) -> Float[Tensor, "d C"]:
    """Return readers as seen before a norm, ignoring its denominator."""
    match norm:
        case nn.RMSNorm():
            return norm.weight[:, None] * V
        case nn.LayerNorm():
            scaled = norm.weight[:, None] * V
            return scaled - scaled.mean(0)
    return V


def _size(model: ComponentModel, site: str) -> Float[Tensor, " C"]:
    """How long V is; 1 where it is zero."""
    V = model[site].V
    size = V.abs().amax(0) if model.sites[site].kind == "embedding" else V.norm(dim=0)
    return torch.where(size > 0, size, 1.0)
