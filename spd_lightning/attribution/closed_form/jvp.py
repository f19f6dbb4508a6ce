"""Forward and reverse derivatives of a decoder's norms and attention (section A of docs/method.md).

A *tangent* is the change of a vector per unit of what one node writes. With r the input of a norm,
ρ its denominator and γ its gain; with q, k and v the queries, keys and values of a head, p its
pattern, and v̄_s = Σ_s' p[s, s'] v_s':

    norm         γ ∘ (ṙ − r (r·ṙ)/(d ρ²))/ρ
    attention    Σ_s' p[s, s'] (v̇_s' + (q̇_s·k_s' + q_s·k̇_s')/√d (v_s' − v̄_s))

A LayerNorm takes r and ṙ centered. In frozen graphs these become γ ∘ ṙ/ρ and Σ_s' p[s, s'] v̇_s'.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

# ---- norms ---------------------------------------------------------------------------------------


def norm_jvp(
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
    inverse = (r.square().mean(-1) + eps).rsqrt()  # [pos]: 1/ρ
    gain = norm.weight * inverse[:, None]
    if frozen:
        return tangents * gain[:, None]
    along = tangents @ (r * (inverse.square() / r.shape[-1])[:, None])[..., None]  # [pos, n, 1]
    return (tangents - along * r[:, None]) * gain[:, None]


def norm_vjp(
    norm: nn.Module,
    r: Float[Tensor, "pos d"],
    columns: Float[Tensor, "pos K d"],
    a: Float[Tensor, "pos K"],
    frozen: bool = False,
) -> Float[Tensor, "pos K d"]:
    """Return the gradients of `a = norm(r) · column` at a norm's input r."""
    match norm:
        case nn.RMSNorm():
            eps = torch.finfo(r.dtype).eps if norm.eps is None else norm.eps
            inverse = (r.square().mean(-1) + eps).rsqrt()[:, None, None]  # 1/ρ
            scaled = columns * norm.weight
            without_bias = a
        case nn.LayerNorm():
            r = r - r.mean(-1, keepdim=True)
            inverse = (r.square().mean(-1) + norm.eps).rsqrt()[:, None, None]
            scaled = columns * norm.weight
            without_bias = a if norm.bias is None else a - columns @ norm.bias
            scaled = scaled - scaled.mean(-1, keepdim=True)
        case _:
            return columns
    if frozen:
        return scaled * inverse
    moved = r[:, None] * (without_bias[..., None] * inverse / r.shape[-1])  # [pos, K, d]
    return (scaled - moved) * inverse


# ---- attention -----------------------------------------------------------------------------------


class Heads(NamedTuple):
    """The attention of a block on one prompt: rotated queries and keys, values, and the pattern.

    Keys and values that queries share are repeated, so that every head has its own.
    """

    q: Float[Tensor, "head pos d_head"]
    k: Float[Tensor, "head pos d_head"]
    v: Float[Tensor, "head pos d_head"]
    pattern: Float[Tensor, "head pos pos"]

    @property
    def scale(self) -> float:
        """1/√d of a head."""
        return self.q.shape[-1] ** -0.5

    def select(self, heads: slice) -> "Heads":
        """Return some of the heads."""
        return Heads(self.q[heads], self.k[heads], self.v[heads], self.pattern[heads])

    def jvp(
        self, tangents: Mapping[str, Float[Tensor, "n head pos d_head"]]
    ) -> Float[Tensor, "pos n d_heads"]:
        """Push tangents of queries, keys and values to the output of the heads.

        tangents: by the letters q, k and v; a missing one is zero.
        """
        out: float | Tensor = 0.0  # [n, head, pos, d_head]
        if "v" in tangents:
            out = self.pattern @ tangents["v"]
        if "q" in tangents or "k" in tangents:
            scores: float | Tensor = 0.0  # [n, head, pos, pos]
            if "q" in tangents:
                scores = tangents["q"] @ self.k.transpose(1, 2)
            if "k" in tangents:
                scores = scores + self.q @ tangents["k"].transpose(2, 3)
            shares = self.pattern * scores * self.scale
            pattern_tangent = shares - shares.sum(-1, keepdim=True) * self.pattern
            out = out + pattern_tangent @ self.v
        assert isinstance(out, Tensor), "no tangents were given"
        return out.permute(2, 0, 1, 3).flatten(2)

    def jvp_at(
        self, tangents: Mapping[str, Float[Tensor, "head n d_head"]], pos: Int[Tensor, " n"]
    ) -> Float[Tensor, "pos n d_heads"]:
        """Push tangents at single positions `pos` to the output of the heads at all positions."""
        mean = self.pattern @ self.v  # [head, pos, d_head]: v̄
        pattern = self.pattern.index_select(2, pos)[..., None]  # [head, pos, n, 1]
        out = self.q.new_zeros(*pattern.shape[:3], self.q.shape[-1])
        if "v" in tangents:
            out += pattern * tangents["v"][:, None]
        if "k" in tangents:
            scores = (self.q @ tangents["k"].transpose(1, 2))[..., None] * self.scale
            out += pattern * scores * (self.v.index_select(1, pos)[:, None] - mean[:, :, None])
        if "q" in tangents:
            scores = tangents["q"] @ self.k.transpose(1, 2)  # [head, n, pos]
            shares = self.pattern.index_select(1, pos) * scores * self.scale
            total = shares.sum(-1, keepdim=True)
            own = shares @ self.v - total * mean.index_select(1, pos)  # [head, n, d_head]
            out[:, pos, torch.arange(len(pos), device=pos.device)] += own
        return out.permute(1, 2, 0, 3).flatten(2)
