"""Near duplicates: images that show another image or a part of it, also mirrored, recompressed or tinted.

Two pictures are compared as tiny thumbnails, by the correlation of their colours (normalized cross-correlation, Lewis
1995), each in turn as a part of the other: first with a grid of parts, then close to the best of these.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finetune.data.images import to_rgb

Floats = NDArray[np.float32]

SIDE = 32
"""Of a thumbnail."""

_COARSE, _FINE = 8, 16
"""Sides, in cells, of what is compared with the grid of parts, and near the best of them."""

_PROMISING = 0.85
_ALIKE = 0.965
"""Correlations; benchmarks/split.py shows how far near duplicates and other pictures are from it on either side."""

_SCALES = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.65, 0.6, 0.55, 0.5)
_STEP = 0.05
"""Sizes and distances of the parts, in sides of the picture."""

_BEST = 3
"""Parts whose neighbourhood is looked at."""


class Thumbnail(NamedTuple):
    """What is compared of a picture."""

    thumbnail: Floats
    """(SIDE, SIDE, 3): the picture, its sides squeezed to the same length."""
    aspect: float
    """Width / height."""


def make_thumbnail(image: Image.Image) -> Thumbnail:
    """What is compared of a picture."""
    small = (image if image.mode == "RGB" else to_rgb(image)).resize((SIDE, SIDE), Image.Resampling.BOX)
    return Thumbnail(np.asarray(small, np.float32), image.width / image.height)


def near_duplicates(thumbnails: Sequence[Thumbnail], indices: Sequence[int]) -> list[set[int]]:
    """Return, for each of `indices`, the indices of all near duplicates of that picture."""
    neighbors: list[set[int]] = [set() for _ in indices]
    rows = np.concatenate([_versions(thumbnails[index], _COARSE) for index in indices])
    others = np.concatenate([_versions(each, _COARSE) for each in thumbnails])
    aspects = np.array([each.aspect for each in thumbnails])

    def parts_of(index: int) -> None:
        """Wanted pictures that are parts of this one."""
        for place in _promising(thumbnails[index], aspects[list(indices)], rows):
            if indices[place] != index and _is_part(thumbnails[indices[place]], thumbnails[index]):
                neighbors[place].add(index)

    def wholes_of(place: int) -> None:
        """Pictures that are parts of this wanted one."""
        for index in _promising(thumbnails[indices[place]], aspects, others):
            if index != indices[place] and _is_part(thumbnails[index], thumbnails[indices[place]]):
                neighbors[place].add(index)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(parts_of, range(len(thumbnails))))
        list(pool.map(wholes_of, range(len(indices))))
    return neighbors


def _versions(thumbnail: Thumbnail, cells: int) -> Floats:
    """(2, 3 cells²): the picture as it is, and mirrored, ready to be multiplied with others."""
    full = _cells(thumbnail.thumbnail, np.array([[0.0, 0.0, SIDE, SIDE]]), cells)
    return _normalized(np.concatenate([full, full[:, :, ::-1]]))


def _promising(larger: Thumbnail, aspects: NDArray[np.float64], rows: Floats) -> list[int]:
    """Which of some pictures, of these aspects and two rows each, may be parts of a whole one."""
    numbers = []
    steps = np.round(np.log(aspects / larger.aspect) / _STEP).astype(int)
    for step in np.unique(steps):
        (among,) = np.nonzero(steps == step)
        crops = _normalized(_cells(larger.thumbnail, _grid(float(np.exp(step * _STEP))), _COARSE))
        scores = (crops @ rows.reshape(len(aspects), 2, -1)[among].reshape(2 * len(among), -1).T).max(axis=0)
        numbers += among[scores.reshape(-1, 2).max(axis=1) > _PROMISING].tolist()
    return numbers


def _is_part(part: Thumbnail, larger: Thumbnail) -> bool:
    """Whether the one shows all of the other, or a part of it: looks closer and closer around the best of the grid."""
    boxes = _grid(part.aspect / larger.aspect)
    scores = _normalized(_cells(larger.thumbnail, boxes, _COARSE)) @ _versions(part, _COARSE).T
    fine = _versions(part, _FINE)
    for number in np.argsort(-scores, axis=None)[:_BEST]:
        place, mirrored = divmod(int(number), 2)
        box, width = boxes[place], _STEP * SIDE / 2
        for _ in range(4):
            nearby = box + width * _AROUND
            nearby[:, 2:] = nearby[:, 2:].clip(SIDE / 3, SIDE)
            nearby[:, :2] = nearby[:, :2].clip(0, SIDE - nearby[:, 2:])
            closer = _normalized(_cells(larger.thumbnail, nearby, _FINE)) @ fine[mirrored]
            if closer.max() > _ALIKE:
                return True
            box, width = nearby[int(closer.argmax())], width / 2
    return False


_AROUND = np.array(list(product((-1.0, 0.0, 1.0), repeat=4)))


@cache
def _grid(ratio: float) -> NDArray[np.float64]:
    """(N, 4): top, left, height and width in a thumbnail of parts that have `ratio` times the aspect of the whole, and
    of the whole itself.
    """
    boxes = [(0.0, 0.0, 1.0, 1.0)]
    for scale in _SCALES:
        height, width = min(1.0, 1 / ratio) * scale, min(1.0, ratio) * scale
        if min(height, width) < _SCALES[-1]:
            break
        tops, lefts = (np.linspace(0, 1 - side, round((1 - side) / _STEP) + 1) for side in (height, width))
        boxes += [(top, left, height, width) for top in tops for left in lefts]
    return SIDE * np.array(boxes)


def _cells(thumbnail: Floats, boxes: NDArray[np.float64], cells: int) -> Floats:
    """(N, cells, cells, 3): what is seen in each box, averaged over each cell; from sums over all that is above and
    left, between whole numbers by proportion.
    """
    sums = np.zeros((SIDE + 1, SIDE + 1, 3), np.float32)
    sums[1:, 1:] = (thumbnail - thumbnail.mean(axis=(0, 1))).cumsum(0).cumsum(1)
    edges = np.linspace(0, 1, cells + 1)
    down, right = (boxes[:, [at]] + boxes[:, [at + 2]] * edges for at in (0, 1))
    top, left = (np.minimum(at.astype(int), SIDE - 1) for at in (down, right))
    below = (down - top).astype(np.float32)[:, :, None, None]
    widths = (right - left).astype(np.float32)[:, None, :, None]
    rows = sums[top] * (1 - below) + sums[top + 1] * below
    box, row = np.arange(len(boxes))[:, None, None], np.arange(cells + 1)[:, None]
    corners = rows[box, row, left[:, None]] * (1 - widths) + rows[box, row, left[:, None] + 1] * widths
    seen = corners[:, 1:, 1:] - corners[:, :-1, 1:] - corners[:, 1:, :-1] + corners[:, :-1, :-1]
    return seen.astype(np.float32, copy=False)


def _normalized(cells: Floats) -> Floats:
    """(N, cells, cells, 3) -> (N, 3 cells²): each channel without its mean, all of them of length 1; 0 where flat."""
    flat = (cells - cells.mean(axis=(1, 2), keepdims=True)).reshape(len(cells), -1)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    return np.divide(flat, length, out=np.zeros_like(flat), where=length > 1e-3)
