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
    attention = _AttentionEdges(prompt, block, heads)
    sink.add_attention(attention.values_to_output())
    if prompt.frozen:  # the pattern is a constant there
        return
    sources, targets, values = attention.queries_to_output()
    sink.add_same_position(sources, targets, values)
    sink.add_attention(attention.keys_to_output())


class _AttentionEdges:
    """The attention of one block on one prompt, seen from the nodes of its output map.

    Attributes:
        left: V_j of every node of the output map, cut into heads [head, pos, K, d_head].
    """

    def __init__(self, prompt: TracedPrompt, block: BlockLayout, heads: slice):
        self.prompt = prompt
        self.selected = heads
        self.attn: Any = prompt.target.get_submodule(block.attn)
        self.q_proj, self.k_proj, self.v_proj = block.qkv
        self.heads: Heads = prompt.heads(block).select(heads)
        readers = prompt.reader(block.o_proj)
        self.target: Nodes = readers.nodes
        n_heads = self.attn.n_heads
        split = readers.vectors.unflatten(-1, (n_heads, -1))  # [pos, K, head, d_head]
        by_head = split.permute(2, 0, 1, 3)  # [head, pos, K, d_head]
        self.left = by_head[heads].contiguous()

    @cached_property
    def left_and_mean(self) -> Float[Tensor, "head pos K d_head_and_1"]:
        """V_j of each head, with one more column −v̄ · V_j."""
        mean = self.heads.pattern @ self.heads.v  # [head, pos, d_head]: v̄
        left = self.left
        along_mean = (left * mean[:, :, None]).sum(-1, keepdim=True)  # [head, pos, K, 1]: v̄ · V_j
        return torch.cat([left, -along_mean], dim=-1)

    @cached_property
    def values_and_one(self) -> Float[Tensor, "head pos d_head_and_1"]:
        """v with a column of ones, so that its product with `left_and_mean` is (v − v̄) · V_j."""
        one_column = (0, 1)  # no column before, one column behind
        return nn.functional.pad(self.heads.v, one_column, value=1.0)

    def values_to_output(self) -> AttentionEdges:
        """v → o: w_i Σ_h p_h[s, s'] (U_i · V_j)_h."""
        values = self.prompt.writer(self.v_proj)
        nodes = values.nodes
        written = values.vectors[nodes.real]  # [sources, d_heads]: w_i U_i
        n_heads = self.attn.n_kv_heads
        split = written.unflatten(-1, (n_heads, -1))  # [sources, kv_head, d_head]
        by_head = split.transpose(0, 1)  # [kv_head, sources, d_head]
        return AttentionEdges(
            source=nodes,
            target=self.target,
            weight=self.heads.pattern.index_select(2, nodes.pos),  # p_h[s, s']
            left=self.left,
            right=self._share(by_head),
            own=self.left.shape[-1],
        )

    def queries_to_output(self) -> tuple[Nodes, Nodes, Float[Tensor, "pos K J"]]:
        """q → o: within each position, summed over the positions s' that the query attends to.

        The edge is w_i Σ_h Σ_s' x_h[i, s'] y_h[s', j] with x = p_h[s, s'] (k_s' · R U_i)_h / √d and
        y = ((v_s' − v̄_s) · V_j)_h: one product of matrices whose inner dimension is head * pos.
        """
        queries = self.prompt.writer(self.q_proj)
        rotated = self._rotate(queries, self.attn.n_heads)[self.selected]  # w_i R U_i
        pattern = self.heads.pattern * self.heads.scale  # [head, pos, pos]
        scores = every_product(rotated, self.heads.k)  # [head, pos, K, pos]
        scores = scores * pattern[:, :, None]
        gains = every_product(self.left_and_mean, self.values_and_one)  # [head, pos, J, pos]
        # [pos, K, head * pos] and [pos, J, head * pos]
        scores = scores.permute(1, 2, 0, 3).flatten(2)
        gains = gains.permute(1, 2, 0, 3).flatten(2)
        edges = scores @ gains.transpose(1, 2)
        return queries.nodes, self.target, edges

    def keys_to_output(self) -> AttentionEdges:
        """k → o: w_i Σ_h p_h[s, s'] (q_s · R U_i)_h ((v_s' − v̄_s) · V_j)_h / √d."""
        keys = self.prompt.writer(self.k_proj)
        nodes = keys.nodes
        pos = nodes.pos  # [sources]
        by_slot = self._rotate(keys, self.attn.n_kv_heads)  # [kv_head, pos, K, d_head]
        rotated = by_slot[:, nodes.real]  # [kv_head, sources, d_head]: w_i R U_i
        by_head = self._share(rotated)  # [head, sources, d_head]
        scores = self.heads.q @ by_head.transpose(1, 2)  # [head, pos, sources]: w_i q_s · R U_i
        pattern = self.heads.pattern.index_select(2, pos)  # [head, pos, sources]
        return AttentionEdges(
            source=nodes,
            target=self.target,
            weight=pattern * scores * self.heads.scale,
            left=self.left_and_mean,
            right=self.values_and_one.index_select(1, pos),
            own=self.left.shape[-1],
        )

    def _rotate(self, writer: NodeVectors, n_heads: int) -> Float[Tensor, "head pos K d_head"]:
        """Return R (w_i U_i) of every node, cut into heads."""
        by_slot = writer.vectors.transpose(0, 1)  # [K, pos, d_heads]
        rotary = self.prompt.rotary
        rotated = self.attn.turned(by_slot, n_heads, rotary)  # [K, head, pos, d_head]
        return rotated.permute(1, 2, 0, 3)

    def _share(
        self, by_kv_head: Float[Tensor, "kv_head sources d_head"]
    ) -> Float[Tensor, "head sources d_head"]:
        """Give every query head its own copy of the key or value head that it shares."""
        attn = self.attn
        queries_per_key = attn.n_heads // attn.n_kv_heads
        by_head = by_kv_head.repeat_interleave(queries_per_key, dim=0)
        return by_head[self.selected]


def every_product(
    rows: Float[Tensor, "head pos K e"], others: Float[Tensor, "head pos e"]
) -> Float[Tensor, "head pos K pos"]:
    """Return the inner products of every row with its head's vectors at all positions."""
    shape = rows.shape[1:3]  # pos, K
    flat_rows = rows.flatten(1, 2)  # [head, pos * K, e]
    products = flat_rows @ others.transpose(1, 2)  # [head, pos * K, pos]
    return products.unflatten(1, shape)
