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
            eps = _epsilon(norm, r.dtype)
        case nn.LayerNorm():
            eps = norm.eps
            r = _center(r)
            tangents = _center(tangents)
        case _:
            return tangents
    inverse = _inverse_denominator(r, eps)  # [pos, 1]: 1/ρ
    gain = norm.weight * inverse  # [pos, d]: γ/ρ
    if frozen:
        return tangents * gain[:, None]
    d = r.shape[-1]
    scaled = r * (inverse.square() / d)  # [pos, d]: r/(d ρ²)
    along = tangents @ scaled[..., None]  # [pos, n, 1]: (r·ṙ)/(d ρ²)
    across = tangents - along * r[:, None]  # [pos, n, d]: ṙ − r (r·ṙ)/(d ρ²)
    return across * gain[:, None]


def norm_vjp(
    norm: nn.Module,
    r: Float[Tensor, "pos d"],
    columns: Float[Tensor, "pos K d"],
    a: Float[Tensor, "pos K"],
    frozen: bool = False,
) -> Float[Tensor, "pos K d"]:
    """Return the gradients of `a = norm(r) · column` at a norm's input r: what readers read there.

    The gradient is (γ V − r a/(d ρ))/ρ. Behind a LayerNorm r and γ V are centered, and a is taken
    without its bias's part β·V.
    """
    match norm:
        case nn.RMSNorm():
            eps = _epsilon(norm, r.dtype)
            scaled = columns * norm.weight  # [pos, K, d]: γ V
        case nn.LayerNorm():
            eps = norm.eps
            r = _center(r)
            scaled = _center(columns * norm.weight)
            if norm.bias is not None:
                a = a - columns @ norm.bias
        case _:
            return columns
    inverse = _inverse_denominator(r, eps)[:, None]  # [pos, 1, 1]: 1/ρ
    if frozen:
        return scaled * inverse
    d = r.shape[-1]
    share = a[..., None] * inverse / d  # [pos, K, 1]: a/(d ρ)
    through_denominator = r[:, None] * share  # [pos, K, d]: r a/(d ρ)
    return (scaled - through_denominator) * inverse


def _epsilon(norm: nn.RMSNorm, dtype: torch.dtype) -> float:
    """Return the number ε that a norm adds to the mean square; it can depend on the dtype."""
    if norm.eps is None:
        return torch.finfo(dtype).eps
    return norm.eps


def _center(x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """Subtract the mean over the last dimension, as a LayerNorm does."""
    mean = x.mean(-1, keepdim=True)
    return x - mean


def _inverse_denominator(r: Float[Tensor, "pos d"], eps: float) -> Float[Tensor, "pos 1"]:
    """Return 1/ρ = 1/√(mean r² + ε)."""
    mean_square = r.square().mean(-1, keepdim=True)
    return (mean_square + eps).rsqrt()


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
        return Heads(q=self.q[heads], k=self.k[heads], v=self.v[heads], pattern=self.pattern[heads])

    def jvp(
        self, tangents: Mapping[str, Float[Tensor, "n head pos d_head"]]
    ) -> Float[Tensor, "pos n d_heads"]:
        """Push tangents of queries, keys and values to the output of the heads.

        tangents: by the letters q, k and v; a missing one is zero.
        """
        out: Tensor | None = None  # [n, head, pos, d_head]
        scores: Tensor | None = None  # [n, head, pos, pos]
        if "v" in tangents:
            # Σ_s' p v̇_s'
            out = self.pattern @ tangents["v"]
        if "q" in tangents:
            # q̇_s·k_s'
            keys = self.k.transpose(1, 2)  # [head, d_head, pos]
            scores = tangents["q"] @ keys
        if "k" in tangents:
            # q_s·k̇_s'
            key_tangents = tangents["k"].transpose(2, 3)  # [n, head, d_head, pos]
            if scores is None:
                scores = self.q @ key_tangents
            else:
                scores = scores + self.q @ key_tangents
        if scores is not None:
            # Σ_s' p (q̇_s·k_s' + q_s·k̇_s')/√d (v_s' − v̄_s) = Σ_s' ṗ v_s'
            from_pattern = self._pattern_tangent(scores) @ self.v
            out = from_pattern if out is None else out + from_pattern
        assert out is not None, "no tangents were given"
        by_position = out.permute(2, 0, 1, 3)  # [pos, n, head, d_head]
        return by_position.flatten(2)

    def _pattern_tangent(
        self, scores: Float[Tensor, "n head pos pos"]
    ) -> Float[Tensor, "n head pos pos"]:
        """Push tangents of scores q·k through the softmax: ṗ = x − p Σ x with x = p ṡ/√d."""
        shares = self.pattern * scores * self.scale
        total = shares.sum(-1, keepdim=True)
        return shares - total * self.pattern

    def jvp_at(
        self, tangents: Mapping[str, Float[Tensor, "head n d_head"]], pos: Int[Tensor, " n"]
    ) -> Float[Tensor, "pos n d_heads"]:
        """Push tangents at single positions `pos` to the output of the heads at all positions.

        A value or a key moves the outputs of all later positions; a query only that of its own.
        """
        mean = self.pattern @ self.v  # [head, pos, d_head]: v̄
        pattern = self.pattern.index_select(2, pos)[..., None]  # [head, pos, n, 1]: p[s, s']
        out = self.q.new_zeros(*pattern.shape[:3], self.q.shape[-1])  # [head, pos, n, d_head]
        if "v" in tangents:
            out += pattern * tangents["v"][:, None]  # p[s, s'] v̇_s'
        if "k" in tangents:
            key_tangents = tangents["k"].transpose(1, 2)  # [head, d_head, n]
            scores = (self.q @ key_tangents)[..., None] * self.scale  # q_s·k̇_s'/√d
            values = self.v.index_select(1, pos)[:, None]  # [head, 1, n, d_head]: v_s'
            out += pattern * scores * (values - mean[:, :, None])
        if "q" in tangents:
            every = torch.arange(len(pos), device=pos.device)
            out[:, pos, every] += self._query_jvp(tangents["q"], pos, mean)
        by_position = out.permute(1, 2, 0, 3)  # [pos, n, head, d_head]
        return by_position.flatten(2)

    def _query_jvp(
        self,
        tangents: Float[Tensor, "head n d_head"],
        pos: Int[Tensor, " n"],
        mean: Float[Tensor, "head pos d_head"],
    ) -> Float[Tensor, "head n d_head"]:
        """Push tangents of queries to the output at their own positions, with x = p q̇_s·k_s'/√d.

        The sum Σ_s' x (v_s' − v̄_s) is computed as Σ_s' x v_s' − (Σ_s' x) v̄_s.
        """
        keys = self.k.transpose(1, 2)  # [head, d_head, pos]
        scores = tangents @ keys  # [head, n, pos]
        shares = self.pattern.index_select(1, pos) * scores * self.scale  # x
        total = shares.sum(-1, keepdim=True)  # [head, n, 1]
        mean_there = mean.index_select(1, pos)  # [head, n, d_head]: v̄_s
        return shares @ self.v - total * mean_there
