"""An importance function that reads all sites at all positions: a transformer (law G1).

1. Divide the input x of every site by its root mean square, and concatenate: [batch, pos, Σ d_in].
2. Project to width `d_model`.
3. Apply blocks: `h ← h + attention(norm(h))`, then `h ← h + MLP(norm(h))`. Norms have no gain.
   Attention is rotary. It sees all positions, or only earlier ones if `causal`. The MLP has one
   hidden layer with GELU.
4. Project to the pre-activations of all components: [batch, pos, Σ C].

Source: VPD (Bushnaq et al., 2026). Inputs without a position axis, as in toy models, are treated
as prompts of one position.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu, rms_norm, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from spd_lightning.decomposition.components import Site
from spd_lightning.decomposition.importance import Importance, ImportanceFunction, by_site
from spd_lightning.decomposition.matmul import Linear

ROTARY_BASE = 10_000.0
"""Base of the rotation rates."""

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines [pos, d_head / 2] of the angles of every position."""


def rotation(positions: int, d_head: int, like: Tensor) -> Rotation:
    """Return cosine and sine of the angles `pos · base^(−2i / d_head)` of pair i (RoPE).

    Angles are computed in float64. In float32, neighboring late positions would get equal angles.
    """
    device = like.device
    dtype = like.dtype
    even = torch.arange(0, d_head, 2, device=device, dtype=torch.float64)  # [d_head / 2]: 2i
    exponents = -even / d_head
    rates = ROTARY_BASE**exponents  # [d_head / 2]
    pos = torch.arange(positions, device=device, dtype=torch.float64)
    angles = pos[:, None] * rates  # [pos, d_head / 2]
    cos = angles.cos()
    sin = angles.sin()
    return cos.to(dtype), sin.to(dtype)


def rotated(
    x: Float[Tensor, "batch head pos d_head"], turn: Rotation
) -> Float[Tensor, "batch head pos d_head"]:
    """Rotate entries i and i + d_head/2 of every head by the angle of their position."""
    cos, sin = turn
    a, b = x.chunk(2, dim=-1)  # [batch, head, pos, d_head / 2] each
    first = a * cos - b * sin
    second = a * sin + b * cos
    return torch.cat([first, second], dim=-1)


def _linear(d_in: int, d_out: int, gain: float = 2.0, bias: bool = True) -> nn.Linear:
    """Return a linear map drawn as D7 says; the gain is 2 for hidden layers, 1 for the last."""
    layer = Linear(d_in, d_out, bias=bias)
    variance = gain / d_in
    nn.init.normal_(layer.weight, std=variance**0.5)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def _normed(x: Tensor) -> Tensor:
    """Return x divided by its root mean square."""
    width = x.shape[-1]
    return rms_norm(x, (width,))


class _Block(nn.Module):
    """One block of step 3: attention over positions, then an MLP at each position."""

    def __init__(self, d_model: int, heads: int, d_mlp: int, causal: bool):
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.qkv = _linear(d_model, 3 * d_model, bias=False)
        self.o = _linear(d_model, d_model, bias=False)
        self.up = _linear(d_model, d_mlp)
        self.down = _linear(d_mlp, d_model)

    def forward(
        self, h: Float[Tensor, "batch pos d_model"], turn: Rotation
    ) -> Float[Tensor, "batch pos d_model"]:
        normed = _normed(h)
        h = h + self._attention(normed, turn)
        normed = _normed(h)
        return h + self._mlp(normed)

    def _attention(
        self, x: Float[Tensor, "batch pos d_model"], turn: Rotation
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return what attention adds to the residual stream."""
        qkv = self.qkv(x)  # [batch, pos, 3 d_model]
        q, k, v = qkv.chunk(3, dim=-1)  # [batch, pos, d_model] each
        q = self._by_head(q)
        k = self._by_head(k)
        v = self._by_head(v)
        cos, sin = turn
        turn = (cos.to(q.dtype), sin.to(q.dtype))  # autocast can have lowered it
        q = rotated(q, turn)
        k = rotated(k, turn)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        by_position = mixed.transpose(1, 2)  # [batch, pos, head, d_head]
        return self.o(by_position.flatten(2))

    def _mlp(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Return what the MLP adds to the residual stream."""
        h = self.up(x)  # [batch, pos, d_mlp]
        h = gelu(h)
        return self.down(h)

    def _by_head(
        self, x: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch head pos d_head"]:
        by_head = x.unflatten(-1, (self.heads, -1))  # [batch, pos, head, d_head]
        return by_head.transpose(1, 2)


class ImportanceTransformer(ImportanceFunction):
    """`transformer`: one transformer from the inputs of its sites to all their components."""

    def __init__(self, sites: Mapping[str, tuple[Site, int]], config: Importance):
        super().__init__()
        d_model = config.d_model
        d_mlp = config.d_mlp or 4 * d_model
        self.d_head = d_model // config.heads
        self.checkpointed = config.checkpoint_activations
        self.counts: dict[str, int] = {}
        d_in = 0
        for name, (site, C) in sites.items():
            self.counts[name] = C
            d_in += site.d_in
        self.first = _linear(d_in, d_model)
        self.blocks = nn.ModuleList()
        for _ in range(config.layers):
            block = _Block(d_model, config.heads, d_mlp, config.causal)
            self.blocks.append(block)
        components = sum(self.counts.values())
        self.last = _linear(d_model, components, gain=1.0)

    def forward(self, inputs: Mapping[str, Tensor], inner: Mapping[str, Any]) -> dict[str, Tensor]:
        x = self._concatenated(inputs)  # step 1: [..., Σ d_in]
        positions = x.shape[:-1]
        if len(positions) == 1:  # without a position axis
            prompts = x[:, None]  # [batch, 1, Σ d_in]
        else:
            prompts = x.flatten(0, -3)  # [batch, pos, Σ d_in]
        h = self.first(prompts)  # step 2: [batch, pos, d_model]
        h = self._through_blocks(h)  # step 3
        z = self.last(h)  # step 4: [batch, pos, Σ C]
        z = z.reshape(*positions, -1)  # [..., Σ C]
        return by_site(z, self.counts)

    def _concatenated(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "... d_in"]:
        """Return the normed inputs of all sites side by side."""
        vectors = [_normed(inputs[name]) for name in self.counts]  # [..., d_in] each
        return torch.cat(vectors, dim=-1)

    def _through_blocks(
        self, h: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Apply all blocks."""
        turn = rotation(h.shape[1], self.d_head, h)
        checkpointed = self.checkpointed and torch.is_grad_enabled()
        for block in self.blocks:
            if checkpointed:
                h = checkpoint(block, h, turn, use_reentrant=False, preserve_rng_state=False)
            else:
                h = block(h, turn)
        return h


def chunks_of_layers(names: Sequence[str], chunk_layers: int | None) -> list[list[str]]:
    """Return site names in chunks of at most `chunk_layers` layers of the target.

    The layer of a site is the first number in its name. Sites without a number join the first
    chunk. If `chunk_layers` is None, there is one chunk.

    >>> chunks_of_layers(["embed", "h.0.up", "h.1.up", "h.2.up"], 2)
    [['embed', 'h.0.up', 'h.1.up'], ['h.2.up']]
    """
    if chunk_layers is None:
        return [list(names)]
    layers = {name: _layer(name) for name in names}
    numbers = [layer for layer in layers.values() if layer is not None]
    lowest = min(numbers, default=0)
    chunks = defaultdict[int, list[str]](list)
    for name, layer in layers.items():
        if layer is None:
            layer = lowest
        chunk = layer // chunk_layers
        chunks[chunk].append(name)
    in_order = sorted(chunks)
    return [chunks[chunk] for chunk in in_order]


def _layer(name: str) -> int | None:
    """Return the first number in a site's name, or None."""
    match = re.search(r"\d+", name)
    if match is None:
        return None
    return int(match[0])
