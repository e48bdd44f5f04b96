"""Writing safetensors so that equal content makes equal files."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from finetune.atomic_io import write_whole

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file, whole or not at all, readable for all; metadata in the order of its keys.

    safetensors itself writes the entries of the metadata in random order, and files could not be compared.
    """
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    header, data = _parts(content)
    ordered = {"__metadata__": dict(sorted(metadata.items())), **header}
    text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the data that follows is to be aligned
    write_whole(path, len(text).to_bytes(8, "little") + text + data)


def data_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the tensors' part of the file that `write_tensors` makes, which metadata does not change."""
    return hashlib.sha256(_parts(save({name: tensor.contiguous() for name, tensor in tensors.items()}))[1]).hexdigest()


def _parts(content: bytes) -> tuple[dict[str, object], bytes]:
    """Header and data of a safetensors file: 8 bytes of length, JSON, then the tensors."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]
