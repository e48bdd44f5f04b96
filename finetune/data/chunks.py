"""Chunks: a large dataset is opened part by part, each when the run reaches it."""

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
from finetune.data.companions import companion_kind, pictures_among, without_suffix
from finetune.data.image_dataset import ImageDataset
from finetune.data.image_folder import FolderPart, repeats_of
from finetune.seeding import fold, wide_fold

VOLUME = 8192
"""Pictures of a chunk: looked at in seconds or a minute, and enough of each shape for steps of one."""

AT_ONCE = 4 * VOLUME
"""Pictures up to which a folder is opened as a whole."""


class ChunkSteps(NamedTuple):
    """Steps of a run that visit one chunk."""

    chunk: int
    own: range
    """The same steps, as the chunk counts them."""


@dataclass(frozen=True)
class Chunks:
    """The pictures of a run, most often in one chunk.

    An epoch goes through the chunks in their order, and through each as `Sampler` has it, in as many steps as its
    visits need; what is left of the last one is filled with the first of its next epoch. So which chunk a step visits
    is a formula, and nothing needs to be known of the pictures of another one. Where a picture turns out unreadable,
    the others of its chunk come the more often.
    """

    first: ImageDataset
    """The first chunk. What is held out is among it, and what is said of the pictures at the start is said of it."""
    counts: Sequence[int]
    """Pictures to train on in each, in the later ones as far as is known."""
    visits: Sequence[int]
    """Of an epoch, in each."""
    found: Sequence[int] = ()
    """Files, rows or pictures in each, where there are several."""
    later: Callable[[int], ImageDataset] | None = None
    """Number from 1 -> the chunk, looked at again."""
    digest: str = ""
    """Of the names of all files."""

    @classmethod
    def single(cls, pictures: ImageDataset) -> "Chunks":
        """All in one."""
        return cls(pictures, [len(pictures.trained)], [pictures.epoch_visits])

    def __len__(self) -> int:
        return len(self.visits)

    def at(self, number: int) -> ImageDataset:
        """A chunk, opened. Raises DataError as opening a folder does."""
        return self.first if self.later is None or number == 0 else self.later(number)

    @property
    def epoch_visits(self) -> int:
        """Visits of an epoch."""
        return sum(self.visits)

    def chunk_steps(self, steps: range, batch_size: int) -> Iterator[ChunkSteps]:
        """The steps from `steps.start` (0 for the first) to `steps.stop`, by chunk.

        Args:
            steps: of the run.
            batch_size: examples per step.
        """
        if len(self) == 1:
            yield ChunkSteps(0, steps)
            return
        epoch = steps.start * batch_size // self.epoch_visits
        while self._steps_before(epoch, batch_size) > steps.start:
            epoch -= 1
        done = self._steps_before(epoch, batch_size)
        while done < steps.stop:
            for chunk, visits in enumerate(self.visits):
                start, stop = (-(-number * visits // batch_size) for number in (epoch, epoch + 1))
                local_steps = range(start + max(0, steps.start - done), min(stop, start + steps.stop - done))
                done += stop - start
                if local_steps:
                    yield ChunkSteps(chunk, local_steps)
            epoch += 1

    def steps_per_chunk(self, steps: int, batch_size: int) -> list[int]:
        """How many of the first steps of a run visit each chunk."""
        done = [0] * len(self)
        for steps_of_chunk in self.chunk_steps(range(steps), batch_size):
            done[steps_of_chunk.chunk] = steps_of_chunk.own.stop
        return done

    def local_steps(self, chunk: int, steps: range, batch_size: int) -> range:
        """Return the steps of a run that visit one chunk, from the first to the last, as the chunk counts them."""
        ranges = [
            steps_of_chunk.own
            for steps_of_chunk in self.chunk_steps(steps, batch_size)
            if steps_of_chunk.chunk == chunk
        ]
        return range(ranges[0].start, ranges[-1].stop) if ranges else range(0)

    def _steps_before(self, epoch: int, batch_size: int) -> int:
        return sum(-(-epoch * visits // batch_size) for visits in self.visits)


class SourceInfo(NamedTuple):
    """What a source of pictures holds."""

    source: Any
    """What `open_dataset` takes."""
    pictures: int
    """How many."""
    files: Sequence[str] | None = None
    """In a folder, all that there are; None: the pictures have numbers."""


class SourceChunks(NamedTuple):
    """What a source holds, dealt into chunks."""

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


def num_chunks_for(source_infos: Sequence[SourceInfo], size: int | None = None) -> int:
    """How many chunks suit what these hold together: as many, at most, as one of them has pictures.

    Args:
        source_infos: of all sources.
        size: pictures of a chunk, at most; 0: all in one; None: `VOLUME`, or up to `AT_ONCE` all in one.
    """
    counts = [source_info.pictures for source_info in source_infos]
    if size is None:
        size = VOLUME if sum(counts) > AT_ONCE else 0
    return max(1, min(ceil(sum(counts) / size), max(counts))) if size else 1


def split_into_chunks(source_info: SourceInfo, number: int, caption_column: str = COLUMN) -> SourceChunks:
    """Deal what a source holds into so many chunks; `caption_column` is that of metadata files.

    A file goes by the digest of its path without its endings: a picture with its caption and its mask, and otherwise
    as if at random; what has numbers goes at random.

    Raises:
        DataError: as `read_metadata`.
    """
    source, pictures, files = source_info
    if number == 1 or not pictures:  # opening it tells that there are none
        return SourceChunks(source, parts=[None if files is None else FolderPart(files)] * number)
    if files is not None:
        return _deal_files(source, files, number, caption_column)
    drawn = torch.randperm(pictures, generator=torch.Generator().manual_seed(fold("volumes", pictures) & 0xFFFFFFFF))
    rows = [sorted(some.tolist()) for some in drawn.tensor_split(number)]
    rows.sort(key=lambda part: (not part, part))  # with 0 in the first
    counts = [len(part) for part in rows]
    return SourceChunks(source, parts=rows, found=counts, counts=counts, visits=counts, digest=wide_fold(pictures))


def merge_sources(chunks_by_source: Sequence[SourceChunks], times: Sequence[int]) -> SourceChunks:
    """Several sources as one, each so many times in an epoch; without the source and its parts."""
    visits = [
        [n * visits for visits in source_chunks.visits]
        for n, source_chunks in zip(times, chunks_by_source, strict=True)
    ]
    digest = (
        chunks_by_source[0].digest
        if tuple(times) == (1,)
        else wide_fold(*[source_chunks.digest for source_chunks in chunks_by_source], *times)
    )
    totals, counts = (
        [source_chunks.found for source_chunks in chunks_by_source],
        [source_chunks.counts for source_chunks in chunks_by_source],
    )
    return SourceChunks(
        None, parts=[], found=_added_up(totals), counts=_added_up(counts), visits=_added_up(visits), digest=digest
    )


def _added_up(rows: Sequence[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip(*rows, strict=True)]


def _deal_files(folder: str, files: Sequence[str], number: int, caption_column: str) -> SourceChunks:
    pictures = pictures_among(files)
    chunks = _assigned(files, set(pictures), number)
    metadata = read_metadata(Path(folder).expanduser(), files, pictures, caption_column)
    repeated = bool(repeats_of(pictures))
    examples = [pictures_among(chunk) for chunk in chunks]
    counts = [len(some) for some in examples]
    visits = [sum(repeats_of(some)) for some in examples] if repeated else counts
    folders = [FolderPart(chunk, metadata, repeated) for chunk in chunks]
    return SourceChunks(
        folder,
        parts=folders,
        found=[len(chunk) for chunk in chunks],
        counts=counts,
        visits=visits,
        digest=wide_fold(*files),
    )


def _assigned(files: Sequence[str], pictures: AbstractSet[str], number: int) -> list[list[str]]:
    """The files of each chunk, in their order; those that are called alike in one."""
    drawn = np.array([_drawn(file) for file in files], np.uint64)
    order = np.argsort(drawn)
    drawn, examples = drawn[order], np.array([file in pictures for file in files])[order]
    before = (np.cumsum(examples) - examples)[np.searchsorted(drawn, drawn)]  # the first of those that are called alike
    volume_of = np.empty(len(files), int)
    volume_of[order] = np.minimum(before, len(pictures) - 1) * number // len(pictures)  # each has pictures, then
    chunks = [list[str]() for _ in range(number)]
    for file, chunk in zip(files, volume_of.tolist(), strict=True):
        chunks[chunk].append(file)
    return chunks


def _drawn(file: str) -> int:
    stem = without_suffix(file) if companion_kind(file) else file.rpartition(".")[0]
    return int.from_bytes(hashlib.blake2b(os.fsencode(stem), digest_size=8).digest(), "little")
