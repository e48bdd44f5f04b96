"""Detection of generated images that are near copies of training images.

Both are compared by fixed features of a small version: where which colours and edges are. A drawn picture is a near
copy where it is nearer to one that was learned from than nearly all of those are to each other.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from finetune.data.near_duplicates import Thumbnail, make_thumbnail, near_duplicates

Array = NDArray[np.floating]

_RARE = 1
"""Percent of the pictures that were learned from that are as near to another one as a near copy is."""

_COMPARED = 100
"""Pictures whose distance to all others is measured for that."""

_LOOKED_AT = 20
"""Of the nearest ones, mirrored or not, are checked for whether they show the same."""

FEWEST = 3
"""Different pictures that tell how far apart such pictures are."""


@dataclass(frozen=True)
class TrainingFeatures:
    """What drawn pictures are compared with."""

    features: Array
    """(N, 384), or (2N, 384) with the mirrored ones."""
    near: float
    """A distance below which a picture is a near copy."""

    def copied(self, pictures: Sequence[Image.Image]) -> int:
        """How many of these are near copies."""
        return int((distances(features(pictures), self.features).min(axis=1) < self.near).sum())


def originals(pictures: Iterable[Image.Image], *, mirrored: bool) -> TrainingFeatures | None:
    """What is learned from, as it is seen in training; None where fewer than `FEWEST` are different.

    Pictures of the same thing in other bytes are left out where distances between them are measured: these say how
    alike different pictures are.

    Args:
        pictures: RGB; one after the other, so that they need not be in memory together.
        mirrored: whether mirror images are learned from, too.
    """
    plain, turned, thumbnails = [], [], []
    for picture in pictures:
        plain.append(features([picture]))
        turned += [features([ImageOps.mirror(picture)])] if mirrored else []
        thumbnails.append(make_thumbnail(picture))
    if len(thumbnails) < FEWEST:
        return None
    vectors = np.concatenate([*plain, *turned])
    apart = distances(vectors[: min(len(thumbnails), _COMPARED)], vectors)
    nearest = [_nearest_other(row, all_of_them, thumbnails) for row, all_of_them in enumerate(apart)]
    different = [distance for distance in nearest if distance is not None]
    return TrainingFeatures(vectors, float(np.percentile(different, _RARE))) if len(different) >= FEWEST else None


def _nearest_other(row: int, apart: Array, thumbnails: Sequence[Thumbnail]) -> float | None:
    """The distance of the picture `row` to the nearest one that shows something else; None where many show the same."""
    for place in np.argsort(apart)[:_LOOKED_AT].tolist():
        other = place % len(thumbnails)
        if other != row and not near_duplicates([thumbnails[row], thumbnails[other]], [0])[0]:
            return float(apart[place])
    return None


def features(pictures: Sequence[Image.Image]) -> Array:
    """(N, 384) fixed features of pictures, each reduced to 64 px: where which colour is, and where which edges are.

    Three blocks: mean colours of 8 x 8 cells (192 numbers in [0, 1]); the share of pixels in each of
    4 x 4 x 4 colours, square root (64); in 4 x 4 cells, gradient magnitude by 8 directions, square root (128).
    """
    rows = []
    for picture in pictures:
        small = picture.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)
        pixels = np.asarray(small, dtype=float) / 255
        cells = pixels.reshape(8, 8, 8, 8, 3).mean((1, 3)).ravel()
        bins = np.minimum((pixels * 4).astype(int), 3) @ (16, 4, 1)
        shares = np.bincount(bins.ravel(), minlength=64) / bins.size
        down, across = np.gradient(pixels.mean(-1))
        direction = ((np.arctan2(down, across) / (2 * np.pi)) % 1.0 * 8).astype(int) % 8
        where = np.arange(64) // 16
        index = (where[:, None] * 4 + where) * 8 + direction
        edges = np.bincount(index.ravel(), np.hypot(down, across).ravel(), minlength=128) / 256
        rows.append(np.concatenate((cells / np.sqrt(192), np.sqrt(shares), np.sqrt(edges))))
    return np.stack(rows)


def distances(a: Array, b: Array) -> Array:
    """Euclidean distances of features: (N, F), (M, F) -> (N, M)."""
    return np.sqrt(np.maximum(np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T, 0))
