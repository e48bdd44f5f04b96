"""Writing safetensors so that equal content makes equal files, with one tensor at a time in memory."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from finetune.atomic_io import writing

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NUMBER_FORMATS = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""A safetensors header's word -> the number format, in the order of tensors in a file.

torch has the other formats in part, and models use none of them.
"""
_WORDS = {dtype: word for word, dtype in NUMBER_FORMATS.items()}
_ORDER = {word: place for place, word in enumerate(NUMBER_FORMATS)}
DIGESTS = {"sshs_model_hash": "", "modelspec.hash_sha256": "0x"}
"""Entry of the metadata that may hold the SHA-256 of the tensors' part of the file -> what stands before the digits."""
_NO_DIGEST = "0" * 64

Items = Callable[[], Iterable[tuple[str, Tensor]]]
"""Names and tensors, in any order; called more than once, so that no tensor has to be kept."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file, whole or not at all, readable for all; metadata in the order of its keys.

    safetensors itself writes the entries of the metadata in random order, and files could not be compared.
    """
    stream_tensors(path, tensors.items, metadata)


def stream_tensors(path: Path, items: Items, metadata: Mapping[str, str], *, digests: bool = False) -> None:
    """Write a file as `write_tensors` does, with one tensor at a time in addition to those that are in memory already.

    Args:
        path: the file.
        items: the tensors.
        metadata: of the file.
        digests: add the entries of `DIGESTS`.
    """
    tensors = sorted(((name, _WORDS[t.dtype], tuple(t.shape), t.nbytes) for name, t in items()), key=_place)
    entries = dict(metadata) | ({name: begin + _NO_DIGEST for name, begin in DIGESTS.items()} if digests else {})
    header: dict[str, object] = {"__metadata__": dict(sorted(entries.items()))}
    end = 0
    for name, word, shape, size in tensors:
        header[name] = {"dtype": word, "shape": shape, "data_offsets": (end, end + size)}
        end += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the data that follows is to be aligned
    start = 8 + len(text)
    offsets = {name: header[name]["data_offsets"][0] for name, *_ in tensors}  # pyright: ignore[reportIndexIssue]
    with writing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(start + end)
        for name, tensor in items():
            file.seek(start + offsets[name])
            _write_numbers(file, tensor)
            del tensor  # before the next one is made
        if digests:
            digest = _digest(file, start)
            file.seek(8)
            file.write(text.replace(_NO_DIGEST.encode(), digest.encode()))


def _place(entry: tuple[str, str, tuple[int, ...], int]) -> tuple[int, str]:
    """The order of tensors in a file: as safetensors itself writes them."""
    name, word, *_ = entry
    return _ORDER[word], name


def _write_numbers(file: IO[bytes], tensor: Tensor) -> None:
    if tensor.numel():
        numbers = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        file.write(numbers.numpy().data)


def _digest(file: IO[bytes], start: int) -> str:
    """The SHA-256 of the tensors' part of a file, which metadata does not change."""
    file.flush()
    file.seek(start)
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()
