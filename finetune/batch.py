"""Batch: everything one optimizer step needs of its examples, as tensors."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor


def map_tensors(function: Callable[[Tensor], Tensor], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Apply `function` to every tensor of a nested mapping (SDXL's `added_cond_kwargs` is one level down)."""
    return {
        name: map_tensors(function, value) if isinstance(value, Mapping) else function(value)
        for name, value in tree.items()
    }


Tree = TypeVar("Tree")


def moved(tree: Tree, device: torch.device | str) -> Tree:
    """A tensor, or a mapping or dataclass of them, on `device`: through pinned memory, so that nobody waits."""
    found: Any = tree
    if isinstance(found, Tensor):
        found = found.pin_memory() if found.device.type == "cpu" and torch.device(device).type == "cuda" else found
        return found.to(device, non_blocking=True)
    if isinstance(found, Mapping):
        return {name: moved(value, device) for name, value in found.items()}  # pyright: ignore[reportReturnType]
    if is_dataclass(found) and not isinstance(found, type):
        there: Any = {field.name: moved(getattr(found, field.name), device) for field in fields(found)}
        return replace(found, **there)  # pyright: ignore[reportReturnType]
    return tree


def as_input(cond: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A UNet's keyword arguments for weights of this dtype.

    SDXL's `time_ids` are pixels, for which half precision is too coarse: the UNet itself rounds what it makes of them.
    """
    cast: dict[str, Any] = {}
    for name, value in cond.items():
        if isinstance(value, Mapping):
            cast[name] = as_input(value, dtype)
        elif isinstance(value, Tensor) and value.is_floating_point() and name != "time_ids":
            cast[name] = value.to(dtype)
        else:
            cast[name] = value
    return cast


@dataclass(frozen=True)
class Batch:
    """Examples of one optimizer step (or a slice of it). B is the number of examples."""

    stored: Tensor
    """What the encoder stored: posterior mean and std (B, 2C, H/8, W/8), or pixels (B, 3, H, W) uint8."""
    cond: Mapping[str, Any]
    """UNet keyword arguments, tensors of first size B; {} in pixel mode."""
    keys: Tensor
    """(B,) int64, always on the CPU: the random key of each example at this visit."""
    geometry: Tensor
    """(B, 6) int64: original height and width, crop top and left, target height and width, in pixels."""
    ids: tuple[str, ...]
    """Where each example came from, for messages."""
    weight: Tensor
    """(B,) fp32 loss weight of each example."""
    extra: Tensor | None = None
    """Channels appended to the UNet's input (inpainting), (B, C, H/8, W/8)."""

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`; the keys stay on the CPU, where draws are made."""
        return replace(moved(self, device), keys=self.keys)

    def split(self, size: int) -> Iterator["Batch"]:
        """Consecutive slices of at most `size` examples, for gradient accumulation."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield Batch(
                stored=self.stored[part],
                cond=map_tensors(lambda tensor, part=part: tensor[part], self.cond),
                keys=self.keys[part],
                geometry=self.geometry[part],
                ids=self.ids[part],
                weight=self.weight[part],
                extra=None if self.extra is None else self.extra[part],
            )
