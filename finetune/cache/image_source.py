"""CachedImages and LiveImages: what a visit loads, a cached encoding or the image itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from finetune import seeding
from finetune.cache.keys import picture_key
from finetune.cache.store import Store
from finetune.data.image_dataset import ImageDataset
from finetune.data.image_sample import ImageSample
from finetune.data.masks import weights
from finetune.data.transforms import Crop
from finetune.models.image_condition import ImageCondition

_DIMMED = 0.25
"""How much light is left of what does not count."""


class LoadedImage(NamedTuple):
    """What a visit loads of its picture."""

    latent_params: Tensor
    """The cached encoding (C, h, w), floats as fp32; or the pixels (3, H, W) uint8."""
    crop: Crop
    """The part of the picture that it is of."""
    flip: bool
    """Whether it is mirrored."""
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

    needs_workers = False

    store: Store
    pictures: ImageDataset
    encoder: str
    """Fingerprint of the encoder, and the environment that it runs in."""
    precision: str
    seed: int
    condition: ImageCondition | None = None
    """What the UNet is shown of a picture with x_t."""

    def load(self, index: int, key: int) -> LoadedImage:
        """The cached encoding, mirrored half of the time if flips are wanted, and its condition."""
        sample = self.pictures.sample(index)
        crop, flip = self._crop(sample), sample.random_flip and _is_flipped(key)
        variants = [CacheVariant(flip, condition) for condition in (None, *self._conditions(sample, key))]
        items = self.store.load([self._key(sample, crop, variant) for variant in variants])
        image, *conditions = [
            {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in item.items()}
            for item in items
        ]
        return LoadedImage(image["stored"], crop, flip, conditions[0] if conditions else {})

    def preview_pixels(self, index: int, key: int) -> Tensor:
        """(3, H, W) uint8: the pixels whose encoding `load` returns, with their condition laid over them."""
        sample = self.pictures.sample(index)
        *_, condition = None, *self._conditions(sample, key)
        variant = CacheVariant(sample.random_flip and _is_flipped(key), condition)
        return _preview(self.condition, self._pixels(sample, variant))

    def keys(self, index: int, key: int | None) -> dict[str, CacheVariant]:
        """Return all encodings that a visit with this sample key may need, by cache key; None: any visit."""
        sample = self.pictures.sample(index)
        crop, conditions = self._crop(sample), [None, *self._conditions(sample, key)]
        flips = (False, True) if sample.random_flip else (False,)
        variants = [CacheVariant(flip, condition) for flip in flips for condition in conditions]
        return {self._key(sample, crop, variant): variant for variant in variants}

    def pixels(self, index: int, variant: CacheVariant) -> Tensor:
        """(3, H, W) uint8 that are to be encoded, or with a condition (3 + K, H, W).

        Raises:
            DataError: the picture is another than at the start.
        """
        return self._pixels(self.pictures.sample(index), variant)

    def _pixels(self, sample: ImageSample, variant: CacheVariant) -> Tensor:
        crop = self._crop(sample)
        pixels = crop.pixels(sample.open(), variant.flip)
        if self.condition is None or variant.condition is None:
            return pixels
        key = self._condition_key(sample, variant.condition)
        return torch.cat([pixels, condition_pixels(self.condition, sample, crop=crop, flip=variant.flip, key=key)])

    def _key(self, sample: ImageSample, crop: Crop, variant: CacheVariant) -> str:
        condition = ""
        if self.condition is not None and variant.condition is not None:
            companion = sample.companions.get(self.condition.companion)
            condition = self.condition.cache_name(companion, self._condition_key(sample, variant.condition))
        return picture_key(
            sample.info.digest,
            crop=crop,
            flip=variant.flip,
            encoder=self.encoder,
            precision=self.precision,
            background=sample.background,
            condition=condition,
        )

    def _crop(self, sample: ImageSample) -> Crop:
        return sample.crop(seeding.example_key(self.seed, sample.id, 0))

    def _conditions(self, sample: ImageSample, key: int | None) -> Sequence[int]:
        if self.condition is None:
            return ()
        return self.condition.variants(key, has_companion=self.condition.companion in sample.companions)

    def _condition_key(self, sample: ImageSample, number: int) -> int:
        """The sample key that the condition with this number is drawn from."""
        return seeding.example_key(self.seed, sample.id, number)


@dataclass(frozen=True)
class LiveImages:
    """Visits to the pictures themselves; crop, flip and image condition are drawn again each time."""

    needs_workers = True

    pictures: ImageDataset
    condition: ImageCondition | None = None

    def load(self, index: int, key: int, flip: bool | None = None) -> LoadedImage:
        """Pixels and those of their condition; `flip` is drawn where flips are wanted, unless given."""
        sample = self.pictures.sample(index)
        image = sample.open()
        crop = sample.crop(key, image.size)
        flip = sample.random_flip and _is_flipped(key) if flip is None else flip
        condition = {}
        if self.condition is not None:
            condition["pixels"] = condition_pixels(self.condition, sample, crop=crop, flip=flip, key=key)
        return LoadedImage(crop.pixels(image, flip), crop, flip, condition)

    def masked_preview(self, index: int, key: int) -> LoadedImage:
        """What `load` returns, not mirrored, for people: with the condition laid over it, or dark where a mask lets no
        error count.
        """
        loaded = self.load(index, key, flip=False)
        pixels = _preview(self.condition, torch.cat([loaded.latent_params, *loaded.condition.values()]))
        if self.condition is None and (mask := self.pictures.companion(index, "mask")) is not None:
            light = weights(mask, loaded.crop, False, (pixels.shape[1], pixels.shape[2]))
            pixels = (pixels * (_DIMMED + (1 - _DIMMED) * light)).to(torch.uint8)
        return loaded._replace(latent_params=pixels, condition={})

    def preview_pixels(self, index: int, key: int) -> Tensor:
        """The pixels that `load` returns, with their condition laid over them."""
        loaded = self.load(index, key)
        return _preview(self.condition, torch.cat([loaded.latent_params, *loaded.condition.values()]))


def condition_pixels(
    condition: ImageCondition, sample: ImageSample, *, crop: Crop, flip: bool, key: int | None
) -> Tensor:
    """Return the image condition of a picture, (K, H, W) uint8; see `ImageCondition.pixels`."""
    return condition.pixels(sample.companion_pixels(condition.companion, crop, flip), crop.size, key)


def _is_flipped(key: int) -> bool:
    """Whether the visit with this sample key is mirrored, where flips are wanted."""
    return bool(seeding.uniform(torch.tensor([key]), "flip") < 0.5)


def _preview(condition: ImageCondition | None, pixels: Tensor) -> Tensor:
    """(3, H, W) uint8 for people, of pixels with those of their condition after them."""
    return pixels if condition is None or pixels.shape[0] == 3 else condition.preview(pixels[:3], pixels[3:])
