"""How what is written moves what comes later: the forward derivatives of a decoder's parts (section A).

A *tangent* is how far a vector moves when a node writes what it writes. With r the input of a norm, ρ its denominator
and γ its gain; with q, k, v what an attention head asks, offers and holds, p its pattern, and v̄_s = Σ_s' p[s, s'] v_s':

    norm         γ ∘ (ṙ − r (r·ṙ)/(d ρ²))/ρ           LayerNorm: of centered r and ṙ; frozen: γ ∘ ṙ/ρ
    attention    Σ_s' p[s, s'] (v̇_s' + (q̇_s·k_s' + q_s·k̇_s')/√d (v_s' − v̄_s))           frozen: of v̇ alone
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


def pushed(
    norm: nn.Module, r: Float[Tensor, "pos d"], tangents: Float[Tensor, "pos n d"], frozen: bool
) -> Float[Tensor, "pos n d"]:
    """Push tangents through a norm at input r; if frozen, its denominator is a constant."""
    match norm:
        case nn.RMSNorm():
            eps = torch.finfo(r.dtype).eps if norm.eps is None else norm.eps
        case nn.LayerNorm():
            eps = norm.eps
            r, tangents = (x - x.mean(-1, keepdim=True) for x in (r, tangents))
        case _:
            return tangents
    inverse = (r.square().mean(-1) + eps).rsqrt()
    gain = norm.weight * inverse[:, None]
    if frozen:
        return tangents * gain[:, None]
    along = tangents @ (r * (inverse.square() / r.shape[-1])[:, None])[..., None]
    return (tangents - along * r[:, None]) * gain[:, None]


class Heads(NamedTuple):
    """Attention on one prompt: queries, keys and values, turned and with shared ones repeated, and the pattern."""

    q: Float[Tensor, "head pos d_head"]
    k: Float[Tensor, "head pos d_head"]
    v: Float[Tensor, "head pos d_head"]
    pattern: Float[Tensor, "head pos pos"]

    @property
    def scale(self) -> float:
        """1/√d of a head."""
        return self.q.shape[-1] ** -0.5

    def gathered(self, moved: Mapping[str, Float[Tensor, "n head pos d_head"]]) -> Float[Tensor, "pos n d_heads"]:
        """Push tangents of q, k and v at all positions, by these letters, to the output of the heads."""
        found = self.pattern @ moved["v"] if "v" in moved else 0.0
        if "q" in moved or "k" in moved:
            scores = moved["q"] @ self.k.transpose(1, 2) if "q" in moved else 0.0
            scores = scores + self.q @ moved["k"].transpose(2, 3) if "k" in moved else scores
            shares = self.pattern * scores * self.scale
            found = found + (shares - shares.sum(-1, keepdim=True) * self.pattern) @ self.v
        assert isinstance(found, Tensor)
        return found.permute(2, 0, 1, 3).flatten(2)

    def spread(
        self, moved: Mapping[str, Float[Tensor, "head n d_head"]], pos: Int[Tensor, " n"]
    ) -> Float[Tensor, "pos n d_heads"]:
        """Like `gathered`, for tangents that are each at a single position."""
        pattern, mean = self.pattern.index_select(2, pos)[..., None], self.pattern @ self.v
        found = self.q.new_zeros(*pattern.shape[:3], self.q.shape[-1])
        if "v" in moved:
            found += pattern * moved["v"][:, None]
        if "k" in moved:
            scores = (self.q @ moved["k"].transpose(1, 2))[..., None] * self.scale
            found += pattern * scores * (self.v.index_select(1, pos)[:, None] - mean[:, :, None])
        if "q" in moved:
            shares = self.pattern.index_select(1, pos) * (moved["q"] @ self.k.transpose(1, 2)) * self.scale
            own = shares @ self.v - shares.sum(-1, keepdim=True) * mean.index_select(1, pos)
            found[:, pos, torch.arange(len(pos), device=pos.device)] += own
        return found.permute(1, 2, 0, 3).flatten(2)
