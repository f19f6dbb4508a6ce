"""Edges through attention whose four maps are all sites (section A of docs/method.md).

With w = m ∘ a, p_h the pattern of head h, R the rotation to a position, and v̄_s = Σ_s' p_h[s, s']
v_s':

    v → o       w_i Σ_h p_h[s, s'] (U_i · V_j)_h
    q → o       w_i Σ_h Σ_s' p_h[s, s'] (k_s' · R U_i)_h ((v_s' − v̄_s) · V_j)_h / √d
    k → o       w_i Σ_h p_h[s, s'] (q_s · R U_i)_h ((v_s' − v̄_s) · V_j)_h / √d
"""

from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spd_lightning.attribution.closed_form.jvp import Heads
from spd_lightning.attribution.closed_form.prompt import NodeVectors, TracedPrompt
from spd_lightning.attribution.closed_form.sinks import AttentionEdges, EdgeSink, Nodes
from spd_lightning.targets.decoder_layout import BlockLayout

ALL_HEADS = slice(None)


def add_attention_edges(
    prompt: TracedPrompt, block: BlockLayout, sink: EdgeSink, heads: slice = ALL_HEADS
) -> None:
    """Compute the edges q, k and v → o of a block, through some heads or all of them."""
    edges = _AttentionEdges(prompt, block, heads)
    sink.add_attention(edges.values_to_output())
    if prompt.frozen:  # the pattern is a constant there
        return
    sink.add_same_position(*edges.queries_to_output())
    sink.add_attention(edges.keys_to_output())


class _AttentionEdges:
    """The attention of one block on one prompt, seen from the nodes of its output map.

    Attributes:
        left: V_j of every node of the output map, cut into heads [head, pos, K, d_head].
    """

    def __init__(self, prompt: TracedPrompt, block: BlockLayout, heads: slice):
        self.prompt, self.some = prompt, heads
        self.attn: Any = prompt.target.get_submodule(block.attn)
        self.q_proj, self.k_proj, self.v_proj = block.qkv
        self.heads: Heads = prompt.heads(block).select(heads)
        readers = prompt.reader(block.o_proj)
        self.target: Nodes = readers.nodes
        by_head = readers.vectors.unflatten(-1, (self.attn.n_heads, -1))  # [pos, K, head, d_head]
        self.left = by_head.permute(2, 0, 1, 3)[heads].contiguous()

    @cached_property
    def left_and_mean(self) -> Float[Tensor, "head pos K d_head_and_1"]:
        """V_j of each head, with one more column −v̄ · V_j."""
        mean = self.heads.pattern @ self.heads.v  # [head, pos, d_head]: v̄
        minus_mean = -(self.left * mean[:, :, None]).sum(-1, keepdim=True)
        return torch.cat([self.left, minus_mean], dim=-1)

    @cached_property
    def values_and_one(self) -> Float[Tensor, "head pos d_head_and_1"]:
        """v with a column of ones, so that its product with `left_and_mean` is (v − v̄) · V_j."""
        return nn.functional.pad(self.heads.v, (0, 1), value=1.0)

    def values_to_output(self) -> AttentionEdges:
        """v → o: the pattern times (U_i · V_j) of each head."""
        values = self.prompt.writer(self.v_proj)
        written = values.vectors[values.nodes.real]  # [sources, d]
        written = written.unflatten(-1, (self.attn.n_kv_heads, -1)).transpose(0, 1)
        weight = self.heads.pattern.index_select(2, values.nodes.pos)  # [head, pos, sources]
        return AttentionEdges(
            source=values.nodes,
            target=self.target,
            weight=weight,
            left=self.left,
            right=self._repeat(written),  # [head, sources, d_head]
            own=self.left.shape[-1],
        )

    def queries_to_output(self) -> tuple[Nodes, Nodes, Float[Tensor, "pos K J"]]:
        """q → o: within each position, summed over the positions s' that the query attends to."""
        queries = self.prompt.writer(self.q_proj)
        rotated = self._rotate(queries, self.attn.n_heads)[self.some]
        pattern = (self.heads.pattern * self.heads.scale)[:, :, None]  # [head, pos, 1, pos]
        scores = every_product(rotated, self.heads.k) * pattern  # [head, pos, K, pos]
        gains = every_product(self.left_and_mean, self.values_and_one)  # [head, pos, J, pos]
        by_position = (x.permute(1, 2, 0, 3).flatten(2) for x in (scores, gains))
        scores, gains = by_position  # [pos, K, head * pos], [pos, J, head * pos]
        return queries.nodes, self.target, scores @ gains.transpose(1, 2)

    def keys_to_output(self) -> AttentionEdges:
        """k → o: the change of the score of the query, times (v_s' − v̄_s) · V_j."""
        keys = self.prompt.writer(self.k_proj)
        pos = keys.nodes.pos
        rotated = self._rotate(keys, self.attn.n_kv_heads)[:, keys.nodes.real]
        scores = self.heads.q @ self._repeat(rotated).transpose(1, 2)  # [head, pos, sources]
        return AttentionEdges(
            source=keys.nodes,
            target=self.target,
            weight=self.heads.pattern.index_select(2, pos) * scores * self.heads.scale,
            left=self.left_and_mean,
            right=self.values_and_one.index_select(1, pos),
            own=self.left.shape[-1],
        )

    def _rotate(self, writer: NodeVectors, n_heads: int) -> Float[Tensor, "head pos K d_head"]:
        """R U_i of every node."""
        by_slot = writer.vectors.transpose(0, 1)  # [K, pos, d]
        return self.attn.turned(by_slot, n_heads, self.prompt.rotary).permute(1, 2, 0, 3)

    def _repeat(self, by_kv_head: Tensor) -> Float[Tensor, "head sources d_head"]:
        """Give every query head its own copy of the key or value head that it shares."""
        shared = self.attn.n_heads // self.attn.n_kv_heads
        return by_kv_head.repeat_interleave(shared, dim=0)[self.some]


def every_product(
    rows: Float[Tensor, "head pos K e"], others: Float[Tensor, "head pos e"]
) -> Float[Tensor, "head pos K pos"]:
    """Return the inner products of every row with its head's vectors at all positions."""
    products = rows.flatten(1, 2) @ others.transpose(1, 2)
    return products.unflatten(1, rows.shape[1:3])
