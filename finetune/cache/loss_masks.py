"""LossMasks: the masks of a batch, cropped as their images are, at the size of the UNet output."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from finetune import seeding
from finetune.cache.image_source import LoadedImage
from finetune.data.image_dataset import ImageDataset
from finetune.data.masks import weights
from finetune.data.transforms import Crop

MOST = 256 * 2**20
"""Bytes of masks at hand: 16,000 of latents at 512 px, 256 of pixels."""


class LossMasks:
    """Makes them, and keeps those that were made last.

    Args:
        pictures: whose masks they are.
        unmasked_weight: least weight of an error, where a mask is black.
        unmasked_probability: share of the visits at which the whole picture counts.
        normalize: divide the weights of each mask by their mean, so that small areas count as much as large ones.

    The last three are those of OneTrainer (`modules/util/loss/masked_loss.py`).
    """

    def __init__(
        self,
        pictures: ImageDataset,
        *,
        unmasked_weight: float = 0.0,
        unmasked_probability: float = 0.0,
        normalize: bool = False,
    ) -> None:
        self._pictures = pictures
        self._unmasked_weight, self._unmasked_probability = unmasked_weight, unmasked_probability
        self._normalize = normalize
        self._at_hand: OrderedDict[tuple[int, Crop, bool], Tensor | None] = OrderedDict()
        self._bytes = 0

    def get(
        self, indices: Sequence[int], keys: Tensor, loaded: Sequence[LoadedImage], size: tuple[int, int]
    ) -> Tensor | None:
        """(B, 1, h, w) for visits with latents of this size and these keys (B,); None where no picture has a mask."""
        if not self._pictures.masked:
            return None
        masks = [self._one(index, image.crop, image.flip, size) for index, image in zip(indices, loaded, strict=True)]
        if self._unmasked_probability:
            whole = seeding.uniform(keys, "unmasked") < self._unmasked_probability
            masks = [None if everything else mask for mask, everything in zip(masks, whole.tolist(), strict=True)]
        if all(mask is None for mask in masks):
            return None
        return torch.stack([torch.ones(1, *size) if mask is None else mask for mask in masks])

    def _one(self, index: int, crop: Crop, flip: bool, size: tuple[int, int]) -> Tensor | None:
        name = (index, crop, flip)
        if name not in self._at_hand:
            mask = self._pictures.companion(index, "mask")
            made = self._at_hand[name] = None if mask is None else self._made(weights(mask, crop, flip, size))
            self._bytes += _size(made)
            while self._bytes > MOST and len(self._at_hand) > 1:
                self._bytes -= _size(self._at_hand.popitem(last=False)[1])
        return self._at_hand[name]

    def _made(self, mask: Tensor) -> Tensor:
        mask = mask.clamp(min=self._unmasked_weight)
        mean = mask.mean().item()
        return mask / mean if self._normalize and mean else mask


def _size(mask: Tensor | None) -> int:
    """Bytes that a mask takes at hand; without one, those of its entry."""
    return 200 if mask is None else mask.nbytes
