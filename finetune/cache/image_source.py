"""What a visit to an example loads: an encoding that is cached, or the picture itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from finetune import seeding
from finetune.cache.keys import picture_key
from finetune.cache.store import Store
from finetune.data.image_dataset import ImageDataset
from finetune.data.images import to_rgb
from finetune.data.masks import weights
from finetune.data.transforms import Crop
from finetune.models.image_condition import ImageCondition

_DIMMED = 0.25
"""How much light is left of what does not count."""


class LoadedImage(NamedTuple):
    """What a visit loads of its picture."""

    latent_params: Tensor
    """The cached encoding (C, h, w), floats as fp32; or the pixels (3, H, W) uint8."""
    time_ids: tuple[int, ...]
    """See `Crop.time_ids`."""
    condition: Mapping[str, Tensor] = {}
    """What is cached of the image condition, or its pixels (K, H, W) uint8 as "pixels"; {}: there is none."""


class CacheVariant(NamedTuple):
    """One of the encodings of a picture."""

    flip: bool
    """Whether it is mirrored."""
    condition: int | None = None
    """The number of an image condition; None: the picture itself."""


@dataclass(frozen=True)
class CachedImages:
    """Visits to encodings that are cached in a store. A random crop is that of the picture's first visit."""

    in_memory = True

    store: Store
    pictures: ImageDataset
    encoder: str
    """Fingerprint of the encoder, and the environment that it runs in."""
    precision: str
    seed: int
    condition: ImageCondition | None = None
    """What the UNet is shown of a picture with x_t."""

    def load(self, index: int, key: int) -> LoadedImage:
        """The cached encoding, mirrored half of the time if flips are wanted, with its time ids and condition."""
        crop, flip = self.crop_and_flip(index, key)
        variants = self._variants_of_visit(index, key, flip)
        items = self.store.load([self._key(index, crop, variant) for variant in variants])
        image, *conditions = [
            {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in item.items()}
            for item in items
        ]
        return LoadedImage(image["stored"], crop.time_ids(flip), *conditions)

    def crop_and_flip(self, index: int, key: int) -> tuple[Crop, bool]:
        """The crop of the picture that is trained on, and whether it is mirrored."""
        return self._crop(index), self.pictures.flips and _flipped(key)

    def preview_pixels(self, index: int, key: int) -> Tensor:
        """(3, H, W) uint8: the pixels whose encoding `load` returns, with their condition laid over them."""
        _, flip = self.crop_and_flip(index, key)
        return _preview(self.condition, self.pixels(index, self._variants_of_visit(index, key, flip)[-1]))

    def variants(self, index: int, key: int | None) -> list[CacheVariant]:
        """All encodings of a picture that a visit with this sample key may need; None: any visit."""
        conditions = [None, *self._condition_numbers(index, key)]
        flips = (False, True) if self.pictures.flips else (False,)
        return [CacheVariant(flip, condition) for flip in flips for condition in conditions]

    def _variants_of_visit(self, index: int, key: int, flip: bool) -> list[CacheVariant]:
        return [CacheVariant(flip, condition) for condition in (None, *self._condition_numbers(index, key))]

    def _condition_numbers(self, index: int, key: int | None) -> tuple[int, ...]:
        if self.condition is None:
            return ()
        has_companion = self.condition.companion in self.pictures.companions(index)
        return tuple(self.condition.variants(key, has_companion=has_companion))

    def key(self, index: int, variant: CacheVariant) -> str:
        """Return the cache key of one variant of a picture."""
        return self._key(index, self._crop(index), variant)

    def _key(self, index: int, crop: Crop, variant: CacheVariant) -> str:
        condition = ""
        if self.condition is not None and variant.condition is not None:
            companion = self.pictures.companions(index).get(self.condition.companion)
            condition = self.condition.cache_name(companion, self._condition_key(index, variant.condition))
        return picture_key(
            self.pictures.image_info(index).digest,
            crop=crop,
            flip=variant.flip,
            encoder=self.encoder,
            precision=self.precision,
            background=self.pictures.background,
            condition=condition,
        )

    def _condition_key(self, index: int, number: int) -> int:
        """The sample key that the condition with this number is drawn from."""
        return seeding.example_key(self.seed, self.pictures.ids[index], number)

    def pixels(self, index: int, variant: CacheVariant) -> Tensor:
        """(3, H, W) uint8 that are to be encoded, or with a condition (3 + K, H, W).

        Raises:
            DataError: the picture is another than at the start.
        """
        crop = self._crop(index)
        pixels = crop.pixels(_opaque(self.pictures, index), variant.flip)
        if self.condition is None or variant.condition is None:
            return pixels
        key = self._condition_key(index, variant.condition)
        return torch.cat(
            [pixels, condition_pixels(self.condition, self.pictures, index, crop=crop, flip=variant.flip, key=key)]
        )

    def _crop(self, index: int) -> Crop:
        first_visit = seeding.example_key(self.seed, self.pictures.ids[index], 0)
        return self.pictures.crop(self.pictures.image_info(index).size, first_visit)


@dataclass(frozen=True)
class LiveImages:
    """Visits to the pictures themselves; crop, flip and image condition are drawn again each time."""

    in_memory = False

    pictures: ImageDataset
    condition: ImageCondition | None = None

    def load(self, index: int, key: int, flip: bool | None = None) -> LoadedImage:
        """Pixels with their time ids and condition; `flip` is drawn where flips are wanted, unless given."""
        image = _opaque(self.pictures, index)
        if flip is None:
            flip = self.pictures.flips and _flipped(key)
        crop = self.pictures.crop(image.size, key)
        condition = {}
        if self.condition is not None:
            condition["pixels"] = condition_pixels(self.condition, self.pictures, index, crop=crop, flip=flip, key=key)
        return LoadedImage(crop.pixels(image, flip), crop.time_ids(flip), condition)

    def masked_preview(self, index: int, key: int) -> LoadedImage:
        """What `load` returns, not mirrored, for people: with the condition laid over it, or dark where a mask lets no
        error count.
        """
        loaded = self.load(index, key, flip=False)
        pixels = _preview(self.condition, torch.cat([loaded.latent_params, *loaded.condition.values()]))
        if self.condition is None and (mask := self.pictures.companion(index, "mask")) is not None:
            light = weights(mask, self.crop_and_flip(index, key)[0], False, (pixels.shape[1], pixels.shape[2]))
            pixels = (pixels * (_DIMMED + (1 - _DIMMED) * light)).to(torch.uint8)
        return LoadedImage(pixels, loaded.time_ids)

    def crop_and_flip(self, index: int, key: int) -> tuple[Crop, bool]:
        """The crop of the picture that is trained on, and whether it is mirrored."""
        return self.pictures.crop(self.pictures.image_info(index).size, key), self.pictures.flips and _flipped(key)

    def preview_pixels(self, index: int, key: int) -> Tensor:
        """The pixels that `load` returns, with their condition laid over them."""
        loaded = self.load(index, key)
        return _preview(self.condition, torch.cat([loaded.latent_params, *loaded.condition.values()]))


def condition_pixels(
    condition: ImageCondition, pictures: ImageDataset, index: int, *, crop: Crop, flip: bool, key: int | None
) -> Tensor:
    """Return the image condition of a picture, (K, H, W) uint8; see `ImageCondition.pixels`."""
    companion = None
    if condition.companion in pictures.companions(index):
        companion = pictures.companion(index, condition.companion)
    placed = None if companion is None else crop.companion_pixels(companion, flip)
    return condition.pixels(placed, crop.size, key)


def _preview(condition: ImageCondition | None, pixels: Tensor) -> Tensor:
    """(3, H, W) uint8 for people, of pixels with those of their condition after them."""
    return pixels if condition is None else condition.preview(pixels[:3], pixels[3:])


def _opaque(pictures: ImageDataset, index: int) -> Image.Image:
    """The picture as RGB: of our own datasets they come so, and upright."""
    image = pictures[index].image
    return image if image.mode == "RGB" else to_rgb(image, background=pictures.background)


def _flipped(key: int) -> bool:
    return bool(seeding.uniform(torch.tensor([key]), "flip") < 0.5)
