"""Safetensors files: written atomically, with a digest of their content, and never pickled."""

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
    """Write a safetensors file atomically.

    Args:
        tensors: the tensors by name.
        path: the file.
        header: entries of its header; the digest of the whole content is added to them.

    Raises:
        BadInput: the file cannot be written.
    """
    copies = {}
    for name, tensor in tensors.items():
        copies[name] = tensor.detach().cpu().contiguous().clone()
    if header:
        digest = content_digest(header, copies)
        header = {**header, "digest": digest}
    with runs.write_whole(path) as temporary:
        try:
            save_file(copies, temporary, header)
        except SafetensorError as error:  # safetensors reports a full disk like this
            raise OSError(str(error)) from error


def read_tensors(path: Path, remedy: str = RESTORE) -> tuple[dict[str, Tensor], dict]:
    """Read the tensors and the header of a safetensors file, and check the header's digest.

    Raises:
        BadInput: the file is missing or damaged, or not a safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = load_file(path)
            header = file.metadata() or {}
        entries = {key: value for key, value in header.items() if key != "digest"}
        if header:
            digest = content_digest(entries, tensors)
            if header.get("digest") != digest:
                raise ValueError("its content does not match the digest in its header")
        return tensors, entries
    except (SafetensorError, OSError, ValueError, OverflowError, MemoryError) as error:
        why = " ".join(str(error).split())[:200]
        raise BadInput(f"'{path}': cannot be read ({why}); {remedy}") from error


def content_digest(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of a header and the name, type, shape and bytes of every tensor."""
    header_text = json.dumps(dict(header), sort_keys=True)
    content = hashlib.sha256(header_text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        shape = list(tensor.shape)
        content.update(f"\0{name}\0{tensor.dtype}\0{shape}\0".encode())
        values = tensor.reshape(-1).view(torch.uint8)
        content.update(values.numpy().data)
    return content.hexdigest()[:16]  # 16 hex characters
