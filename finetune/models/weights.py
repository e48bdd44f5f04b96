"""Loading safetensors into a module with no more memory than the module itself needs."""

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from finetune.atomic_io import as_readable_as
from finetune.errors import ModelError
from finetune.models.single_file import read_header
from finetune.models.tensor_file import NUMBER_FORMATS

STEM = "diffusion_pytorch_model"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a diffusers component, full precision before the fp16 variant, shards in order.

    Raises:
        ModelError: the folder holds none (pickled `.bin` weights are not read), or a shard is missing.
    """
    for variant in ("", ".fp16"):
        index = folder / f"{STEM}.safetensors.index{variant}.json"
        single = folder / f"{STEM}{variant}.safetensors"
        if single.is_file():
            return [single]
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            missing = [name for name in shards if not (folder / name).is_file()]
            if missing:
                raise ModelError(f"{folder}: part missing: {missing[0]} (named by {index.name})")
            return [folder / name for name in shards]
    raise ModelError(f"{folder}: part missing: {STEM}.safetensors")


def count_numbers(folder: Path) -> int:
    """How many numbers a component's safetensors hold, read from their headers. Raises ModelError."""
    total = 0
    for path in weight_files(folder) if list(folder.glob(f"{STEM}*")) else folder.glob("model*.safetensors"):
        try:
            with safe_open(path, "pt") as file:
                total += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 # no dict
        except SafetensorError as error:
            raise ModelError(f"{path} is damaged: {error}") from error
    return total


def read_tensors(path: Path, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of these names, or all in the order of the header, one by one; see `tensor_reader`."""
    with tensor_reader(path) as read:
        for name in read_header(path) if names is None else names:
            yield name, read(name)


@contextmanager
def tensor_reader(path: Path) -> Iterator[Callable[[str], Tensor]]:
    """Open a file whose tensors are read by name, each into memory of its own, which is free when nobody holds it.

    Read and not mapped: the pages of a mapping are held as long as it is open, and count as the process's memory.

    Raises:
        ModelError: the file is damaged.
    """
    try:
        with safe_open(path, "pt"):  # which looks whether each tensor lies where it can
            header = read_header(path)
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")

            def read(name: str) -> Tensor:
                entry = header[name]
                begin, end = entry["data_offsets"]
                content = torch.empty(end - begin, dtype=torch.uint8)
                file.seek(start + begin)
                if file.readinto(content.numpy().data) != end - begin:
                    raise ModelError(f"{path} is cut off")
                if (dtype := NUMBER_FORMATS.get(entry["dtype"])) is None:
                    raise ModelError(f"{path}: {name} is {entry['dtype']}; expected one of {', '.join(NUMBER_FORMATS)}")
                numbers = content.view(dtype) if len(content) else torch.empty(0, dtype=dtype)
                return numbers.view(entry["shape"])

            yield read
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged: {error}") from error


def read_weights(files: Iterable[Path], dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of the files, each converted as it is read: loading SD1.5's fp32 file as bf16 peaks at the size of
    the bf16 weights, where `from_pretrained` holds the file as well. Raises ModelError.
    """
    return {name: tensor.to(dtype) for path in files for name, tensor in read_tensors(path)}


def fingerprint(module: nn.Module, *settings: object) -> str:
    """A digest of a module's weights, as they are, and of what else decides its answers: 32 hexadecimal digits."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def sampled_digest(weights: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """A digest of up to 4096 numbers of each tensor, evenly spread: tells another model in a moment.

    `dtype`: that of the weights after rounding them to it.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        some = tensor.detach().flatten()[:: max(1, tensor.numel() // 4096)].to("cpu", dtype).contiguous()
        digest.update(f"{name} {some.dtype} {tuple(tensor.shape)}".encode())
        digest.update(some.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def rounded(state: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors in another number format; whole numbers as they are."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def in_dtype(module: Any, dtype: torch.dtype) -> Any:
    """The module itself for fp32, or a copy of it in another number format."""
    return module if dtype == torch.float32 else nn.Module.to(copy.deepcopy(module), dtype)


def save_part(part: Any, place: Path, variant: str | None = None) -> None:
    """Write a part of a pipeline to a folder as its library does, readable for whoever may read its config.

    `variant`: what stands in the names of files of weights, such as "fp16".
    """
    part.save_pretrained(place, **({"variant": variant} if variant and isinstance(part, nn.Module) else {}))
    for path in place.glob("*.safetensors"):
        as_readable_as(path, place / "config.json")


def assign(module: nn.Module, state: dict[str, Tensor], place: Path) -> None:
    """Fill a module that was made without storage. Raises ModelError where tensors do not fit its config."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
    if wrong:
        name = wrong[0]
        raise ModelError(
            f"{place}: weights do not fit the config: {name} is {shapes.get(name, 'missing')}, "
            f"expected {expected.get(name, 'none')} ({len(wrong)} such)"
        )
    module.load_state_dict(state, strict=True, assign=True)
