"""Tiny Llama models in GGUF files, written with the package gguf as llama.cpp's converter does."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import transformers

from spd_lightning.data.tokenized import _BYTES

VOCAB, CONTEXT, WIDTH, D_MLP, LAYERS, HEADS, KV_HEADS = 261, 24, 32, 64, 2, 4, 2
QUANTIZED = "model.layers.1.mlp.up_proj.weight"
"""The matrix that is stored in 8 bits; the other tensors are stored in float32."""
_PARTS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "model.layers.": "blk.",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
}


def weights(tied: bool = True) -> dict[str, np.ndarray]:
    """Return random weights by their names in transformers."""
    random = np.random.default_rng(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=D_MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=tied,
    )
    parameters = dict(transformers.LlamaForCausalLM(config).named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    return {name: random.normal(size=shape).astype("float32") for name, shape in shapes.items()}


def write(path: Path, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Write a model with a byte-level tokenizer, and return its weights as the file holds them."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_vocab_size(VOCAB)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(D_MLP)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    _add_tokenizer(writer)
    stored = {}
    for name, tensor in tensors.items():
        data, kind = _interleaved(name, tensor), None
        stored[name] = tensor
        if name == QUANTIZED:
            kind = gguf.GGMLQuantizationType.Q8_0
            data = gguf.quantize(tensor, kind)
            stored[name] = gguf.dequantize(data, kind)
        writer.add_tensor(_renamed(name), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def _renamed(name: str) -> str:
    """Return the name of a tensor in a GGUF file."""
    for old, new in _PARTS.items():
        name = name.replace(old, new)
    return name


def _interleaved(name: str, tensor: np.ndarray) -> np.ndarray:
    """Return queries and keys with the two halves of each head interleaved, as llama.cpp has them.

    It rotates neighboring entries; transformers rotates entry i and entry i + d_head / 2.
    """
    heads: dict[str, Any] = {"q_proj": HEADS, "k_proj": KV_HEADS}
    for part, count in heads.items():
        if part in name:
            halves = tensor.reshape(count, 2, -1, tensor.shape[1])
            return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)
    return tensor


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    """Add a byte-level BPE: 256 bytes, four merges, and the end of a text."""
    letters = sorted(_BYTES)
    merges = ["t h", "th e", "Ġ the", "i n"]
    merged = [merge.replace(" ", "") for merge in merges]
    tokens = [*letters, *merged, "<|endoftext|>"]
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([*[normal] * (VOCAB - 1), control])
    writer.add_token_merges(merges)
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id):
        add(VOCAB - 1)
