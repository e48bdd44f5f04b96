"""Checks of images before training: whether they can be read, their size and digest."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from finetune.data.image_index import FileStamp, ImageIndex, IndexEntry
from finetune.data.images import READ_ERRORS, Member, PictureFile, Row, decoded_size, digest_of, read_file, reason_of

_LONGEST_STRIP = 50
"""A longer side of more than this many times the shorter would, scaled to the resolution, fill the memory."""

_TOGETHER = 32
"""Pictures that a thread takes at a time: where all are remembered, handing over each would take the longest."""

_NOTED = 1000
"""New ones after which they are remembered: what a killed process loses."""


@dataclass(frozen=True)
class RejectedImage:
    """A picture that is left out, and why."""

    path: str
    """Relative to the folder of pictures, or the row ("row 12")."""
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class ImageInfo(NamedTuple):
    """What is known of a picture that can be read."""

    size: tuple[int, int]
    """Width and height in pixels, upright."""
    digest: str
    """Of the file's bytes: another one is another picture."""


Place = tuple[Path, FileStamp]
"""Under what path and stamp a file is remembered."""


class _Finding(NamedTuple):
    verdict: ImageInfo | RejectedImage
    place: Place | None = None
    """Where the bytes were found; None: not in a file of their own."""
    new: bool = False
    """Not remembered yet."""


def check_images(
    names: Sequence[str], source: Callable[[int], PictureFile], memory: ImageIndex | None = None
) -> list[ImageInfo | RejectedImage]:
    """Decode every picture in full, in threads: what it is, or why it must be left out.

    Args:
        names: what each picture is called in the result.
        source: position in `names` -> where the picture is; may raise ValueError with the reason that there is none.
        memory: of earlier runs, which spares the reading of files that are unchanged, and takes up what is new.
    """
    verdicts: list[ImageInfo | RejectedImage] = []
    with tqdm(total=len(names), desc="checking images", unit="", delay=3, leave=False, disable=None) as bar:
        new: list[_Finding] = []
        for findings in _findings(names, source, memory):
            verdicts += [finding.verdict for finding in findings]
            new += [finding for finding in findings if finding.new]
            bar.update(len(findings))
            if memory is not None and new and (len(new) >= _NOTED or len(verdicts) == len(names)):
                _remember(memory, new)
                new = []
    return verdicts


def stamped(source: PictureFile) -> Place | None:
    """Under what path and stamp a file is remembered; None: it is no file of its own."""
    if isinstance(source, Member):  # it changes only with its shard
        return source.place, FileStamp.read(source.shard)
    if isinstance(source, Row):
        return source.place, FileStamp(0, 0, 0)
    return (source, FileStamp.read(source)) if isinstance(source, Path) else None


def _findings(
    names: Sequence[str], source: Callable[[int], PictureFile], memory: ImageIndex | None
) -> Iterator[list[_Finding]]:
    """A few at a time, in order."""

    def check(first: int) -> list[_Finding]:
        some = names[first : first + _TOGETHER]
        infos = [_located(source, first + number, name) for number, name in enumerate(some)]
        places = [located[1] for located in infos if not isinstance(located, RejectedImage) and located[1]]
        entries = memory.lookup(places) if memory is not None else {}
        return [
            _Finding(located) if isinstance(located, RejectedImage) else _finding(*located, name, entries, memory)
            for located, name in zip(infos, some, strict=True)
        ]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(check, range(0, len(names), _TOGETHER))


def _located(
    source: Callable[[int], PictureFile], position: int, name: str
) -> tuple[PictureFile, Place | None] | RejectedImage:
    try:
        file = source(position)
        return file, stamped(file)
    except READ_ERRORS as error:
        return RejectedImage(name, reason_of(error))


def _finding(
    file: PictureFile, place: Place | None, name: str, entries: dict[Place, IndexEntry], memory: ImageIndex | None
) -> _Finding:
    """What a picture is, by memory if it can be."""
    digest, size = entries.get(place, (None, None)) if place else (None, None)
    remembered = digest is not None and size is not None
    try:
        content = b"" if digest else read_file(file)
        digest = digest or digest_of(content)
        if size is None and memory is not None:
            size = memory.size(digest)
        if size is None:
            size = decoded_size(content or read_file(file), name)
    except READ_ERRORS as error:
        return _Finding(RejectedImage(name, reason_of(error)))
    if max(size) > _LONGEST_STRIP * min(size):
        shape = f"{size[0]} x {size[1]} pixels"
        return _Finding(RejectedImage(name, f"{shape}: one side is over {_LONGEST_STRIP} times the other"))
    return _Finding(ImageInfo(size, digest), place, new=not remembered)


def _remember(memory: ImageIndex, new: Sequence[_Finding]) -> None:
    good = [(finding.place, finding.verdict) for finding in new if isinstance(finding.verdict, ImageInfo)]
    memory.note(
        [(*place, checked.digest) for place, checked in good if place],
        [(checked.digest, checked.size) for _, checked in good],
    )
