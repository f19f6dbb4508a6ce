"""HuggingFace checkpoints converted to our decoder: the same logits, from separate parts.

GPT-2 stores queries, keys and values as one map, and its weights transposed; the conversion undoes
both. Llama, Mistral and Qwen2 share one layout. A setting that the decoder does not support is an
error that names it; `hf:` loads any model as it is.
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
    """Return a GPT-2, Llama, Mistral or Qwen2 checkpoint as a `Decoder`, in float32.

    Args:
        reference: the checkpoint's folder, its GGUF file, or its name on the hub.

    Raises:
        BadInput: the checkpoint does not exist, or needs something that the decoder lacks.
    """
    model = checkpoint(reference, "float32")
    return _convert(reference, model)


def _convert(reference: str, model: Any) -> Decoder:
    """Return a model of transformers as a decoder on the same device, in the same precision.

    The weights decide, rather than the configuration: the unembedding is tied if it is the same
    parameter as the embedding, every weight needs a place in the decoder, and the logits have to
    agree in the end.

    Raises:
        BadInput: the model needs something that the decoder lacks.
    """
    tied = is_tied(model)
    decoder = decoder_like(reference, model.config, tied)
    weight = next(model.parameters())
    decoder = decoder.to(weight.device, weight.dtype)
    _fill(reference, decoder, model)
    _compare_logits(reference, decoder, model)
    return decoder


def _fill(reference: str, decoder: Decoder, model: Any) -> None:
    """Copy the weights of a model into a decoder."""
    family = _FAMILIES[model.config.model_type]
    weights = dict(family.weights(model.state_dict(), model.config))
    places = decoder.state_dict()
    if surplus := sorted(set(weights) - set(places)):
        raise BadInput(
            f"decoder:{reference}: the decoder has no place for '{surplus[0]}'; load it as it is: "
            f"hf:{reference}"
        )
    for name, place in places.items():
        if name in weights:
            place.copy_(weights[name])
        elif name.endswith("bias"):
            place.zero_()
        else:
            raise BadInput(
                f"decoder:{reference}: its checkpoint has no '{name}'; load it as it is: "
                f"hf:{reference}"
            )


SAME = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.1}
"""Largest difference between the logits of model and decoder, as a share of the largest logit.

It is not smaller in float64, since norms are always computed in float32.
"""


@torch.no_grad()
def _compare_logits(reference: str, decoder: Decoder, model: Any) -> None:
    """Raise BadInput if decoder and model disagree on a few random tokens."""
    length = min(16, decoder.context)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(decoder.vocab, (1, length), generator=generator)
    weight = next(model.parameters())
    tokens = tokens.to(weight.device)
    expected = model(input_ids=tokens, use_cache=False).logits  # [1, pos, vocab]
    error = decoder(tokens) - expected
    difference = float(error.abs().max())
    largest = float(expected.abs().max())
    tolerance = SAME[expected.dtype] * largest
    if difference > tolerance:
        raise BadInput(
            f"decoder:{reference}: our decoder gives other logits than the checkpoint, by "
            f"{difference:.2g} where the largest is {largest:.2g}; load it as it is: "
            f"hf:{reference}"
        )


def equivalent_decoder(target: HuggingFaceLM) -> tuple[Decoder, dict[str, str]] | None:
    """Return a decoder that computes the same as a model; None if the decoder does not support it.

    The decoder is in the model's precision. It comes with its module names by the model's module
    names. GPT-2's joint map to queries, keys and values is missing, as the decoder has three maps.
    """
    model = target.model
    try:
        decoder = _convert("", model)
    except BadInput:
        return None
    replacements = _FAMILIES[model.config.model_type].parts
    decoder_names = dict(decoder.named_modules())
    names = dict[str, str]()
    for name, _ in model.named_modules():
        renamed = _rename(f"{name}.", replacements).removesuffix(".")
        if renamed in decoder_names:
            names[name] = renamed
    return decoder, names


def decoder_like(reference: str, config: Any, tied: bool | None = None) -> Decoder:
    """Return an untrained `Decoder` of the shape that a checkpoint's configuration describes.

    Args:
        reference: the checkpoint's folder or name, for messages.
        config: the configuration.
        tied: whether the unembedding is the embedding, if known from the weights; as configured if
            omitted.

    Raises:
        BadInput: the configuration needs something that the decoder lacks.
    """
    family = config.model_type
    if family not in _FAMILIES:
        raise _unsupported(reference, "model_type", family)
    settings = _FAMILIES[family].settings(reference, config)
    if tied is not None:
        settings["tied_unembedding"] = tied
    return Decoder(**settings)


def _unsupported(reference: str, name: str, value: Any) -> BadInput:
    return BadInput(
        f"decoder:{reference}: {name} {value!r} is not supported by our decoder; load it as it is: "
        f"hf:{reference}"
    )


def _check_supported(reference: str, config: Any, supported: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise BadInput at the first setting whose value is not among the supported ones."""
    for name, values in supported.items():
        value = getattr(config, name, values[0])
        if value not in values:
            raise _unsupported(reference, name, value)


# ---- GPT-2 ---------------------------------------------------------------------------------------


def _gpt2_settings(reference: str, config: Any) -> dict[str, Any]:
    supported = {
        "activation_function": tuple(ACTIVATIONS),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    _check_supported(reference, config, supported)
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
    """Yield names and weights of the decoder; maps are transposed, and c_attn is split in three."""
    for name, tensor in weights.items():
        renamed = _rename(name, _GPT2_PARTS)
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.T  # a Conv1D stores [d_in, d_out]
        if ".attn.c_attn." not in renamed:
            yield renamed, tensor
            continue
        for letter, part in zip("qkv", tensor.chunk(3), strict=True):
            yield renamed.replace("c_attn", f"{letter}_proj"), part


# ---- Llama, Mistral, Qwen2 -----------------------------------------------------------------------


def _llama_settings(reference: str, config: Any) -> dict[str, Any]:
    rotary = dict(getattr(config, "rope_parameters", None) or {})
    base = rotary.pop("rope_theta", 10000.0)
    scaled = rotary.pop("rope_type", "default") != "default"
    partial = rotary.pop("partial_rotary_factor", 1.0) != 1.0
    if scaled or partial:
        raise _unsupported(reference, "rope_parameters", config.rope_parameters)
    d_head = config.hidden_size // config.num_attention_heads
    supported: dict[str, tuple[Any, ...]] = {
        "hidden_act": tuple(ACTIVATIONS),
        "head_dim": (d_head, None),
    }
    # Qwen2 can switch its window off; Mistral has a window unless its size is None
    if getattr(config, "use_sliding_window", True):
        supported["sliding_window"] = (None,)
    _check_supported(reference, config, supported)
    # the decoder has a bias at all maps or at none; biases that a checkpoint lacks become zero
    bias = (
        getattr(config, "attention_bias", False)
        or getattr(config, "mlp_bias", False)
        or config.model_type == "qwen2"
    )
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
        "bias": bool(bias),
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
        renamed = _rename(name, _LLAMA_PARTS)
        yield renamed, tensor


def _rename(name: str, replacements: Mapping[str, str]) -> str:
    for old, new in replacements.items():
        name = name.replace(old, new)
    return name


class _Family(NamedTuple):
    """The conversion of one family of models.

    Attributes:
        settings: returns the decoder's arguments for a configuration.
        weights: yields the decoder's weights by name, from the model's weights and configuration.
        parts: replacements that turn the model's module names into the decoder's.
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
