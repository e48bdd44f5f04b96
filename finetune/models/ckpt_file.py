"""Pickled checkpoints (.ckpt, .pt, .bin): the only module that loads a pickle, and tensors only."""

import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.errors import ModelError
from finetune.models.tensor_file import NUMBER_FORMATS

_STATE = "state_dict"
"""Under which a training script's checkpoint has the weights, beside its step and the like."""

_READ_ERRORS = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    EOFError,
    AssertionError,
    OverflowError,
    struct.error,
    zipfile.BadZipFile,
)
"""What torch raises, beside its own, for what is no pickle, or a broken one."""


class _Nothing:
    """Stands for an object that a trainer has left beside the weights."""

    def __init__(self, *arguments: object) -> None:
        """Take nothing of it."""

    def __setstate__(self, state: object) -> None:
        """Take nothing of it."""


_NOTHINGS: list[Any] = [
    (_Nothing, f"{package}.{name}")
    for package in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "pytorch_lightning.utilities")
    for name in (
        "callbacks.model_checkpoint.ModelCheckpoint",
        "callbacks.early_stopping.EarlyStopping",
        "callbacks.lr_monitor.LearningRateMonitor",
        "utilities.parsing.AttributeDict",
        "utilities.data.AttributeDict",
        "parsing.AttributeDict",
    )
]
"""Classes of Lightning that old checkpoints name, read as nothing; none of them is imported."""


def read_pickled(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors in a pickle by their names, and the names of what else it holds.

    They lie in the file until they are used, where it is one that torch has written since 1.6.

    Raises:
        ModelError: it is none, holds no tensors, or would run code or build other objects: then nothing of it is built.
    """
    try:
        with torch.serialization.safe_globals(_NOTHINGS):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ModelError(f"{path}: contains more than tensors and is not loaded: {_reason(error)}") from error
    except _READ_ERRORS as error:
        raise ModelError(f"{path}: not a pickle that torch has written: {_reason(error)}") from error
    entries = dict(_named(content, ""))
    tensors = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ModelError(f"{path}: holds no tensors with names")
    for name, tensor in tensors.items():
        if tensor.dtype not in NUMBER_FORMATS.values():
            raise ModelError(f"{path}: {_shown(name)} is {tensor.dtype}, for which a .safetensors has no place")
    return _apart(tensors), [_shown(name) for name in entries if name not in tensors]


def _named(content: Any, name: str) -> Iterator[tuple[str, Any]]:
    """What a nested mapping holds, by the keys that lead there; those of a state dict by its own keys."""
    if not isinstance(content, Mapping) or (name and not content):
        yield name, content
        return
    for key, value in content.items():
        yield from _named(value, f"{name}.{key}" if name and name != _STATE else str(key))


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor contiguous, and with memory of its own where another one shares it: a file has no place for that."""
    storages: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().to_dense().contiguous()
        place, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        apart[name] = tensor.clone() if place in storages or size > tensor.nbytes else tensor
        storages.add(place)
    return apart


def _reason(error: Exception) -> str:
    """Without torch's advice to read it all the same."""
    lines = [line for text in str(error).splitlines() if (line := text.strip())]
    unsupported = [line for line in lines if "GLOBAL" in line]
    return _shown((unsupported or lines or [type(error).__name__])[0][:200])


def _shown(text: str) -> str:
    """A stranger's text, fit for a terminal."""
    return text if text.isprintable() else repr(text)
