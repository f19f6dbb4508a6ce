"""HuggingFace checkpoints on our own decoder: the same logits from parts that can be read.

GPT-2 keeps queries, keys and values in one map and its weights transposed; both are undone. Llama,
Mistral and Qwen2 share one layout. What the decoder has no switch for is refused by name: `hf:`
takes any model as it is.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spd_lightning.errors import BadInput
from spd_lightning.targets.huggingface import HuggingFaceLM, checkpoint, is_tied
from spd_lightning.targets.transformer import Decoder

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}


def decoder_from(reference: str) -> Decoder:
    """A GPT-2, Llama, Mistral or Qwen2 checkpoint as a `Decoder`, in float32.

    Args:
        reference: the checkpoint's folder, or its name on the hub.

    Raises:
        BadInput: there is no such checkpoint, or it needs what the decoder does not have.
    """
    return _converted(reference, checkpoint(reference, "float32"))


def _converted(reference: str, model: Any) -> Decoder:
    """A model of transformers as a decoder, on the same device and in the same precision.

    The weights decide and not the configuration: whether the unembedding is the embedding's own is
    read off the parameters, every weight needs a place, and in the end the logits have to agree.

    Raises:
        BadInput: it needs what the decoder does not have.
    """
    like = next(model.parameters())
    decoder = decoder_like(reference, model.config, tied=is_tied(model)).to(like.device, like.dtype)
    _fill(reference, decoder, model)
    _compare_logits(reference, decoder, model)
    return decoder


def _fill(reference: str, decoder: Decoder, model: Any) -> None:
    """Give the decoder a model's weights."""
    given = dict(_FAMILIES[model.config.model_type].weights(model.state_dict(), model.config))
    own = decoder.state_dict()
    if surplus := sorted(set(given) - set(own)):
        raise BadInput(
            f"decoder:{reference}: no place for its '{surplus[0]}'; take it as it is: "
            f"hf:{reference}"
        )
    for name, tensor in own.items():
        if name in given:
            tensor.copy_(given[name])
        elif name.endswith("bias"):
            tensor.zero_()
        else:
            raise BadInput(
                f"decoder:{reference}: its checkpoint has no '{name}'; take it as it is: "
                f"hf:{reference}"
            )


SAME = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.1}
"""How far the logits of model and decoder may be apart, as a share of the largest; norms are always
in float32.
"""


@torch.no_grad()
def _compare_logits(reference: str, decoder: Decoder, model: Any) -> None:
    """Raise BadInput if the decoder says anything else than the model on a few random tokens."""
    length = min(16, decoder.context)
    tokens = torch.randint(decoder.vocab, (1, length), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(next(model.parameters()).device)
    theirs = model(input_ids=tokens, use_cache=False).logits
    apart, largest = (float(x.abs().max()) for x in (decoder(tokens) - theirs, theirs))
    if apart > SAME[theirs.dtype] * largest:
        raise BadInput(
            f"decoder:{reference}: our decoder gives other logits than the checkpoint, by "
            f"{apart:.2g} "
            f"where the largest is {largest:.2g}; take it as it is: hf:{reference}"
        )


def equivalent_decoder(target: HuggingFaceLM) -> tuple[Decoder, dict[str, str]] | None:
    """A model taken as it is, and the decoder that computes the same; None where the decoder has no
    switch for it.

    Returns the decoder, in the model's precision, and its names of the model's modules. GPT-2's one
    map for queries, keys and values has no name there: the decoder has three.
    """
    model = target.model
    try:
        decoder = _converted("", model)
    except BadInput:
        return None
    parts = _FAMILIES[model.config.model_type].parts
    theirs = dict(decoder.named_modules())
    names = {
        name: _renamed(f"{name}.", parts).removesuffix(".") for name, _ in model.named_modules()
    }
    return decoder, {name: own for name, own in names.items() if own in theirs}


def decoder_like(reference: str, config: Any, tied: bool | None = None) -> Decoder:
    """An untrained `Decoder` of the shape that a checkpoint's configuration describes.

    tied: whether the unembedding is the embedding's own, if the weights have shown it; if omitted,
    as configured.

    Raises:
        BadInput: it needs what the decoder does not have.
    """
    if config.model_type not in _FAMILIES:
        raise _unsupported(reference, "model_type", config.model_type)
    settings = _FAMILIES[config.model_type].settings(reference, config)
    if tied is not None:
        settings["tied_unembedding"] = tied
    return Decoder(**settings)


def _unsupported(reference: str, name: str, value: Any) -> BadInput:
    return BadInput(
        f"decoder:{reference}: {name} {value!r} is not for our decoder; take it as it is: "
        f"hf:{reference}"
    )


def _refuse(reference: str, config: Any, wanted: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises BadInput at the first setting that has none of the values wanted."""
    for name, values in wanted.items():
        if (value := getattr(config, name, values[0])) not in values:
            raise _unsupported(reference, name, value)


# ---- GPT-2 ---------------------------------------------------------------------------------------


def _gpt2_settings(reference: str, config: Any) -> dict[str, Any]:
    wanted = {
        "activation_function": tuple(ACTIVATIONS),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    _refuse(reference, config, wanted)
    return {
        "vocab": config.vocab_size,
        "d_model": config.n_embd,
        "n_layers": config.n_layer,
        "n_heads": config.n_head,
        "context": config.n_positions,
        "d_mlp": config.n_inner or 4 * config.n_embd,
        "positions": "learned",
        "norm": "layer",
        "mlp": "plain",
        "activation": ACTIVATIONS[config.activation_function],
        "bias": True,
        "tied_unembedding": bool(config.tie_word_embeddings),
        "norm_eps": config.layer_norm_epsilon,
    }


_GPT2_PARTS = {
    "transformer.": "",
    ".ln_1.": ".norm_1.",
    ".ln_2.": ".norm_2.",
    "ln_f.": "norm_f.",
    ".attn.c_proj.": ".attn.o_proj.",
    ".mlp.c_proj.": ".mlp.down_proj.",
}


def _gpt2_weights(weights: Mapping[str, Tensor], config: Any) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights.items():
        mapped = name.endswith(
            ("c_attn.weight", "c_proj.weight", "c_fc.weight")
        )  # Conv1D: [d_in, d_out]
        own = _renamed(name, _GPT2_PARTS)
        tensor = tensor.T if mapped else tensor
        if ".attn.c_attn." not in own:
            yield own, tensor
            continue
        for part, piece in zip("qkv", tensor.chunk(3), strict=True):
            yield own.replace("c_attn", f"{part}_proj"), piece


# ---- Llama and its like --------------------------------------------------------------------------


def _llama_settings(reference: str, config: Any) -> dict[str, Any]:
    rotary = dict(getattr(config, "rope_parameters", None) or {})
    base = rotary.pop("rope_theta", 10000.0)
    if (
        rotary.pop("rope_type", "default") != "default"
        or rotary.pop("partial_rotary_factor", 1.0) != 1.0
    ):
        raise _unsupported(reference, "rope_parameters", config.rope_parameters)
    d_head = config.hidden_size // config.num_attention_heads
    _refuse(reference, config, {"hidden_act": tuple(ACTIVATIONS), "head_dim": (d_head, None)})
    if getattr(
        config, "use_sliding_window", True
    ):  # Mistral slides by its window alone, Qwen2 has a switch
        _refuse(reference, config, {"sliding_window": (None,)})
    biased = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    return {
        "vocab": config.vocab_size,
        "d_model": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "context": config.max_position_embeddings,
        "d_mlp": config.intermediate_size,
        "n_kv_heads": config.num_key_value_heads,
        "positions": "rotary",
        "norm": "rms",
        "mlp": "gated",
        "activation": ACTIVATIONS[config.hidden_act],
        "bias": bool(biased)
        or config.model_type == "qwen2",  # where only some maps have one, the others' are zero
        "tied_unembedding": bool(config.tie_word_embeddings),
        "rotary_base": float(base),
        "norm_eps": config.rms_norm_eps,
    }


_LLAMA_PARTS = {
    "model.embed_tokens.": "wte.",
    "model.layers.": "h.",
    "model.norm.": "norm_f.",
    ".input_layernorm.": ".norm_1.",
    ".post_attention_layernorm.": ".norm_2.",
    ".self_attn.": ".attn.",
}


def _llama_weights(weights: Mapping[str, Tensor], config: Any) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights.items():
        yield _renamed(name, _LLAMA_PARTS), tensor


def _renamed(name: str, parts: Mapping[str, str]) -> str:
    for theirs, ours in parts.items():
        name = name.replace(theirs, ours)
    return name


class _Family(NamedTuple):
    """How models of one family become decoders: their settings, their weights, and what their
    modules are called.
    """

    settings: Callable[[str, Any], dict[str, Any]]
    weights: Callable[[Mapping[str, Tensor], Any], Iterator[tuple[str, Tensor]]]
    parts: Mapping[str, str]


_LLAMA = _Family(_llama_settings, _llama_weights, _LLAMA_PARTS)
_FAMILIES = {
    "gpt2": _Family(_gpt2_settings, _gpt2_weights, _GPT2_PARTS),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
}
