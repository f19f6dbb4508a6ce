"""The transformer that says which components are needed, from all sites and all positions at once
(law G1).

1. The input x of every site is divided by its root mean square and all are concatenated: `[batch
   pos Σ d_in]`.
2. A linear map brings them to `d_model`.
3. Blocks: `h ← h + attention(norm(h))`, then `h ← h + MLP(norm(h))`. Norms have no gain. Attention
   is rotary and looks both ways, or back only where `causal`; the MLP has one hidden layer with
   GELU.
4. A linear map gives the pre-activations of all components: `[batch pos Σ C]`.

Source: VPD (Bushnaq et al., 2026). What has no position axis, as the inputs of toys, counts as one
position each.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu, rms_norm, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from spd_lightning.decomposition.components import Site
from spd_lightning.decomposition.importance import Importance, ImportanceFunction
from spd_lightning.decomposition.matmul import Linear

ROTARY_BASE = 10_000.0

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine [pos, d_head / 2] of every position's angles."""


def rotation(positions: int, d_head: int, like: Tensor) -> Rotation:
    """The angles `pos · base^(−2i / d_head)` by which pair i of a head's entries turns at each
    position (RoPE).

    Taken in float64: in float32 the angles of late positions lose what tells neighbors apart.
    """
    rates = ROTARY_BASE ** (
        -torch.arange(0, d_head, 2, device=like.device, dtype=torch.float64) / d_head
    )
    angles = torch.arange(positions, device=like.device, dtype=torch.float64)[:, None] * rates
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotated(
    x: Float[Tensor, "batch head pos d_head"], turn: Rotation
) -> Float[Tensor, "batch head pos d_head"]:
    """Entry i and entry i + d_head/2 of every head, turned by the angle of their position."""
    (cos, sin) = turn
    (a, b) = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def _linear(d_in: int, d_out: int, gain: float = 2.0, bias: bool = True) -> nn.Linear:
    """Drawn by D7: gain 2 for hidden layers, 1 for the last."""
    layer = Linear(d_in, d_out, bias=bias)
    nn.init.normal_(layer.weight, std=(gain / d_in) ** 0.5)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def _normed(x: Tensor) -> Tensor:
    return rms_norm(x, x.shape[-1:])


class _Block(nn.Module):
    """Attention over positions, then an MLP at each of them; both add to what is there."""

    def __init__(self, d_model: int, heads: int, d_mlp: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = _linear(d_model, 3 * d_model, bias=False)
        self.o = _linear(d_model, d_model, bias=False)
        self.up = _linear(d_model, d_mlp)
        self.down = _linear(d_mlp, d_model)

    def forward(
        self, h: Float[Tensor, "batch pos d_model"], turn: Rotation
    ) -> Float[Tensor, "batch pos d_model"]:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in self.qkv(_normed(h)).chunk(3, dim=-1)
        )
        turn = (turn[0].to(q.dtype), turn[1].to(q.dtype))
        mixed = scaled_dot_product_attention(
            rotated(q, turn), rotated(k, turn), v, is_causal=self.causal
        )
        h = h + self.o(mixed.transpose(1, 2).flatten(2))
        return h + self.down(gelu(self.up(_normed(h))))


class ImportanceTransformer(ImportanceFunction):
    """`transformer`: one transformer from the inputs of all its sites to all of their
    components.
    """

    def __init__(self, sites: Mapping[str, tuple[Site, int]], config: Importance):
        super().__init__()
        self.counts = {name: C for name, (_, C) in sites.items()}
        self.d_head = config.d_model // config.heads
        self.checkpointed = config.checkpoint_activations
        self.first = _linear(sum(site.d_in for site, _ in sites.values()), config.d_model)
        d_mlp = config.d_mlp or 4 * config.d_model
        blocks = [
            _Block(config.d_model, config.heads, d_mlp, config.causal) for _ in range(config.layers)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.last = _linear(config.d_model, sum(self.counts.values()), gain=1.0)

    def forward(self, inputs: Mapping[str, Tensor], inner: Mapping[str, Any]) -> dict[str, Tensor]:
        x = torch.cat([_normed(inputs[name]) for name in self.counts], dim=-1)
        h = self.first(x[:, None] if x.ndim == 2 else x.flatten(0, -3))
        turn = rotation(h.shape[1], self.d_head, h)
        for block in self.blocks:
            if self.checkpointed and torch.is_grad_enabled():
                h = checkpoint(block, h, turn, use_reentrant=False, preserve_rng_state=False)
            else:
                h = block(h, turn)
        z = self.last(h).reshape(*x.shape[:-1], -1)
        return dict(zip(self.counts, z.split(list(self.counts.values()), dim=-1), strict=True))


def chunks_of_layers(names: Sequence[str], chunk_layers: int | None) -> list[list[str]]:
    """Site names in chunks of so many layers of the target, by the first number in each; those
    without go first.
    """
    if chunk_layers is None:
        return [list(names)]
    layers = {name: int(found[0]) if (found := re.search(r"\d+", name)) else None for name in names}
    first = (
        min((layer for layer in layers.values() if layer is not None), default=0) // chunk_layers
    )
    chunks: dict[int, list[str]] = {}
    for name, layer in layers.items():
        chunks.setdefault(first if layer is None else layer // chunk_layers, []).append(name)
    return [chunks[k] for k in sorted(chunks)]
