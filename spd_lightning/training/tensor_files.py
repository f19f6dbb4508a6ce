"""Safetensors files: written whole, with a digest of their content in the header, never a
pickle.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from spd_lightning import runs
from spd_lightning.errors import BadInput
from spd_lightning.runs.shapes import RESTORE


def write_tensors(
    tensors: Mapping[str, Tensor], path: Path, header: dict[str, str] | None = None
) -> None:
    """A safetensors file, whole or not at all; a header gets the digest of all that the file holds.

    Raises:
        BadInput: the disk refuses.
    """
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    if header:
        header = {**header, "digest": content_digest(header, own)}
    with runs.write_whole(path) as temporary:
        try:
            save_file(own, temporary, header)
        except SafetensorError as error:  # which is how safetensors tells of a full disk
            raise OSError(str(error)) from error


def read_tensors(path: Path, remedy: str = RESTORE) -> tuple[dict[str, Tensor], dict]:
    """Tensors and header of a safetensors file; the header's digest is checked.

    Raises:
        BadInput: it is missing, damaged, or no safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = load_file(path)
            header = file.metadata() or {}
        rest = {key: value for key, value in header.items() if key != "digest"}
        if header and header.get("digest") != content_digest(rest, tensors):
            raise ValueError("its content does not fit the digest in its header")
        return tensors, rest
    except (SafetensorError, OSError, ValueError, OverflowError, MemoryError) as error:
        why = " ".join(str(error).split())[:200]
        raise BadInput(f"'{path}': cannot be read ({why}); {remedy}") from error


def content_digest(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Sixteen hex characters that stand for a header and every tensor's name, type, shape and
    bytes.
    """
    seen = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        seen.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        seen.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return seen.hexdigest()[:16]
