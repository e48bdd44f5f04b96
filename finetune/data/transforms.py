"""From a picture to pixels of the size that is trained, and where they lie in it."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from finetune.errors import UsageError
from finetune.seeding import uniform

PREPROCESSING = 1
"""Raised when the same picture and `Placement` come to other pixels: what was encoded before is then encoded anew."""


class Placement(NamedTuple):
    """Which pixels of a picture are trained on: scaled to a size, and a rectangle cut out of that."""

    original: tuple[int, int]
    """Height and width of the picture, upright."""
    scaled: tuple[int, int]
    """Height and width that it is scaled to."""
    corner: tuple[int, int]
    """Top and left of what is cut out of the scaled picture."""
    size: tuple[int, int]
    """Height and width of what is cut out."""

    def pixels(self, image: Image.Image, flip: bool = False) -> Tensor:
        """(3, H, W) uint8 of an upright RGB picture of the original size; with `flip`, mirrored left to right."""
        (top, left), (height, width) = self.corner, self.size
        resized = image.resize((self.scaled[1], self.scaled[0]), Image.Resampling.BILINEAR)
        part = resized.crop((left, top, left + width, top + height))
        return pil_to_tensor(part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else part)

    def geometry(self, flip: bool = False) -> tuple[int, ...]:
        """Original height and width, crop top and left, target height and width; of the mirrored picture if `flip`."""
        (top, left), (height, width) = self.corner, self.size
        return (*self.original, top, self.scaled[1] - width - left if flip else left, height, width)


def whole(width: int, height: int) -> Placement:
    """The picture as it is."""
    return Placement((height, width), (height, width), (0, 0), (height, width))


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
        """Pixels and geometry of an upright RGB picture; a pure function of picture, key and flip.

        Returns:
            pixels (3, resolution, resolution) uint8, and geometry (6,) int64, see `Placement.geometry`.
        """
        placement = self.place(image.width, image.height, key)
        return placement.pixels(image, flip), torch.tensor(placement.geometry(flip))

    def place(self, width: int, height: int, key: int) -> Placement:
        """Where the result lies in a picture of this size; a random crop is drawn from the key."""
        side, scaled = self.resolution, self._scaled(width, height)
        spare = scaled[0] - side, scaled[1] - side
        if self.center_crop:
            corner = round(spare[0] / 2), round(spare[1] / 2)
        else:
            place = uniform(torch.tensor([key]), "crop").item()  # one draw: only the longer side has room
            corner = int(place * (spare[0] + 1)), int(place * (spare[1] + 1))
        return Placement((height, width), scaled, corner, (side, side))

    def _scaled(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) to scale to, rounded as torchvision's Resize does."""
        side = self.resolution
        if self.resize_mode == "squash":
            return side, side
        return (int(side * height / width), side) if width <= height else (side, int(side * width / height))


def normalize(pixels: Tensor) -> Tensor:
    """Pixels uint8 in [0, 255] -> fp32 in [-1, 1]; any shape."""
    return pixels.float() / 127.5 - 1
