"""A decoder-only transformer in the style of GPT-2 or Llama, or a simpler one in between.

    x = wte[token] (+ wpe[position])
    x = x + attn(norm_1(x));  x = x + mlp(norm_2(x))        for every block h.{i}
    logits = lm_head(norm_f(x))

Every linear map is a separate `nn.Linear` (q, k and v too), every norm and activation is a module,
and the attention core is a function. So each part can be decomposed, replaced, or read. Dropout,
caches of keys and values, scaled rotary positions and sliding windows are not supported.
`targets/conversion.py` converts HuggingFace checkpoints to this decoder.

Sources: Radford et al. 2019 (GPT-2); Touvron et al. 2023 (Llama); Su et al. 2021 (rotary
positions).
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
    """Return cosine and sine of the angle by which each position rotates each dimension pair."""
    even = torch.arange(0, d_head, 2)
    exponents = even.float() / d_head  # [d_head / 2]
    frequencies = 1.0 / base**exponents
    positions = torch.arange(context)
    angles = torch.outer(positions.float(), frequencies)
    angles = angles.repeat(1, 2)  # [pos, d_head]; the pair (i, i + d_head/2) has one angle
    return angles.cos(), angles.sin()


def rotate(
    x: Float[Tensor, "batch head pos d_head"], rotary: Rotary
) -> Float[Tensor, "batch head pos d_head"]:
    """Rotate dimensions i and i + d_head/2 of every head by the position's angle."""
    cos, sin = (table.to(x.dtype) for table in rotary)  # [pos, d_head]
    first, second = x.chunk(2, dim=-1)
    quarter_turn = torch.cat([-second, first], dim=-1)
    return x * cos + quarter_turn * sin


def attention_pattern(
    q: Float[Tensor, "batch head pos d_head"], k: Float[Tensor, "batch head pos d_head"]
) -> Float[Tensor, "batch head pos pos"]:
    """Return how much each position attends to itself and to every earlier one; rows sum to 1."""
    d_head = q.shape[-1]
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k)  # [batch, head, query, key]
    scores = scores / d_head**0.5
    every_pair = torch.ones_like(scores[0, 0], dtype=torch.bool)  # [query, key]
    future = every_pair.triu(1)
    scores = scores.masked_fill(future, -torch.inf)
    return torch.softmax(scores, dim=-1)


def attend(
    q: Float[Tensor, "batch head pos d_head"],
    k: Float[Tensor, "batch head pos d_head"],
    v: Float[Tensor, "batch head pos d_head"],
    fused: bool,
) -> Float[Tensor, "batch head pos d_head"]:
    """Return the values that each head gathers, by torch's fused kernel or step by step."""
    if not fused:
        pattern = attention_pattern(q, k)
        return torch.einsum("bhqk,bhkd->bhqd", pattern, v)
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return scaled_dot_product_attention(q, k, v, is_causal=True)
    # on CPU, the kernel's backward pass takes four times as long in bfloat16 as in float32
    with torch.autocast("cpu", enabled=False):
        values = scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    return values.bfloat16()


class Attention(nn.Module):
    """Causal attention; with fewer key heads than query heads, neighboring queries share a key."""

    def __init__(
        self, d_model: int, n_heads: int, n_kv_heads: int, bias: bool, fused: bool
    ) -> None:
        super().__init__()
        d_kv = d_model // n_heads * n_kv_heads
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.fused = fused
        self.q_proj = nn.Linear(d_model, d_model, bias=bias)
        self.k_proj = nn.Linear(d_model, d_kv, bias=bias)
        self.v_proj = nn.Linear(d_model, d_kv, bias=bias)
        self.o_proj = nn.Linear(d_model, d_model, bias=bias)

    def turned(
        self, x: Float[Tensor, "batch pos d_heads"], count: int, rotary: Rotary | None
    ) -> Float[Tensor, "batch head pos d_head"]:
        """Split the output of a projection into `count` heads, and rotate it by position."""
        x = rearrange(x, "batch pos (head d_head) -> batch head pos d_head", head=count)
        if rotary is None:
            return x
        return rotate(x, rotary)

    def heads_of(
        self, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values [batch, head, pos, d_head] of projections.

        Queries and keys are rotated; shared keys and values are repeated.
        """
        q = self.turned(q, self.n_heads, rotary)
        k = self.turned(k, self.n_kv_heads, rotary)
        v = self.turned(v, self.n_kv_heads, None)
        queries_per_key = self.n_heads // self.n_kv_heads
        if queries_per_key > 1:
            k = k.repeat_interleave(queries_per_key, dim=1)
            v = v.repeat_interleave(queries_per_key, dim=1)
        return q, k, v

    @staticmethod
    def pattern(q: Tensor, k: Tensor) -> Tensor:
        """Return how much each position attends to every other one (see `attention_pattern`)."""
        return attention_pattern(q, k)

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], rotary: Rotary | None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the heads' contribution to the residual stream."""
        q = self.q_proj(x)
        k = self.k_proj(x)
        v = self.v_proj(x)
        q, k, v = self.heads_of(q, k, v, rotary)
        values = attend(q, k, v, self.fused)
        joined = rearrange(values, "batch head pos d_head -> batch pos (head d_head)")
        return self.o_proj(joined)


# ---- the rest of a block -------------------------------------------------------------------------


def activation_module(kind: Activation) -> nn.Module:
    """Return the activation function of this name."""
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
    """Return the norm of this name, with a gain; `bias` applies to LayerNorm only."""
    match kind:
        case "rms":
            return nn.RMSNorm(d_model, eps=eps)
        case "layer":
            return nn.LayerNorm(d_model, eps=eps, bias=bias)
        case "none":
            return nn.Identity()


class PlainMLP(nn.Module):
    """The MLP `down_proj(act(c_fc(x)))`."""

    def __init__(self, d_model: int, d_mlp: int, activation: Activation, bias: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(d_model, d_mlp, bias=bias)
        self.act = activation_module(activation)
        self.down_proj = nn.Linear(d_mlp, d_model, bias=bias)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Return the neurons' contribution to the residual stream."""
        neurons = self.act(self.c_fc(x))
        return self.down_proj(neurons)


class GatedMLP(nn.Module):
    """The gated MLP `down_proj(act(gate_proj(x)) * up_proj(x))`."""

    def __init__(self, d_model: int, d_mlp: int, activation: Activation, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_mlp, bias=bias)
        self.up_proj = nn.Linear(d_model, d_mlp, bias=bias)
        self.act = activation_module(activation)
        self.down_proj = nn.Linear(d_mlp, d_model, bias=bias)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Return the neurons' contribution to the residual stream."""
        gates = self.act(self.gate_proj(x))
        neurons = gates * self.up_proj(x)
        return self.down_proj(neurons)


class Block(nn.Module):
    """A residual step of attention and one of an MLP, each preceded by a norm."""

    def __init__(
        self, norm_1: nn.Module, attn: Attention, norm_2: nn.Module, mlp: nn.Module
    ) -> None:
        super().__init__()
        self.norm_1 = norm_1
        self.attn = attn
        self.norm_2 = norm_2
        self.mlp = mlp

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], rotary: Rotary | None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the residual stream after this block."""
        normed = self.norm_1(x)
        x = x + self.attn(normed, rotary)
        normed = self.norm_2(x)
        return x + self.mlp(normed)


# ---- the decoder ---------------------------------------------------------------------------------


class Decoder(LanguageModel):
    """A decoder-only transformer in the style of GPT-2 or Llama, or in between.

    Args:
        vocab: number of tokens.
        d_model: width of the residual stream.
        n_layers: number of blocks.
        n_heads: query heads per block, each of width d_model / n_heads.
        context: largest number of positions in a sequence.
        d_mlp: neurons per block; four times d_model if omitted.
        n_kv_heads: key and value heads; n_heads if omitted, fewer if queries share them.
        positions: rotary (Llama), learned (GPT-2), or none.
        norm: rms (Llama), layer (GPT-2), or none.
        mlp: plain (GPT-2), or gated (Llama).
        activation: activation function of the neurons.
        bias: whether attention maps, MLP maps and LayerNorms have a bias; the unembedding has none.
        tied_unembedding: whether lm_head and wte share one weight.
        rotary_base: base of the rotary frequencies; the slowest pair of dimensions completes a turn
            in about 2π times this number of positions.
        norm_eps: added inside the root of a norm.
        fused_attention: whether to use torch's fused kernel; set it to false for higher
            derivatives.

    Examples:
        >>> import torch
        >>> from spd_lightning import Decoder
        >>> _ = torch.manual_seed(0)
        >>> model = Decoder(vocab=50, d_model=16, n_layers=1, n_heads=4, context=12)
        >>> tokens = torch.tensor([[3, 1, 4, 1, 5]])
        >>> model(tokens).shape
        torch.Size([1, 5, 50])
        >>> round(model.loss(tokens).item(), 1)  # before training, it is log 50
        3.9
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
        arguments = dict(locals())  # first, while there are no other local variables
        arguments.pop("self")
        arguments.pop("__class__", None)
        super().__init__()
        _check(arguments)
        self.init_args = arguments
        self.vocab = vocab
        self.context = context
        self.layout = decoder_layout(n_layers, gated=mlp == "gated")

        def block() -> Block:
            norm_1 = norm_module(norm, d_model, norm_eps, bias)
            norm_2 = norm_module(norm, d_model, norm_eps, bias)
            attn = Attention(d_model, n_heads, n_kv_heads or n_heads, bias, fused_attention)
            mlp_kind = PlainMLP if mlp == "plain" else GatedMLP
            neurons = mlp_kind(d_model, d_mlp or 4 * d_model, activation, bias)
            return Block(norm_1, attn, norm_2, neurons)

        self.wte = nn.Embedding(vocab, d_model)
        self.wpe = nn.Embedding(context, d_model) if positions == "learned" else None
        self.h = nn.ModuleList(block() for _ in range(n_layers))
        self.norm_f = norm_module(norm, d_model, norm_eps, bias)
        self.lm_head = nn.Linear(d_model, vocab, bias=False)
        cos, sin = None, None
        if positions == "rotary":
            cos, sin = rotary_tables(context, d_model // n_heads, rotary_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        if tied_unembedding:
            self.lm_head.weight = self.wte.weight
        self._draw_weights(n_layers)

    def _draw_weights(self, n_layers: int) -> None:
        """Draw initial weights as in GPT-2, from a normal distribution.

        Its standard deviation is 0.02, divided by √(2 n_layers) for maps that write to the residual
        stream.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                std = 0.02
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std = 0.02 / (2 * n_layers) ** 0.5
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def rotary(self, positions: int) -> Rotary | None:
        """Return the rotary tables of the first positions; None if positions are not rotary."""
        if self.cos is None:
            return None
        return self.cos[:positions], self.sin[:positions]

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        """Return the logits of the next token at every position.

        Raises:
            BadInput: the sequence is longer than the context.
        """
        positions = tokens.shape[1]
        fits(positions, self.context, "Decoder")
        x = self.wte(tokens)  # [batch, pos, d_model]
        if self.wpe is not None:
            numbers = torch.arange(positions, device=tokens.device)
            x = x + self.wpe(numbers)
        rotary = self.rotary(positions)
        for block in self.h:
            x = block(x, rotary)
        return self.lm_head(self.norm_f(x))


def _check(arguments: dict) -> None:
    """Raise BadInput at the first argument that is out of range."""
    for name in ("vocab", "d_model", "n_layers", "n_heads", "context"):
        if arguments[name] < 1:
            raise BadInput(f"{name} {arguments[name]} in Decoder: it must be at least 1")
    d_model = arguments["d_model"]
    n_heads = arguments["n_heads"]
    n_kv_heads = arguments["n_kv_heads"] or n_heads
    if d_model % n_heads:
        raise BadInput(f"n_heads {n_heads} in Decoder: it must divide d_model, which is {d_model}")
    if n_heads % n_kv_heads:
        raise BadInput(
            f"n_kv_heads {n_kv_heads} in Decoder: it must divide n_heads, which is {n_heads}"
        )
    d_head = d_model // n_heads
    if arguments["positions"] == "rotary" and d_head % 2:
        raise BadInput(
            f"d_model {d_model} and n_heads {n_heads} in Decoder: rotary positions need an even "
            "d_head"
        )
