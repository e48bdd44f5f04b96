"""What a visit to an example loads: an encoding that is kept, or the picture itself."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from finetune import seeding
from finetune.cache.keys import picture_key
from finetune.cache.store import Store
from finetune.data import inpainting
from finetune.data.image_dataset import ImageDataset
from finetune.data.images import to_rgb
from finetune.data.masks import weights
from finetune.data.transforms import Crop

_DIMMED = 0.25
"""How much light is left of what does not count."""


class CacheVariant(NamedTuple):
    """Which of the encodings of a picture."""

    flip: bool
    """Mirrored."""
    mask: int | None = None
    """With a hole for an inpainting model: the number of its mask; None: whole."""


@dataclass(frozen=True)
class CachedImages:
    """Visits to encodings that are kept in a store. A random crop is that of the picture's first visit."""

    in_memory = True

    store: Store
    pictures: ImageDataset
    encoder: str
    """Its fingerprint, and the environment that it runs in."""
    precision: str
    seed: int
    inpainting: bool = False
    """What is left of the picture beside a hole is wanted too."""

    def load(self, index: int, key: int) -> tuple[Tensor, tuple[int, ...]]:
        """The stored encoding (C, h, w), mirrored half of the time if flips are wanted, and its geometry.

        For inpainting the picture's encoding, that of what is left of it, and the mask: (2C + 1, h, w).
        """
        placement, flip = self.crop_and_flip(index, key)
        versions = self._visited(index, key, flip)
        first, *more = self.store.load([self._key(index, placement, version) for version in versions])
        tensors = [first["stored"], *(part for left in more for part in (left["stored"], left["mask"]))]
        stored = torch.cat([part.float() for part in tensors]) if more else tensors[0]
        return stored.float() if stored.is_floating_point() else stored, placement.geometry(flip)

    def crop_and_flip(self, index: int, key: int) -> tuple[Crop, bool]:
        """What is trained on of the picture, and whether it is mirrored."""
        return self._placement(index), self.pictures.flips and _flipped(key)

    def preview_pixels(self, index: int, key: int) -> Tensor:
        """(3, H, W) uint8: the pixels whose encoding `load` answers."""
        pixels = self.pixels(index, self._visited(index, key, self.crop_and_flip(index, key)[1])[-1])
        return inpainting.for_people(pixels) if self.inpainting else pixels

    def versions(self, index: int, key: int | None) -> list[CacheVariant]:
        """All that a visit with this key may need of a picture; None: any visit."""
        masks: list[int | None] = [None]
        if self.inpainting and key is None and self.pictures.mask_digest(index) is None:
            masks += range(inpainting.MASKS)
        elif self.inpainting:
            masks.append(self._mask_of(index, key or 0))
        return [
            CacheVariant(flip, mask) for flip in ((False, True) if self.pictures.flips else (False,)) for mask in masks
        ]

    def _visited(self, index: int, key: int, flip: bool) -> list[CacheVariant]:
        """What the visit with this key is made of."""
        return [CacheVariant(flip), *([CacheVariant(flip, self._mask_of(index, key))] if self.inpainting else ())]

    def _mask_of(self, index: int, key: int) -> int:
        return 0 if self.pictures.mask_digest(index) is not None else inpainting.number_of(key)

    def key(self, index: int, version: CacheVariant) -> str:
        """Return the cache key of one variant of a picture."""
        return self._key(index, self._placement(index), version)

    def _key(self, index: int, placement: Crop, version: CacheVariant) -> str:
        digest, background, covered = self.pictures.image_info(index).digest, self.pictures.background, ""
        if version.mask is not None:
            file = self.pictures.mask_digest(index)
            mask = self._drawn_from(index, version.mask) if file is None else f"{file} over black"
            covered = f"mask {mask} {inpainting.DRAWING}"
        return picture_key(
            digest,
            placement=placement,
            flip=version.flip,
            encoder=self.encoder,
            precision=self.precision,
            background=background,
            covered=covered,
        )

    def _drawn_from(self, index: int, number: int) -> int:
        return seeding.example_key(self.seed, self.pictures.ids[index], number)

    def pixels(self, index: int, version: CacheVariant) -> Tensor:
        """(3, H, W) uint8 that are to be encoded, or with a mask (4, H, W).

        Raises:
            DataError: the picture is another than at the start.
        """
        placement = self._placement(index)
        pixels = placement.pixels(_opaque(self.pictures, index), version.flip)
        if version.mask is None:
            return pixels
        return _with_mask(
            pixels,
            self.pictures,
            index=index,
            placement=placement,
            flip=version.flip,
            key=self._drawn_from(index, version.mask),
        )

    def _placement(self, index: int) -> Crop:
        first_visit = seeding.example_key(self.seed, self.pictures.ids[index], 0)
        return self.pictures.placement(self.pictures.image_info(index).size, first_visit)


@dataclass(frozen=True)
class LiveImages:
    """Visits to the pictures themselves; crop, flip and what an inpainting model paints are drawn again each time."""

    in_memory = False

    pictures: ImageDataset
    inpainting: bool = False

    def load(self, index: int, key: int, flip: bool | None = None) -> tuple[Tensor, tuple[int, ...]]:
        """Pixels (3, H, W) uint8, for inpainting with the mask (4, H, W), and their geometry.

        `flip` is drawn where flips are wanted, unless given.
        """
        image = _opaque(self.pictures, index)
        if flip is None:
            flip = self.pictures.flips and _flipped(key)
        placement = self.pictures.placement(image.size, key)
        pixels = placement.pixels(image, flip)
        if self.inpainting:
            pixels = _with_mask(pixels, self.pictures, index=index, placement=placement, flip=flip, key=key)
        return pixels, placement.geometry(flip)

    def masked_preview(self, index: int, key: int) -> tuple[Tensor, tuple[int, ...]]:
        """What `load` answers, not mirrored, for people: dark where a mask lets no error count, grey where it hides."""
        pixels, geometry = self.load(index, key, flip=False)
        if self.inpainting:
            pixels = inpainting.for_people(pixels)
        elif (mask := self.pictures.mask(index)) is not None:
            light = weights(mask, self.crop_and_flip(index, key)[0], False, (pixels.shape[1], pixels.shape[2]))
            pixels = (pixels * (_DIMMED + (1 - _DIMMED) * light)).to(torch.uint8)
        return pixels, geometry

    def crop_and_flip(self, index: int, key: int) -> tuple[Crop, bool]:
        """What is trained on of the picture, and whether it is mirrored."""
        return self.pictures.placement(self.pictures.image_info(index).size, key), self.pictures.flips and _flipped(key)

    def preview_pixels(self, index: int, key: int) -> Tensor:
        """The pixels that `load` answers, for people."""
        pixels, _ = self.load(index, key)
        return inpainting.for_people(pixels) if self.inpainting else pixels


def _opaque(pictures: ImageDataset, index: int) -> Image.Image:
    """The picture as RGB: of our own datasets they come so, and upright."""
    image = pictures[index].image
    return image if image.mode == "RGB" else to_rgb(image, background=pictures.background)


def _with_mask(pixels: Tensor, pictures: ImageDataset, index: int, placement: Crop, flip: bool, key: int) -> Tensor:
    """(4, H, W): pixels, and 255 where a model is to paint: as the picture's own mask says, or drawn from the key."""
    mask = pictures.mask(index) if pictures.mask_digest(index) is not None else None
    if mask is not None:
        return torch.cat([pixels, inpainting.placed_mask(mask, placement, flip)])
    return torch.cat([pixels, inpainting.drawn_mask(key, *placement.size)])


def _flipped(key: int) -> bool:
    return bool(seeding.uniform(torch.tensor([key]), "flip") < 0.5)
