"""Preprocess and Crop: from an image to pixels of the training size, and their coordinates."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypedDict

import torch
from PIL import Image, ImageColor
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from finetune.data.buckets import Buckets
from finetune.data.images import WHITE
from finetune.deprecation import Renamed
from finetune.errors import UsageError
from finetune.seeding import uniform

PREPROCESSING = 1
"""Raised when the same picture and `Crop` come to other pixels: what was encoded before is then encoded again."""


class Crop(NamedTuple):
    """Which pixels of a picture are trained on: scaled to a size, and a rectangle cut out of that."""

    original: tuple[int, int]
    """Height and width of the picture, upright."""
    resized: tuple[int, int]
    """Height and width that it is scaled to."""
    top_left: tuple[int, int]
    """Top and left of what is cut out of the scaled picture."""
    size: tuple[int, int]
    """Height and width of what is cut out."""

    def pixels(self, image: Image.Image, flip: bool = False) -> Tensor:
        """(3, H, W) uint8 of an upright RGB picture of the original size; with `flip`, mirrored left to right."""
        (top, left), (height, width) = self.top_left, self.size
        resized = image.resize((self.resized[1], self.resized[0]), Image.Resampling.BILINEAR)
        part = resized.crop((left, top, left + width, top + height))
        return pil_to_tensor(part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else part)

    def companion_pixels(self, image: Image.Image, flip: bool = False) -> Tensor:
        """(C, H, W) uint8 of a companion of the picture, such as a mask, which is scaled to its size first."""
        height, width = self.original
        same = image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BILINEAR)
        return self.pixels(same, flip)

    def time_ids(self, flip: bool = False) -> tuple[int, ...]:
        """Original height and width, crop top and left, target height and width; of the mirrored picture if `flip`."""
        (top, left), (height, width) = self.top_left, self.size
        return (*self.original, top, self.resized[1] - width - left if flip else left, height, width)


def whole(width: int, height: int) -> Crop:
    """The picture as it is."""
    return Crop((height, width), (height, width), (0, 0), (height, width))


@dataclass(frozen=True)
class Preprocess:
    """Resize and crop a picture to a square, or to the size of its bucket.

    With "crop", the picture is scaled until it just covers that size, which is then cut out; with "squash", both sides
    are scaled to it, whatever the picture's shape.

    Raises:
        UsageError: `resolution` is below 1, or `resize_mode` or `background` unknown, or buckets are squashed or of
            another resolution.
    """

    resolution: int
    """Pixels per side of the square; with buckets, none of them has a larger area."""
    resize_mode: Literal["crop", "squash"] = "crop"
    center_crop: bool = True
    """Cut out the centre, just as torchvision's Resize and CenterCrop do; if False, a place drawn from the key."""
    random_flip: bool = False
    """Whether visits may be mirrored; which ones, the caller draws."""
    buckets: Buckets | None = None
    """The sizes that pictures become; None: all become squares."""
    background: str = WHITE
    """A colour that Pillow knows by name or as #rrggbb: what shows where a picture is transparent."""

    def __post_init__(self) -> None:
        if self.resolution < 1:
            raise UsageError(f"resolution = {self.resolution}: expected 1 or more")
        if self.resize_mode not in ("crop", "squash"):
            raise UsageError(f"resize_mode = {self.resize_mode!r}: choose crop or squash")
        if self.buckets and (self.resize_mode == "squash" or self.buckets.resolution != self.resolution):
            raise UsageError(f"{self.buckets} goes with resize_mode crop and resolution = {self.buckets.resolution}")
        if not _is_colour(self.background):
            raise UsageError(f"background = {self.background!r}: expected a colour: black, grey, #ff8000")

    def __call__(self, image: Image.Image, key: int, flip: bool = False) -> tuple[Tensor, Tensor]:
        """Pixels and time ids of an upright RGB picture; a pure function of picture, key and flip.

        Returns:
            pixels (3, H, W) uint8, and time ids (6,) int64, see `Crop.time_ids`.
        """
        crop = self.crop(image.width, image.height, key)
        return crop.pixels(image, flip), torch.tensor(crop.time_ids(flip))

    place = Renamed("crop")

    def crop(self, width: int, height: int, key: int) -> Crop:
        """Where the result lies in a picture of this size; a random crop is drawn from the key."""
        size = self.size(width, height)
        resized = size if self.resize_mode == "squash" else _covering(size, width, height)
        spare = resized[0] - size[0], resized[1] - size[1]
        if self.center_crop:
            top_left = round(spare[0] / 2), round(spare[1] / 2)
        else:
            place = uniform(torch.tensor([key]), "crop").item()  # one draw: only one side has room
            top_left = int(place * (spare[0] + 1)), int(place * (spare[1] + 1))
        return Crop((height, width), resized, top_left, size)

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Height and width of the result for a picture of this size."""
        if self.buckets is None:
            return self.resolution, self.resolution
        bucket = self.buckets.size(width, height)
        return bucket[1], bucket[0]


class PreprocessOptions(TypedDict, total=False):
    """The arguments of `Preprocess`, for a dataset that makes one of them."""

    resolution: int
    resize_mode: Literal["crop", "squash"]
    center_crop: bool
    random_flip: bool
    buckets: Buckets | None
    background: str


def preprocess_of(transform: Preprocess | None, options: PreprocessOptions) -> Preprocess:
    """Return the transform, or one made of its arguments, at 512 pixels by default.

    Raises:
        UsageError: both are given, or an argument is out of range.
    """
    if transform is None:
        return Preprocess(**{"resolution": 512, **options})
    if options:
        raise UsageError(f"{min(options)} cannot be used with transform: give it to the Preprocess")
    return transform


def _is_colour(text: str) -> bool:
    """Whether it is an opaque one."""
    try:
        return len(ImageColor.getrgb(text)) == 3
    except ValueError:
        return False


def _covering(size: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    """(height, width) of a picture scaled until it just covers a size, rounded down as torchvision's Resize does."""
    if width * size[0] <= height * size[1]:
        return max(size[0], int(size[1] * height / width)), size[1]
    return size[0], max(size[1], int(size[0] * width / height))


def normalize(pixels: Tensor) -> Tensor:
    """Pixels uint8 in [0, 255] -> fp32 in [-1, 1]; any shape."""
    return pixels.float() / 127.5 - 1
