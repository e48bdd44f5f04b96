"""Shards: tar files of pictures with their captions, as WebDataset has them. They are read where they lie."""

import json
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

from finetune.data.buckets import Buckets
from finetune.data.captions import CAPTION_SUFFIXES, Texts, first_caption
from finetune.data.images import Member, PictureFile, is_picture, list_files
from finetune.data.masks import is_mask
from finetune.data.picture_memory import PictureMemory
from finetune.data.pictures import Ledger, PictureFiles
from finetune.data.source import folder_of, is_pattern
from finetune.data.transforms import Preprocess
from finetune.errors import DataError, UsageError

SUFFIX = ".tar"

_TEXT_SUFFIXES = (*CAPTION_SUFFIXES, ".json")
"""Endings of captions, in the order of precedence."""

_TEXT_KEYS = ("caption", "text", "prompt")
"""Under which a .json holds its caption: the first that is there."""

_LONGEST_TEXT = 1_000_000
"""Bytes of a caption's file."""

_END = 1024
"""Zeros, at least, that end a tar file."""


@dataclass
class _Found:
    """What shards hold."""

    pictures: list[tuple[str, Member]] = field(default_factory=list)
    """With their ids."""
    texts: dict[str, dict[str, Texts]] = field(default_factory=dict)
    """Id without its ending -> ending -> the caption."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Id without its ending -> what is wrong with its caption."""
    captions: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Why -> how many."""


class TarShards(PictureFiles):
    """The pictures in tar files, KEY.jpg or another ending, with KEY.txt, KEY.caption or KEY.json beside them.

    A .json holds the caption, or a list of them, under "caption", "text" or "prompt". No name in a tar file is ever
    used as a path, and nothing is unpacked.

    Args:
        shards: not compressed.
        root: the folder that they are called relative to.
        prompt: caption of the pictures that have none of their own.
        trigger, resolution, resize_mode, center_crop, random_flip, buckets, caption_lines, memory: as for
            `ImageFolder`.

    An id is the name of the shard and the name in it: "0001.tar/cat.jpg".

    Raises:
        UsageError: an option is out of range.
        DataError: a shard is none, or is cut short; or no picture in them can be read.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        root: Path,
        prompt: str | None = None,
        *,
        trigger: str | None = None,
        resolution: int = 512,
        resize_mode: Literal["crop", "squash"] = "crop",
        center_crop: bool = True,
        random_flip: bool = False,
        buckets: Buckets | None = None,
        caption_lines: Literal["joined", "chosen"] = "joined",
        memory: PictureMemory | None = None,
    ) -> None:
        transform = Preprocess(resolution, resize_mode, center_crop, random_flip, buckets)
        found = _Found()
        for shard in shards:
            _look_through(shard, shard.relative_to(root).as_posix(), found)
        if not found.pictures:
            raise DataError(f"{root}: no picture found in {', '.join(shard.name for shard in shards[:3])}")
        names = [name for name, _ in found.pictures]
        self._members = [member for _, member in found.pictures]
        keys = [_key(name) for name in names]
        captions = [
            first_caption(
                (
                    *((ending[1:], found.texts.get(key, {}).get(ending)) for ending in _TEXT_SUFFIXES),
                    ("prompt", prompt),
                ),
                by_line=caption_lines == "chosen",
            )
            for key in keys
        ]
        self._skipped, self._captions = found.skipped, found.captions
        known = set(keys)
        orphans = [key + next(iter(texts)) for key, texts in found.texts.items() if key not in known]
        super().__init__(
            str(root),
            names,
            captions,
            trigger=trigger,
            transform=transform,
            memory=memory,
            bad={name: found.unreadable[key] for name, key in zip(names, keys, strict=True) if key in found.unreadable},
            orphans=orphans,
        )

    def _file(self, place: int) -> PictureFile:
        return self._members[place]

    def ledger(self) -> Ledger:
        own = super().ledger()
        skipped = {**dict(sorted(self._skipped.items())), **own.skipped}
        found = own.found + self._captions + sum(self._skipped.values())
        return own._replace(found=found, captions=self._captions, skipped=skipped)

    def notes(self) -> list[str]:
        return [*super().notes(), *(f"in the shards, {why}: {count}" for why, count in sorted(self._skipped.items()))]


def find_shards(source: str, path: Path) -> tuple[list[Path], Path] | None:
    """The tar files that --data names, and the folder that they are called relative to; None: it names none.

    Args:
        source: as it was given: a tar file, a folder with such, or a pattern such as shards/*.tar.
        path: the same as a path.

    Raises:
        UsageError: nothing fits the pattern.
        DataError: a folder holds both tar files and pictures.
    """
    if path.is_file():
        return ([path], path.parent) if path.suffix.lower() == SUFFIX else None
    if path.is_dir():
        files = list_files(path)
        shards = [file for file in files if file.suffix.lower() == SUFFIX]
        if shards and any(map(is_picture, files)):
            raise DataError(f"--data {source}: holds pictures and {SUFFIX} files; name one of them")
        return (shards, path) if shards else None
    if not is_pattern(source):
        return None
    root = folder_of(str(path))
    shards = sorted(file for file in root.glob(str(path.relative_to(root))) if file.is_file())
    if not shards:
        raise UsageError(f"--data {source}: no such files")
    return shards, root


def _look_through(shard: Path, name: str, found: _Found) -> None:
    """Add what a shard holds. Raises DataError."""
    try:
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            before = -1
            while (member := tar.next()) is not None:
                if tar.offset <= before:  # some versions of Python would go round for ever
                    raise tarfile.ReadError("a member of negative size")
                before = tar.offset
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] # it would keep all of them
                if not member.isdir():
                    _take(shard, name, tar, member, found)
            _check_end(file, tar.offset)
    except OSError as error:
        raise DataError(f"{shard}: {error.strerror}") from error
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"{shard}: not a whole tar file ({error}); fetch it again, or leave it out") from error


def _check_end(file: IO[bytes], offset: int) -> None:
    """Raise ReadError unless there are zeros from here to the end. tarfile takes a broken header for an end."""
    file.seek(offset)
    zeros = 0
    while block := file.read(2**16):
        if block.strip(b"\0"):
            raise tarfile.ReadError(f"no header at byte {offset}, and no end")
        zeros += len(block)
    if zeros < _END:
        raise tarfile.ReadError(f"no end at byte {offset}")


def _take(shard: Path, name: str, tar: tarfile.TarFile, member: tarfile.TarInfo, found: _Found) -> None:
    inside = PurePosixPath(member.name)
    place, ending = f"{name}/{member.name}", inside.suffix.lower()
    if not member.isreg() or member.issparse():
        found.skipped["links and other members that are no files"] += 1
    elif inside.is_absolute() or ".." in inside.parts:
        found.skipped["names that lead out of the shard"] += 1
    elif inside.name.startswith("."):
        found.skipped["hidden files"] += 1
    elif is_mask(inside):
        found.skipped["masks, which are read beside files alone"] += 1
    elif is_picture(inside):
        found.pictures.append((place, Member(shard, member.name, member.offset_data, member.size)))
    elif ending in _TEXT_SUFFIXES:
        found.captions += 1
        try:
            found.texts.setdefault(_key(place), {})[ending] = _text(tar, member)
        except (ValueError, RecursionError) as error:
            found.unreadable[_key(place)] = f"{inside.name}: {error}"
    else:
        found.skipped[f"neither pictures nor captions: {ending or 'without an ending'}"] += 1


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Texts:
    """A caption, or several. Raises ValueError."""
    if member.size > _LONGEST_TEXT:
        raise ValueError(f"a caption of {member.size} bytes")
    file = tar.extractfile(member)
    assert file is not None  # a regular file
    try:
        text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from error
    if not member.name.lower().endswith(".json"):
        return text
    return _of_json(json.loads(text))  # whose error is a ValueError


def _of_json(content: Any) -> Texts:
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    text = next((content[key] for key in _TEXT_KEYS if content.get(key)), None)
    if text is None or isinstance(text, str) or (isinstance(text, list) and all(isinstance(t, str) for t in text)):
        return text
    raise ValueError(f"the caption is {text!r}, allowed is a string or a list of them")


def _key(place: str) -> str:
    """The name without its ending: what a picture and its caption share."""
    return os.path.splitext(place)[0]
