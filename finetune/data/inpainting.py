"""What an inpainting model is shown of a picture: all but the places that it is to paint."""

import random

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor

from finetune.data.masks import weights
from finetune.data.transforms import Crop, normalize
from finetune.seeding import fold

MASKS = 8
"""That are drawn for a picture whose encodings are kept; each visit takes one of them."""

DRAWING = 1
"""Raised when `drawn_mask` comes to other masks."""

_WHOLE = 0.25
"""Share of the masks that cover all of a picture, as when Stable Diffusion's own inpainting models were trained."""

_GREY = 127


def number_of(key: int) -> int:
    """Which of its picture's `MASKS` masks the visit with this key takes."""
    return fold(key, "mask") % MASKS


def drawn_mask(key: int, height: int, width: int) -> Tensor:
    """(1, H, W) uint8, 255 where the model is to paint: everything, or a few boxes, or a few broad strokes.

    Boxes and chains of broad strokes are what Suvorov et al. 2022, "Resolution-robust Large Mask Inpainting with
    Fourier Convolutions", section 2.3, found to teach most.
    """
    source = random.Random(fold(key, "mask drawing"))
    image = Image.new("L", (width, height))
    draw = ImageDraw.Draw(image)
    if source.random() < _WHOLE:
        draw.rectangle((0, 0, width, height), fill=255)
    elif source.random() < 0.5:
        for _ in range(source.randint(1, 3)):
            box_width, box_height = (round(side * source.uniform(0.2, 0.6)) for side in (width, height))
            x, y = source.randint(0, width), source.randint(0, height)  # its middle, so that it may lie at the border
            box = x - box_width // 2, y - box_height // 2, x + box_width // 2, y + box_height // 2
            draw.rectangle(box, fill=255)
    else:
        for _ in range(source.randint(1, 2)):
            _stroke(draw, source, width, height)
    return pil_to_tensor(image)


def middle_mask(height: int, width: int) -> Tensor:
    """(1, H, W) uint8, 255 in the middle half of both sides."""
    mask = torch.zeros(1, height, width, dtype=torch.uint8)
    mask[:, height // 4 : height - height // 4, width // 4 : width - width // 4] = 255
    return mask


def _stroke(draw: ImageDraw.ImageDraw, source: random.Random, width: int, height: int) -> None:
    """A chain of two to five lines with round ends."""
    radius = min(width, height) * source.uniform(0.06, 0.15)
    points = [(source.uniform(0, width), source.uniform(0, height)) for _ in range(source.randint(3, 6))]
    draw.line(points, fill=255, width=max(1, round(2 * radius)))
    for x, y in points:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)


def placed_mask(mask: Image.Image, placement: Crop, flip: bool) -> Tensor:
    """(1, H, W) uint8 of a mask that comes with its picture: 255 where that is rather white than black.

    Args:
        mask: 8 bit grey, of the picture's own shape.
        placement, flip: of the picture.
    """
    return (weights(mask, placement, flip, placement.size) >= 0.5).to(torch.uint8) * 255


def visible(pixels: Tensor) -> Tensor:
    """Pixels uint8 (B, 3, H, W), or with a mask (B, 4, H, W) -> fp32 (B, 3, H, W) in [-1, 1], 0 where that covers them.

    So do diffusers' pipelines cover what they hand to the VAE.
    """
    if pixels.shape[1] == 3:
        return normalize(pixels)
    return normalize(pixels[:, :3]) * (pixels[:, 3:] == 0)


def small(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask (B, 1, H, W) uint8 of 0 and 255 -> fp32 (B, 1, h, w) of 0 and 1: the nearest, as diffusers' pipelines."""
    return F.interpolate((mask > 0).float(), size)


def for_people(pixels: Tensor) -> Tensor:
    """(4, H, W) uint8 -> (3, H, W): grey where the mask covers it."""
    return torch.where(pixels[3:] > 0, _GREY, pixels[:3]).to(torch.uint8)
