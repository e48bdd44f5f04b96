"""Batch: the tensors that one optimizer step needs of its examples."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from finetune.deprecation import Renamed

Tree = TypeVar("Tree")


def map_tensors(function: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    """Return a copy of a tree of mappings and dataclasses with `function` applied to each tensor.

    SDXL's `added_cond_kwargs` is such a mapping, one level down.
    """
    node: Any = tree
    if isinstance(node, Tensor):
        return function(node)  # pyright: ignore[reportReturnType]
    if isinstance(node, Mapping):
        return {name: map_tensors(function, value) for name, value in node.items()}  # pyright: ignore[reportReturnType]
    if is_dataclass(node) and not isinstance(node, type):
        there: Any = {field.name: map_tensors(function, getattr(node, field.name)) for field in fields(node)}
        return replace(node, **there)  # pyright: ignore[reportReturnType]
    return tree


def moved(tree: Tree, device: torch.device | str) -> Tree:
    """A tree's tensors on `device`: through pinned memory, so that nobody waits."""
    pinned = torch.device(device).type == "cuda"

    def move(tensor: Tensor) -> Tensor:
        tensor = tensor.pin_memory() if pinned and tensor.device.type == "cpu" else tensor
        return tensor.to(device, non_blocking=True)

    return map_tensors(move, tree)


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors in a mapping or dataclass, and in those inside of it, in their order."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        return [tensor for value in tree.values() for tensor in tensors_of(value)]
    if is_dataclass(tree):
        return [tensor for field in fields(tree) for tensor in tensors_of(getattr(tree, field.name))]
    return []


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
class GlobalStep:
    """An optimizer step of which several processes compute a part each, or whose examples weigh differently."""

    ids: tuple[str, ...]
    """Of all its examples; those of one process follow each other."""
    weight: float
    """What the sum of their weighted losses is divided by: their number times the mean weight of an epoch's visits. The
    weights of this step would cancel where all of its examples weigh the same."""
    start: int
    """Where this process's begin."""
    keys: tuple[int, ...] = ()
    """Sample keys of all its examples; may be left out, and are then unknown where a step is not finite."""


@dataclass(frozen=True)
class Batch:
    """Examples of one optimizer step (or a slice of it). B is the number of examples."""

    latent_params: Tensor
    """What the encoder stored: posterior mean and std (B, 2C, H/8, W/8), or pixels (B, 3, H, W) uint8."""
    cond: Mapping[str, Any]
    """UNet keyword arguments, tensors of first size B; {} in pixel mode."""
    keys: Tensor
    """(B,) int64, always on the CPU: the random key of each example at this visit."""
    time_ids: Tensor
    """(B, 6) int64: original height and width, crop top and left, target height and width, in pixels."""
    ids: tuple[str, ...]
    """Where each example came from, for messages."""
    weight: Tensor
    """(B,) fp32 loss weight of each example."""
    is_class_image: tuple[bool, ...] = ()
    """Of each example whether it is a class picture, which prior prediction teaches otherwise; (): none is."""
    mask: Tensor | None = None
    """(B, 1, H/8, W/8) in [0, 1]: how much an error counts there; None: wholly, everywhere."""
    unet_channels: Tensor | None = None
    """Channels appended to the UNet's input (inpainting), (B, C, H/8, W/8)."""
    global_step: GlobalStep | None = None
    """The step that it belongs to; None: its examples, and those of the batches given with it, are all."""

    stored = Renamed("latent_params")
    geometry = Renamed("time_ids")
    of_class = Renamed("is_class_image")
    extra = Renamed("unet_channels")

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch with its tensors on `device`; the keys stay on the CPU, where draws are made."""
        return replace(moved(self, device), keys=self.keys)

    def split(self, size: int) -> Iterator["Batch"]:
        """Consecutive slices of at most `size` examples, for gradient accumulation."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield Batch(
                latent_params=self.latent_params[part],
                cond=map_tensors(lambda tensor, part=part: tensor[part], self.cond),
                keys=self.keys[part],
                time_ids=self.time_ids[part],
                ids=self.ids[part],
                weight=self.weight[part],
                is_class_image=self.is_class_image[part],
                mask=None if self.mask is None else self.mask[part],
                unet_channels=None if self.unet_channels is None else self.unet_channels[part],
                global_step=self.global_step,
            )
