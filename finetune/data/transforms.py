"""From a picture to square pixels, and where they lie in it."""

from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from finetune.errors import UsageError
from finetune.seeding import uniform


@dataclass(frozen=True)
class Preprocess:
    """Resize and crop a picture to a square.

    With "crop", the shorter side is scaled to `resolution` and a square cut out; with "squash", both sides are
    scaled to `resolution`, whatever the picture's shape.

    Raises:
        UsageError: `resolution` is below 1, or `resize_mode` unknown.
    """

    resolution: int
    """Pixels per side of the result."""
    resize_mode: Literal["crop", "squash"] = "crop"
    center_crop: bool = True
    """Cut out the centre, just as torchvision's Resize and CenterCrop do; if False, a place drawn from the key."""
    random_flip: bool = False
    """Whether visits may be mirrored; which ones, the caller draws."""

    def __post_init__(self) -> None:
        if self.resolution < 1:
            raise UsageError(f"resolution = {self.resolution}: allowed is 1 or more")
        if self.resize_mode not in ("crop", "squash"):
            raise UsageError(f"resize_mode = {self.resize_mode!r}: allowed is crop, squash")

    def __call__(self, image: Image.Image, key: int, flip: bool = False) -> tuple[Tensor, Tensor]:
        """Pixels and geometry of an RGB picture; a pure function of picture, key and flip.

        Args:
            image: an upright RGB picture.
            key: of the example at this visit; the random crop is drawn from it.
            flip: mirror the result left to right.

        Returns:
            pixels (3, resolution, resolution) uint8, and geometry (6,) int64: original height and width, crop top and
            left in the resized (and, with flip, mirrored) picture, target height and width, all in pixels.
        """
        side = self.resolution
        resized = image.resize(self._size(image), Image.Resampling.BILINEAR)
        top, left = self._corner(resized, key)
        square = resized.crop((left, top, left + side, top + side))
        if flip:
            square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            left = resized.width - side - left
        geometry = torch.tensor([image.height, image.width, top, left, side, side])
        return pil_to_tensor(square), geometry

    def _size(self, image: Image.Image) -> tuple[int, int]:
        """(width, height) to scale to, rounded as torchvision's Resize does."""
        side, width, height = self.resolution, image.width, image.height
        if self.resize_mode == "squash":
            return side, side
        return (side, int(side * height / width)) if width <= height else (int(side * width / height), side)

    def _corner(self, resized: Image.Image, key: int) -> tuple[int, int]:
        spare_height, spare_width = resized.height - self.resolution, resized.width - self.resolution
        if self.center_crop:
            return round(spare_height / 2), round(spare_width / 2)
        place = uniform(torch.tensor([key]), "crop").item()  # one draw: only the longer side has room
        return int(place * (spare_height + 1)), int(place * (spare_width + 1))


def normalize(pixels: Tensor) -> Tensor:
    """Pixels uint8 in [0, 255] -> fp32 in [-1, 1]; any shape."""
    return pixels.float() / 127.5 - 1
