"""The validation split: images are held out together with their near duplicates."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from tqdm.auto import tqdm

from finetune.data.image_dataset import ImageDataset
from finetune.data.image_index import ImageIndex
from finetune.data.near_duplicates import Thumbnail, make_thumbnail, near_duplicates
from finetune.seeding import fold, wide_fold

FEWEST = 2
"""Pictures that are held out, where any are: of one alone, nothing is known of its spread."""

_FEWEST_TO_SPLIT = 20
_FRACTION = 0.1
_MOST = 200

MOST_COMPARED = 5_000
"""Pictures among which near duplicates are looked for."""

_METHOD = 1
"""Counts up whenever the same pictures would be split in another way."""

_SPARE = 8
"""Pictures that are looked at, at least, for those that are held out."""


def default_fraction(pictures: int) -> float:
    """How much of so many pictures is held out: a tenth, at most 200; nothing of fewer than 20."""
    return min(_FRACTION, _MOST / pictures) if pictures >= _FEWEST_TO_SPLIT else 0.0


def held_out(pictures: ImageDataset, fraction: float, seed: int, memory: ImageIndex | None = None) -> list[int]:
    """The numbers of the pictures that are held out, of those of the subject.

    Near duplicates are together on one side: that which the largest of them draws from its bytes and the seed. So a
    picture stays where it is when others are added, and only a larger version of it can take it along. What makes up
    more than twice the fraction, as the frames of one film may, is trained on.

    Args:
        pictures: all that there are.
        fraction: how many, on average; at least two where it is above 0.
        seed: of the draws.
        memory: of what was found out about the same pictures before.
    """
    if fraction == 0:
        return []
    contents = _contents(pictures)
    key = wide_fold(_METHOD, seed, repr(fraction), *contents)
    if memory is not None and (remembered := memory.split(key)) is not None:
        return remembered
    draws = [fold(seed, "held out", content) / 2**63 for content in contents]
    order = sorted(range(len(draws)), key=draws.__getitem__)
    candidates = order[: max(_SPARE, sum(draw < fraction for draw in draws))]
    most = max(FEWEST, int(2 * fraction * len(draws)))
    groups = _groups(pictures, contents, candidates, most)
    held: set[int] = set()
    for candidate in candidates:
        if draws[candidate] >= fraction and len(held) >= FEWEST:
            break
        if len(groups[candidate]) <= most and _leader(pictures, contents, groups[candidate]) == candidate:
            held |= groups[candidate]
    indices = sorted(held) if len(held) >= FEWEST else []
    if memory is not None:
        memory.note_split(key, indices)
    return indices


def shown_elsewhere(pictures: ImageDataset, held: Sequence[int]) -> list[int]:
    """Return the held-out pictures that are near duplicates of a picture that is trained on."""
    contents, trained = _contents(pictures, len(pictures)), set(range(len(pictures))).difference(held)
    neighbours = _Neighbours(pictures, contents)
    return [index for index, similar in zip(held, neighbours.find(held), strict=True) if similar & trained]


def _contents(pictures: ImageDataset, count: int | None = None) -> list[str]:
    """A digest of each of the first `count` pictures, unless given of all of the subject."""
    count = pictures.num_subject_images if count is None else count
    if len(pictures.contents) == len(pictures):
        return list(pictures.contents[:count])
    return [pictures.image_info(index).digest for index in range(count)]


class _Rank(NamedTuple):
    """What one of several near duplicates is their leader by: the largest is the one that others were made from."""

    area: int
    content: str
    place: int


def _leader(pictures: ImageDataset, contents: Sequence[str], group: set[int]) -> int:
    def rank(index: int) -> _Rank:
        width, height = pictures.image_info(index).size
        return _Rank(width * height, contents[index], -index)

    return max(group, key=rank)


def _groups(
    pictures: ImageDataset, contents: Sequence[str], candidates: Sequence[int], most: int
) -> dict[int, set[int]]:
    """Each candidate with all that it is joined to by near duplicates; groups of more than `most` are not finished."""
    neighbours, reached = _Neighbours(pictures, contents), dict[int, set[int]]()
    frontier = list(candidates)
    while True:
        reached |= zip(frontier, neighbours.find(frontier), strict=True)
        groups = {candidate: _reached(candidate, reached) for candidate in candidates}
        open_groups = [group for group in groups.values() if len(group) <= most]
        frontier = sorted(set().union(*open_groups) - reached.keys())
        if not frontier:
            return groups


def _reached(start: int, groups: dict[int, set[int]]) -> set[int]:
    reached, waiting = {start}, [start]
    while waiting:
        new = groups.get(waiting.pop(), set()) - reached
        reached |= new
        waiting += new
    return reached


class _Neighbours:
    """The near duplicates of pictures: exact ones always, others where there are not too many to compare them all."""

    def __init__(self, pictures: ImageDataset, contents: Sequence[str]) -> None:
        self._same: dict[str, set[int]] = {}
        for index, content in enumerate(contents):
            self._same.setdefault(content, set()).add(index)
        self._contents = contents
        self._thumbnails = _thumbnails(pictures, len(contents)) if len(contents) <= MOST_COMPARED else []

    def find(self, indices: Sequence[int]) -> list[set[int]]:
        """Return the near duplicates of each of these pictures."""
        similar = [set[int]() for _ in indices]
        if self._thumbnails and indices:
            similar = near_duplicates(self._thumbnails, indices)
        return [(self._same[self._contents[i]] | some) - {i} for i, some in zip(indices, similar, strict=True)]


def _thumbnails(pictures: ImageDataset, count: int) -> list[Thumbnail]:
    def thumbnail(index: int) -> Thumbnail:
        return make_thumbnail(pictures[index].image)

    with ThreadPoolExecutor() as pool:
        progress = tqdm(pool.map(thumbnail, range(count)), total=count, desc="comparing images", delay=3, leave=False)
        return list(progress)
