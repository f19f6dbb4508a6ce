"""One decoder-only transformer with switches: GPT-2's style, Llama's, and simpler ones between.

    x = wte[token] (+ wpe[position])
    x = x + attn(norm_1(x));  x = x + mlp(norm_2(x))        for every block h.{i}
    logits = lm_head(norm_f(x))

Every linear map is an `nn.Linear` of its own (q, k and v too), every norm and activation a module,
the attention core a function, so that each part can be decomposed, replaced, or read. What it
leaves out: dropout, caches of keys and values, scaled rotary positions, sliding windows.
`targets/conversion.py` fills one from a HuggingFace checkpoint.

Source: Radford et al. 2019 (GPT-2); Touvron et al. 2023 (Llama); Su et al. 2021 (rotary positions).
"""

from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from spd_lightning.errors import BadInput
from spd_lightning.targets.decoder_layout import decoder_layout
from spd_lightning.targets.language import LanguageModel, fits

Positions = Literal["rotary", "learned", "none"]
NormKind = Literal["rms", "layer", "none"]
Activation = Literal["gelu", "gelu_tanh", "silu", "relu"]
Rotary = tuple[Float[Tensor, "pos d_head"], Float[Tensor, "pos d_head"]]


# ---- attention -----------------------------------------------------------------------------------


def rotary_tables(context: int, d_head: int, base: float) -> Rotary:
    """Cosine and sine of the angle by which each position turns each pair of a head's
    dimensions.
    """
    frequencies = 1.0 / base ** (torch.arange(0, d_head, 2).float() / d_head)
    angles = torch.outer(torch.arange(context).float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(
    x: Float[Tensor, "batch head pos d_head"], rotary: Rotary
) -> Float[Tensor, "batch head pos d_head"]:
    """Turns dimension i of a head against dimension i + d_head/2 by the position's angle."""
    cos, sin = (table.to(x.dtype) for table in rotary)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def attention_pattern(
    q: Float[Tensor, "batch head pos d_head"], k: Float[Tensor, "batch head pos d_head"]
) -> Float[Tensor, "batch head pos pos"]:
    """How much each position attends to itself and to each one before it: a softmax, each row adds
    up to 1.
    """
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5
    future = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
    return torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1)


def attend(
    q: Float[Tensor, "batch head pos d_head"],
    k: Float[Tensor, "batch head pos d_head"],
    v: Float[Tensor, "batch head pos d_head"],
    fused: bool,
) -> Float[Tensor, "batch head pos d_head"]:
    """The values that the heads gather: by torch's fused kernel, or written out; the same numbers
    either way.
    """
    if (
        fused and q.device.type == "cpu" and q.dtype == torch.bfloat16
    ):  # its backward pass takes four times as long
        with torch.autocast("cpu", enabled=False):
            return scaled_dot_product_attention(
                q.float(), k.float(), v.float(), is_causal=True
            ).bfloat16()
    if fused:
        return scaled_dot_product_attention(q, k, v, is_causal=True)
    return torch.einsum("bhqk,bhkd->bhqd", attention_pattern(q, k), v)


class Attention(nn.Module):
    """Causal attention; where there are fewer key heads than query heads, neighboring queries share
    one.
    """

    def __init__(
        self, d_model: int, n_heads: int, n_kv_heads: int, bias: bool, fused: bool
    ) -> None:
        super().__init__()
        d_kv = d_model // n_heads * n_kv_heads
        self.n_heads, self.n_kv_heads, self.fused = n_heads, n_kv_heads, fused
        self.q_proj = nn.Linear(d_model, d_model, bias=bias)
        self.k_proj = nn.Linear(d_model, d_kv, bias=bias)
        self.v_proj = nn.Linear(d_model, d_kv, bias=bias)
        self.o_proj = nn.Linear(d_model, d_model, bias=bias)

    def turned(
        self, x: Float[Tensor, "batch pos d_heads"], count: int, rotary: Rotary | None
    ) -> Float[Tensor, "batch head pos d_head"]:
        """Split a projection's output into heads, and rotate it to its positions."""
        x = rearrange(x, "batch pos (head d_head) -> batch head pos d_head", head=count)
        return x if rotary is None else rotate(x, rotary)

    def heads_of(
        self, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Projections as queries, keys and values [batch head pos d_head], turned, shared keys
        repeated.
        """
        q = self.turned(q, self.n_heads, rotary)
        k = self.turned(k, self.n_kv_heads, rotary)
        v = self.turned(v, self.n_kv_heads, None)
        if (shared := self.n_heads // self.n_kv_heads) > 1:
            k = k.repeat_interleave(shared, dim=1)
            v = v.repeat_interleave(shared, dim=1)
        return q, k, v

    @staticmethod
    def pattern(q: Tensor, k: Tensor) -> Tensor:
        """How much each position attends to each (`attention_pattern`)."""
        return attention_pattern(q, k)

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], rotary: Rotary | None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Compute the heads' contribution to the residual stream."""
        heads = self.heads_of(self.q_proj(x), self.k_proj(x), self.v_proj(x), rotary)
        gathered = attend(*heads, self.fused)
        return self.o_proj(rearrange(gathered, "batch head pos d_head -> batch pos (head d_head)"))


# ---- the rest of a block -------------------------------------------------------------------------


def activation_module(kind: Activation) -> nn.Module:
    """An activation function by name."""
    match kind:
        case "gelu":
            return nn.GELU()
        case "gelu_tanh":
            return nn.GELU(approximate="tanh")
        case "silu":
            return nn.SiLU()
        case "relu":
            return nn.ReLU()


def norm_module(kind: NormKind, d_model: int, eps: float, bias: bool) -> nn.Module:
    """A norm by name, with a gain, and in LayerNorm's case a bias if asked for."""
    match kind:
        case "rms":
            return nn.RMSNorm(d_model, eps=eps)
        case "layer":
            return nn.LayerNorm(d_model, eps=eps, bias=bias)
        case "none":
            return nn.Identity()


class PlainMLP(nn.Module):
    """`down_proj(act(c_fc(x)))`."""

    def __init__(self, d_model: int, d_mlp: int, activation: Activation, bias: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(d_model, d_mlp, bias=bias)
        self.act = activation_module(activation)
        self.down_proj = nn.Linear(d_mlp, d_model, bias=bias)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Compute the neurons' contribution to the residual stream."""
        return self.down_proj(self.act(self.c_fc(x)))


class GatedMLP(nn.Module):
    """`down_proj(act(gate_proj(x)) * up_proj(x))`."""

    def __init__(self, d_model: int, d_mlp: int, activation: Activation, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_mlp, bias=bias)
        self.up_proj = nn.Linear(d_model, d_mlp, bias=bias)
        self.act = activation_module(activation)
        self.down_proj = nn.Linear(d_mlp, d_model, bias=bias)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Compute the neurons' contribution to the residual stream."""
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One residual step of attention and one of an MLP, each behind its norm."""

    def __init__(
        self, norm_1: nn.Module, attn: Attention, norm_2: nn.Module, mlp: nn.Module
    ) -> None:
        super().__init__()
        self.norm_1, self.attn, self.norm_2, self.mlp = norm_1, attn, norm_2, mlp

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], rotary: Rotary | None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream after this block."""
        x = x + self.attn(self.norm_1(x), rotary)
        return x + self.mlp(self.norm_2(x))


# ---- the decoder ---------------------------------------------------------------------------------


class Decoder(LanguageModel):
    """A decoder-only transformer, in GPT-2's style or Llama's or between.

    Args:
        vocab: how many tokens there are.
        d_model: width of the residual stream.
        n_layers: how many blocks.
        n_heads: query heads of each block; they share d_model evenly.
        context: how many positions a sequence has at most.
        d_mlp: neurons of each block; four times d_model if omitted.
        n_kv_heads: key and value heads; as many as n_heads if omitted, fewer where queries share
            them.
        positions: rotary (Llama), learned (GPT-2), or none.
        norm: rms (Llama), layer (GPT-2), or none.
        mlp: plain (GPT-2), or gated (Llama).
        activation: of the neurons.
        bias: whether attention and MLP maps, and LayerNorms, have one. The unembedding never has.
        tied_unembedding: whether lm_head's weight is wte's own.
        rotary_base: the slowest rotary pair turns once in about 2π times this many positions.
        norm_eps: added inside the root of a norm.
        fused_attention: torch's fused kernel; false writes attention out, which higher derivatives
            need.
    """

    cos: Float[Tensor, "pos d_head"] | None
    sin: Float[Tensor, "pos d_head"]

    def __init__(
        self,
        vocab: int,
        d_model: int,
        n_layers: int,
        n_heads: int,
        context: int,
        d_mlp: int | None = None,
        n_kv_heads: int | None = None,
        positions: Positions = "rotary",
        norm: NormKind = "rms",
        mlp: Literal["plain", "gated"] = "plain",
        activation: Activation = "gelu",
        bias: bool = False,
        tied_unembedding: bool = False,
        rotary_base: float = 10000.0,
        norm_eps: float = 1e-5,
        fused_attention: bool = True,
    ) -> None:
        given = {
            name: value for name, value in locals().items() if name not in ("self", "__class__")
        }
        super().__init__()
        _check(given)
        self.init_args, self.vocab, self.context = given, vocab, context
        self.layout = decoder_layout(n_layers, gated=mlp == "gated")

        def block() -> Block:
            norms = [norm_module(norm, d_model, norm_eps, bias) for _ in range(2)]
            attn = Attention(d_model, n_heads, n_kv_heads or n_heads, bias, fused_attention)
            kind = PlainMLP if mlp == "plain" else GatedMLP
            return Block(
                norms[0], attn, norms[1], kind(d_model, d_mlp or 4 * d_model, activation, bias)
            )

        self.wte = nn.Embedding(vocab, d_model)
        self.wpe = nn.Embedding(context, d_model) if positions == "learned" else None
        self.h = nn.ModuleList(block() for _ in range(n_layers))
        self.norm_f = norm_module(norm, d_model, norm_eps, bias)
        self.lm_head = nn.Linear(d_model, vocab, bias=False)
        tables = (
            rotary_tables(context, d_model // n_heads, rotary_base)
            if positions == "rotary"
            else (None, None)
        )
        for name, table in zip(("cos", "sin"), tables, strict=True):
            self.register_buffer(name, table, persistent=False)
        if tied_unembedding:
            self.lm_head.weight = self.wte.weight
        self._draw(n_layers)

    def _draw(self, n_layers: int) -> None:
        """Initial weights as in GPT-2: N(0, 0.02), what writes into the residual stream smaller by
        √(2 n_layers).
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * n_layers) ** 0.5 if writes else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def rotary(self, positions: int) -> Rotary | None:
        """By what angles the first positions turn; None where nothing turns."""
        return None if self.cos is None else (self.cos[:positions], self.sin[:positions])

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        """The logits of the next token at every position.

        Raises:
            BadInput: the sequence is longer than the context.
        """
        positions = tokens.shape[1]
        fits(positions, self.context, "Decoder")
        x = self.wte(tokens)
        if self.wpe is not None:
            x = x + self.wpe(torch.arange(positions, device=tokens.device))
        rotary = self.rotary(positions)
        for block in self.h:
            x = block(x, rotary)
        return self.lm_head(self.norm_f(x))


def _check(given: dict) -> None:
    for name in ("vocab", "d_model", "n_layers", "n_heads", "context"):
        if given[name] < 1:
            raise BadInput(f"{name} {given[name]} in Decoder: it must be at least 1")
    d_model = given["d_model"]
    n_heads = given["n_heads"]
    shared = given["n_kv_heads"] or given["n_heads"]
    if d_model % n_heads:
        raise BadInput(f"n_heads {n_heads} in Decoder: it must divide d_model, which is {d_model}")
    if n_heads % shared:
        raise BadInput(
            f"n_kv_heads {shared} in Decoder: it must divide n_heads, which is {n_heads}"
        )
    if given["positions"] == "rotary" and d_model // n_heads % 2:
        raise BadInput(
            f"d_model {d_model} and n_heads {n_heads} in Decoder: rotary positions need an even "
            "d_head"
        )
