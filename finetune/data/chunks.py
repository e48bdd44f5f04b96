"""Volumes: so many pictures that they are looked at part by part, each when the run comes to it."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from finetune.data.captions import COLUMN, read_metadata
from finetune.data.image_dataset import Pictures
from finetune.data.image_folder import FolderPart, pictures_among, repeats_of
from finetune.data.masks import is_mask, without_suffix
from finetune.seeding import fold, wide_fold

VOLUME = 8192
"""Pictures of a volume: looked at in seconds or a minute, and enough of each shape for steps of one."""

AT_ONCE = 4 * VOLUME
"""Pictures up to which a folder is opened as a whole."""


class Stretch(NamedTuple):
    """Steps of a run that visit one volume."""

    volume: int
    own: range
    """The same steps, as the volume counts them."""


@dataclass(frozen=True)
class Volumes:
    """The pictures of a run, most often in one volume.

    An epoch goes through the volumes in their order, and through each as `Sampler` has it, in as many steps as its
    visits need; what is left of the last one is filled with the first of its next epoch. So which volume a step visits
    is a formula, and nothing needs to be known of the pictures of another one. Where a picture turns out unreadable,
    the others of its volume come the more often.
    """

    first: Pictures
    """The first volume. What is held out is among it, and what is said of the pictures at the start is said of it."""
    counts: Sequence[int]
    """Pictures to train on in each, in the later ones as far as is known."""
    visits: Sequence[int]
    """Of an epoch, in each."""
    found: Sequence[int] = ()
    """Files, rows or pictures in each, where there are several."""
    later: Callable[[int], Pictures] | None = None
    """Number from 1 -> the volume, looked at anew."""
    digest: str = ""
    """Of the names of all files."""

    @classmethod
    def whole(cls, pictures: Pictures) -> "Volumes":
        """All in one."""
        return cls(pictures, [len(pictures.trained)], [pictures.epoch_visits])

    def __len__(self) -> int:
        return len(self.visits)

    def at(self, number: int) -> Pictures:
        """A volume, opened. Raises DataError as opening a folder does."""
        return self.first if self.later is None or number == 0 else self.later(number)

    @property
    def epoch_visits(self) -> int:
        """Visits of an epoch."""
        return sum(self.visits)

    def stretches(self, steps: range, batch_size: int) -> Iterator[Stretch]:
        """The steps from `steps.start` (0 for the first) to `steps.stop`, by volume.

        Args:
            steps: of the run.
            batch_size: examples per step.
        """
        if len(self) == 1:
            yield Stretch(0, steps)
            return
        epoch = steps.start * batch_size // self.epoch_visits
        while self._steps_before(epoch, batch_size) > steps.start:
            epoch -= 1
        done = self._steps_before(epoch, batch_size)
        while done < steps.stop:
            for volume, visits in enumerate(self.visits):
                start, stop = (-(-number * visits // batch_size) for number in (epoch, epoch + 1))
                own = range(start + max(0, steps.start - done), min(stop, start + steps.stop - done))
                done += stop - start
                if own:
                    yield Stretch(volume, own)
            epoch += 1

    def steps_of_each(self, steps: int, batch_size: int) -> list[int]:
        """How many of the first steps of a run visit each volume."""
        done = [0] * len(self)
        for stretch in self.stretches(range(steps), batch_size):
            done[stretch.volume] = stretch.own.stop
        return done

    def own_steps(self, volume: int, steps: range, batch_size: int) -> range:
        """Those steps of a run that visit one volume, from the first of them to the last, as it counts them."""
        own = [stretch.own for stretch in self.stretches(steps, batch_size) if stretch.volume == volume]
        return range(own[0].start, own[-1].stop) if own else range(0)

    def _steps_before(self, epoch: int, batch_size: int) -> int:
        return sum(-(-epoch * visits // batch_size) for visits in self.visits)


class Holding(NamedTuple):
    """What a source of pictures holds."""

    source: Any
    """What `open_dataset` takes."""
    pictures: int
    """How many."""
    files: Sequence[str] | None = None
    """In a folder, all that there are; None: the pictures have numbers."""


class Deal(NamedTuple):
    """What a source holds, dealt into volumes."""

    source: Any
    """What `open_dataset` takes."""
    parts: Sequence[FolderPart | Sequence[int] | None]
    """Files of a folder, or numbers of rows or pictures; None: all."""
    found: Sequence[int] = ()
    """Files, rows or pictures in each, where there are several."""
    counts: Sequence[int] = ()
    """Pictures in each; of a small source beside a large one, none in some, but in the first."""
    visits: Sequence[int] = ()
    """Of an epoch, in each."""
    digest: str = ""
    """Of all names, or of how many there are."""


def volumes_for(holdings: Sequence[Holding], size: int | None = None) -> int:
    """How many volumes suit what these hold together: as many, at most, as one of them has pictures.

    Args:
        holdings: of all sources.
        size: pictures of a volume, at most; 0: all in one; None: `VOLUME`, or up to `AT_ONCE` all in one.
    """
    counts = [holding.pictures for holding in holdings]
    if size is None:
        size = VOLUME if sum(counts) > AT_ONCE else 0
    return max(1, min(ceil(sum(counts) / size), max(counts))) if size else 1


def deal_out(holding: Holding, number: int, caption_column: str = COLUMN) -> Deal:
    """Deal what a source holds into so many volumes; `caption_column` is that of metadata files.

    A file goes by the digest of its path without its endings: a picture with its caption and its mask, and otherwise
    as if at random; what has numbers goes at random.

    Raises:
        DataError: as `read_metadata`.
    """
    source, pictures, files = holding
    if number == 1 or not pictures:  # opening it tells that there are none
        return Deal(source, parts=[None if files is None else FolderPart(files)] * number)
    if files is not None:
        return _deal_files(source, files, number, caption_column)
    drawn = torch.randperm(pictures, generator=torch.Generator().manual_seed(fold("volumes", pictures) & 0xFFFFFFFF))
    parts = [sorted(some.tolist()) for some in drawn.tensor_split(number)]
    parts.sort(key=lambda part: (not part, part))  # with 0 in the first
    counts = [len(part) for part in parts]
    return Deal(source, parts=parts, found=counts, counts=counts, visits=counts, digest=wide_fold(pictures))


def together(deals: Sequence[Deal], times: Sequence[int]) -> Deal:
    """Several sources as one, each so many times in an epoch; without the source and its parts."""
    visits = [[n * visits for visits in deal.visits] for n, deal in zip(times, deals, strict=True)]
    digest = deals[0].digest if tuple(times) == (1,) else wide_fold(*[deal.digest for deal in deals], *times)
    totals, counts = [deal.found for deal in deals], [deal.counts for deal in deals]
    return Deal(
        None, parts=[], found=_added_up(totals), counts=_added_up(counts), visits=_added_up(visits), digest=digest
    )


def _added_up(rows: Sequence[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip(*rows, strict=True)]


def _deal_files(folder: str, files: Sequence[str], number: int, caption_column: str) -> Deal:
    pictures = pictures_among(files)
    volumes = _dealt(files, set(pictures), number)
    metadata = read_metadata(Path(folder).expanduser(), files, pictures, caption_column)
    repeated = bool(repeats_of(pictures))
    examples = [pictures_among(volume) for volume in volumes]
    counts = [len(some) for some in examples]
    visits = [sum(repeats_of(some)) for some in examples] if repeated else counts
    parts = [FolderPart(volume, metadata, repeated) for volume in volumes]
    return Deal(
        folder,
        parts=parts,
        found=[len(volume) for volume in volumes],
        counts=counts,
        visits=visits,
        digest=wide_fold(*files),
    )


def _dealt(files: Sequence[str], pictures: AbstractSet[str], number: int) -> list[list[str]]:
    """The files of each volume, in their order; those that are called alike in one."""
    drawn = np.array([_drawn(file) for file in files], np.uint64)
    order = np.argsort(drawn)
    drawn, examples = drawn[order], np.array([file in pictures for file in files])[order]
    before = (np.cumsum(examples) - examples)[np.searchsorted(drawn, drawn)]  # the first of those that are called alike
    volume_of = np.empty(len(files), int)
    volume_of[order] = np.minimum(before, len(pictures) - 1) * number // len(pictures)  # each has pictures, then
    volumes = [list[str]() for _ in range(number)]
    for file, volume in zip(files, volume_of.tolist(), strict=True):
        volumes[volume].append(file)
    return volumes


def _drawn(file: str) -> int:
    stem = without_suffix(file) if is_mask(file) else file.rpartition(".")[0]
    return int.from_bytes(hashlib.blake2b(os.fsencode(stem), digest_size=8).digest(), "little")
