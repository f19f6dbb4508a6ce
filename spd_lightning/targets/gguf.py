"""Models in GGUF files, the format of llama.cpp, loaded as models of transformers.

A GGUF file holds the weights of a model, mostly quantized, together with its configuration and its
tokenizer. The package gguf reads it; transformers turns configuration and tokenizer into its own
classes, and the weights into floating-point numbers. It knows Llama, Qwen2, GPT-2 and others.

Nothing in a GGUF file is code, and no other file of its folder is read.
"""

import importlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spd_lightning.errors import BadInput
from spd_lightning.paths import expanded

SUFFIX = ".gguf"


def is_gguf(reference: str) -> bool:
    """Return whether a reference names a GGUF file by its ending."""
    return reference.endswith(SUFFIX)


@contextmanager
def arguments(reference: str) -> Iterator[dict[str, str]]:
    """Yield the arguments with which `from_pretrained` of transformers reads a GGUF file.

    They name a folder that contains nothing but a link to the file, since transformers would also
    read other files next to it.

    Raises:
        BadInput: the file does not exist, or the package gguf is not installed.
    """
    path = expanded(reference)
    if not path.is_file():
        raise BadInput(f"model '{reference}': no such file; give the path of a GGUF file")
    _library(reference)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / path.name).symlink_to(path.resolve())
        yield {"pretrained_model_name_or_path": folder, "gguf_file": path.name}


def check_complete(reference: str, model: Any) -> None:
    """Raise BadInput unless a model has as many parameters as its GGUF file holds numbers.

    transformers silently leaves out tensors that its class of the model has no place for.
    """
    reader = _library(reference).GGUFReader(expanded(reference))
    held = sum(int(tensor.n_elements) for tensor in reader.tensors)
    used = sum(parameter.numel() for parameter in model.parameters())
    if held != used:
        raise BadInput(
            f"model '{reference}': the file holds {held} numbers, but transformers makes a model "
            f"of {used} parameters from it; give a checkpoint in the format of HuggingFace"
        )


def _library(reference: str) -> Any:
    """Import and return the package gguf, which comes with the extra [gguf]."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        remedy = "pip install 'spd_lightning[gguf]' (in a checkout: pip install -e '.[gguf]')"
        raise BadInput(f"model '{reference}': needs gguf; {remedy}") from error
