"""What a visit to an example loads: an encoding that is kept, or the picture itself."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from finetune import seeding
from finetune.data.images import to_rgb
from finetune.data.pictures import Pictures


@dataclass(frozen=True)
class Kept:
    """Visits to encodings that are held in memory."""

    in_memory = True

    stored: Sequence[Tensor]
    """Per picture (F, C, h, w): F = 1, or 2 where flips are wanted (as it is, mirrored)."""
    geometry: Sequence[Tensor]
    """Per picture (F, 6)."""

    def load(self, index: int, key: int) -> tuple[Tensor, Tensor]:
        """The stored encoding (C, h, w), mirrored half of the time if flips are kept, and its geometry (6,)."""
        version = int(len(self.stored[index]) > 1 and _flipped(key))
        return self.stored[index][version], self.geometry[index][version]


@dataclass(frozen=True)
class Live:
    """Visits to the pictures themselves; crop and flip are drawn anew each time."""

    in_memory = False

    pictures: Pictures

    def load(self, index: int, key: int) -> tuple[Tensor, Tensor]:
        """Pixels (3, H, W) uint8 and geometry (6,)."""
        return pixels_of(self.pictures, index, key, flip=wants_flips(self.pictures) and _flipped(key))


def pixels_of(pictures: Pictures, index: int, key: int, flip: bool) -> tuple[Tensor, Tensor]:
    """One picture, preprocessed: pixels (3, H, W) uint8 and geometry (6,)."""
    image = pictures[index].image
    if image.mode != "RGB":  # those that are come upright from our own datasets
        image = to_rgb(image)
    if pictures.transform is not None:
        return pictures.transform(image, key, flip)
    height, width = image.height, image.width
    return functional.pil_to_tensor(image), torch.tensor([height, width, 0, 0, height, width])


def wants_flips(pictures: Pictures) -> bool:
    return pictures.transform is not None and pictures.transform.random_flip


def _flipped(key: int) -> bool:
    return bool(seeding.uniform(torch.tensor([key]), "flip") < 0.5)
