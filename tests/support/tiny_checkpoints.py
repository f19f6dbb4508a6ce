"""Tiny checkpoints in the format of HuggingFace transformers.

All parameters are random, including biases and gains.
"""

from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB, CONTEXT = 61, 24
SHARED = {"bos_token_id": None, "eos_token_id": None}
GPT2 = {
    "vocab_size": VOCAB,
    "n_positions": CONTEXT,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    **SHARED,
}
LLAMA = {
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    **SHARED,
}


def write(folder: Path, kind: str, **settings: Any) -> Any:
    """Write a checkpoint of this kind, and return the model in eval mode."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    defaults = GPT2 if kind == "gpt2" else LLAMA
    config = transformers.AutoConfig.for_model(kind, **{**defaults, **settings})
    generator = torch.Generator().manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return model


def tokens(rows: int = 3, length: int = CONTEXT) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))
