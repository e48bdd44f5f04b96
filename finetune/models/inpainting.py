"""Inpainting: the image condition of UNets that see an image with a hole."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor

from finetune.models.encoders import Encoder
from finetune.seeding import fold

MASKS = 8
"""Number of masks that are drawn for a picture whose encodings are cached; each visit uses one of them."""

DRAWING = 1
"""Increased when `drawn_mask` returns other masks for the same keys, so that the cached ones are not used."""

_WHOLE = 0.25
"""Share of the masks that cover all of a picture, as when Stable Diffusion's own inpainting models were trained."""

_GREY = 127


class Inpainting:
    """The image condition of an inpainting UNet: the mask, white where it is to paint, and the latents of the rest.

    The channels are those of diffusers' inpainting pipelines: the mask at the size of the latents, and C scaled latents
    of the picture with grey (0 in [-1, 1]) where the mask is white.
    """

    companion = "mask"
    pipeline_example: Mapping[str, str] = {"image": "room.png", "mask_image": "hole.png"}

    def variants(self, key: int | None, *, has_companion: bool) -> Sequence[int]:
        if has_companion:
            return (0,)
        return range(MASKS) if key is None else (mask_number(key),)

    def pixels(self, companion: Tensor | None, size: tuple[int, int], key: int | None) -> Tensor:
        """(1, H, W) uint8, 255 where the model is to paint: where the mask is rather white than black.

        Without a mask it is drawn from the key; without a key, it is the middle of the picture.
        """
        if companion is not None:
            return (companion >= 128).to(torch.uint8) * 255
        return middle_mask(*size) if key is None else drawn_mask(key, *size)

    def cache_name(self, companion: str | None, key: int) -> str:
        return f"mask {key if companion is None else f'{companion} over black'} {DRAWING}"

    def encode(self, encoder: Encoder, pixels: Tensor, condition: Tensor) -> dict[str, Tensor]:
        """Latents of what the mask leaves ("stored"), and the mask at their size, 0 or 1 ("mask")."""
        stored = encoder.encode(pixels * (condition == 0).to(pixels.device)).cpu()
        # The nearest value, as diffusers' pipelines scale masks.
        mask = F.interpolate((condition > 0).float().cpu(), (stored.shape[-2], stored.shape[-1]))
        return {"stored": stored, "mask": mask.to(torch.uint8)}

    def channels(self, encoder: Encoder, stored: Mapping[str, Tensor], keys: Tensor) -> Tensor:
        return torch.cat(
            [stored["mask"].float(), encoder.sample(stored["stored"], keys, "sample of what is shown")], dim=1
        )

    def empty(self, encoder: Encoder, keys: Tensor, side: int) -> Tensor:
        """The channels of pictures of which everything is to be painted."""
        stored = self.encode(encoder, torch.zeros(1, 3, side, side), torch.full((1, 1, side, side), 255))
        count = len(keys)
        return self.channels(encoder, {name: tensor.expand(count, -1, -1, -1) for name, tensor in stored.items()}, keys)

    def preview(self, pixels: Tensor, condition: Tensor) -> Tensor:
        """The picture, grey where the mask covers it."""
        return torch.where(condition > 0, _GREY, pixels).to(torch.uint8)

    def pipeline_arguments(
        self, images: tuple[Image.Image, Image.Image] | None, *, width: int, height: int
    ) -> dict[str, Any]:
        """Arguments that make the pipeline paint from noise alone; without images, it paints a whole picture."""
        picture, mask = images or (Image.new("RGB", (width, height), "white"), Image.new("L", (width, height), "white"))
        return {
            "image": picture,
            "mask_image": mask,
            "strength": 1.0,
            "height": picture.height,
            "width": picture.width,
        }

    def summary(self, companions: int, *, live: bool) -> str:
        drawn = "random, another at each visit" if live else f"random, {MASKS} for each image"
        if not companions:
            return f"{drawn}; the model paints white areas"
        return f"{companions}, for other images {drawn}; the model paints white areas"


def mask_number(key: int) -> int:
    """Which of the `MASKS` masks of a picture the visit with this sample key uses."""
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
