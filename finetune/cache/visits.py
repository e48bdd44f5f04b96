"""What a visit to an example loads: an encoding that is kept, or the picture itself."""

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from finetune import seeding
from finetune.cache.keys import picture_key
from finetune.cache.store import Store
from finetune.data.images import to_rgb
from finetune.data.masks import weights
from finetune.data.pictures import Pictures
from finetune.data.transforms import Placement

_DIMMED = 0.25
"""How much light is left of what does not count."""


@dataclass(frozen=True)
class Kept:
    """Visits to encodings that are kept in a store. A random crop is that of the picture's first visit."""

    in_memory = True

    store: Store
    pictures: Pictures
    encoder: str
    """Its fingerprint."""
    precision: str
    seed: int

    def load(self, index: int, key: int) -> tuple[Tensor, tuple[int, ...]]:
        """The stored encoding (C, h, w), mirrored half of the time if flips are wanted, and its geometry."""
        placement, flip = self.placed(index, key)
        (item,) = self.store.load([self._key(index, placement, flip)])
        stored = item["stored"]
        return stored.float() if stored.is_floating_point() else stored, placement.geometry(flip)

    def placed(self, index: int, key: int) -> tuple[Placement, bool]:
        """What is trained on of the picture, and whether it is mirrored."""
        return self._placement(index), self.pictures.flips and _flipped(key)

    def seen(self, index: int, key: int) -> Tensor:
        """(3, H, W) uint8: the pixels whose encoding `load` answers."""
        return self.pixels(index, self.pictures.flips and _flipped(key))

    def key(self, index: int, flip: bool) -> str:
        """Of the encoding of one version of a picture."""
        return self._key(index, self._placement(index), flip)

    def _key(self, index: int, placement: Placement, flip: bool) -> str:
        digest = self.pictures.checked(index).digest
        return picture_key(digest, placement, flip, self.encoder, self.precision, self.pictures.background)

    def pixels(self, index: int, flip: bool) -> Tensor:
        """(3, H, W) uint8 that are to be encoded. Raises DataError where the picture is another than at the start."""
        return self._placement(index).pixels(_opaque(self.pictures, index), flip)

    def _placement(self, index: int) -> Placement:
        first_visit = seeding.example_key(self.seed, self.pictures.ids[index], 0)
        return self.pictures.placement(self.pictures.checked(index).size, first_visit)


@dataclass(frozen=True)
class Live:
    """Visits to the pictures themselves; crop and flip are drawn anew each time."""

    in_memory = False

    pictures: Pictures

    def load(self, index: int, key: int, flip: bool | None = None) -> tuple[Tensor, tuple[int, ...]]:
        """Pixels (3, H, W) uint8 and their geometry; `flip` is drawn where flips are wanted, unless given."""
        image = _opaque(self.pictures, index)
        if flip is None:
            flip = self.pictures.flips and _flipped(key)
        placement = self.pictures.placement(image.size, key)
        return placement.pixels(image, flip), placement.geometry(flip)

    def shown(self, index: int, key: int) -> tuple[Tensor, tuple[int, ...]]:
        """What `load` answers, not mirrored, for people: where a mask lets no error count it is dark."""
        pixels, geometry = self.load(index, key, flip=False)
        if (mask := self.pictures.mask(index)) is not None:
            light = weights(mask, self.placed(index, key)[0], False, (pixels.shape[1], pixels.shape[2]))
            pixels = (pixels * (_DIMMED + (1 - _DIMMED) * light)).to(torch.uint8)
        return pixels, geometry

    def placed(self, index: int, key: int) -> tuple[Placement, bool]:
        """What is trained on of the picture, and whether it is mirrored."""
        return self.pictures.placement(self.pictures.checked(index).size, key), self.pictures.flips and _flipped(key)

    def seen(self, index: int, key: int) -> Tensor:
        """The pixels that `load` answers."""
        return self.load(index, key)[0]


def _opaque(pictures: Pictures, index: int) -> Image.Image:
    """The picture as RGB: of our own datasets they come so, and upright."""
    image = pictures[index].image
    return image if image.mode == "RGB" else to_rgb(image, background=pictures.background)


def _flipped(key: int) -> bool:
    return bool(seeding.uniform(torch.tensor([key]), "flip") < 0.5)
