"""The masks of a batch: placed as their pictures are, at the size of what the UNet sees."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from finetune.cache.visits import Kept, Live
from finetune.data.masks import weights
from finetune.data.pictures import Pictures
from finetune.data.transforms import Placement

MOST = 10_000
"""Masks at hand, of 16 KB each at 512 px."""


class Masks:
    """Makes them, and keeps those that were made last.

    Args:
        pictures: whose masks they are.
        visits: to these pictures.
    """

    def __init__(self, pictures: Pictures, visits: Kept | Live) -> None:
        self._pictures, self._visits = pictures, visits
        self._at_hand: OrderedDict[tuple[int, Placement, bool], Tensor | None] = OrderedDict()

    def of(self, indices: Sequence[int], keys: Tensor, size: tuple[int, int]) -> Tensor | None:
        """(B, 1, h, w) for visits with these keys and latents of this size; None where no picture has a mask."""
        if not self._pictures.masked:
            return None
        found = [self._one(index, key, size) for index, key in zip(indices, keys.tolist(), strict=True)]
        if all(mask is None for mask in found):
            return None
        return torch.stack([torch.ones(1, *size) if mask is None else mask for mask in found])

    def _one(self, index: int, key: int, size: tuple[int, int]) -> Tensor | None:
        placement, flip = self._visits.placed(index, key)
        name = (index, placement, flip)
        if name not in self._at_hand:
            mask = self._pictures.mask(index)
            self._at_hand[name] = None if mask is None else weights(mask, placement, flip, size)
            if len(self._at_hand) > MOST:
                self._at_hand.popitem(last=False)
        return self._at_hand[name]
