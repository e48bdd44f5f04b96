"""The index of a tar shard: read once, and stored while the shard is unchanged."""

import json
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from finetune.data.caption_files import CAPTION_SUFFIXES
from finetune.data.captions import Texts
from finetune.data.companions import companion_kind, companions_of
from finetune.data.image_index import FileStamp, ImageIndex
from finetune.data.listing import is_picture
from finetune.errors import DataError

TEXT_SUFFIXES = (*CAPTION_SUFFIXES, ".json")
"""Endings of captions, in the order of precedence."""

_TEXT_KEYS = ("caption", "text", "prompt")
"""Under which a .json holds its caption: the first that is there."""

_LONGEST_TEXT = 1_000_000
"""Bytes of a caption's file."""

_END = 1024
"""Zeros, at least, that end a tar file."""

_VERSION = 4
"""Of what is remembered: another one is read again."""

Place = tuple[str, int, int]
"""Name, offset, and size in bytes of a member."""


class ShardPicture(NamedTuple):
    """A picture in a shard, with what belongs to it."""

    place: Place
    texts: dict[str, Texts]
    """Ending -> the caption in a file of that ending."""
    unreadable: str | None
    """What is wrong with its caption."""
    companions: dict[str, Place]
    """Kind -> where the companion of that kind is."""


@dataclass(frozen=True)
class ShardIndex:
    """What a shard holds in all; its pictures are read separately, for there may be millions."""

    pictures: int
    captions: int
    """Files that hold one."""
    orphans: list[str]
    """Caption files without a picture."""
    lonely_masks: int
    """Masks without a picture."""
    skipped: dict[str, int]
    """Why -> how many."""


def index_of(shard: Path, memory: ImageIndex | None) -> ShardIndex:
    """What a shard holds in all, from `memory` if it is known there. Raises DataError as `pictures_of`."""
    remembered = _remembered(shard, memory)
    return _read(shard, memory)[0] if remembered is None else remembered


def pictures_of(
    shard: Path, memory: ImageIndex | None, numbers: Sequence[int] | None = None
) -> tuple[ShardIndex, list[ShardPicture]]:
    """What a shard holds in all, and its pictures with these numbers, from `memory` if they are known there.

    Args:
        shard: a tar file that is not compressed.
        memory: of earlier runs; takes up what is new.
        numbers: rising, from 0; None: all pictures.

    Raises:
        DataError: it is no tar file, or cut short.
    """
    index = _remembered(shard, memory)
    if memory is not None and index is not None:
        rows = memory.shard_pictures(shard, numbers)
        return index, [_of_row(row) for row in rows]
    index, pictures = _read(shard, memory)
    return index, pictures if numbers is None else [pictures[number] for number in numbers]


def _remembered(shard: Path, memory: ImageIndex | None) -> ShardIndex | None:
    try:
        text = memory.shard(shard, FileStamp.read(shard)) if memory is not None else None
    except OSError as error:
        raise DataError(f"{shard}: {error.strerror}") from error
    remembered = json.loads(text) if text is not None else {}
    return ShardIndex(**remembered) if remembered.pop("version", None) == _VERSION else None


def _of_row(row: str) -> ShardPicture:
    place, texts, unreadable, companions = json.loads(row)
    return ShardPicture(tuple(place), texts, unreadable, {kind: tuple(at) for kind, at in companions.items()})


def key_of(name: str) -> str:
    """The name without its ending: what a picture and its caption share."""
    return os.path.splitext(name)[0]


@dataclass
class _Members:
    """What is found in a shard, member by member."""

    pictures: list[Place] = field(default_factory=list)
    companions: list[Place] = field(default_factory=list)
    texts: dict[str, dict[str, Texts]] = field(default_factory=dict)
    """Name without its ending -> ending -> the caption."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Name without its ending -> what is wrong with its caption."""
    captions: int = 0


def _read(shard: Path, memory: ImageIndex | None) -> tuple[ShardIndex, list[ShardPicture]]:
    """Read all headers and captions, and remember what they say."""
    members, skipped = _Members(), Counter[str]()
    try:
        stamp = FileStamp.read(shard)
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            before = -1
            while (member := tar.next()) is not None:
                if tar.offset <= before:  # some versions of Python would go round for ever
                    raise tarfile.ReadError("a member of negative size")
                before = tar.offset
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] # it would keep all of them
                if not member.isdir() and (reason := _take(tar, member, members)):
                    skipped[reason] += 1
            _check_end(file, tar.offset)
    except OSError as error:
        raise DataError(f"{shard}: {error.strerror}") from error
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"{shard}: not a whole tar file ({error}); fetch it again, or leave it out") from error
    places = {place[0]: place for place in members.companions}
    companions, lonely = companions_of(places, [name for name, _, _ in members.pictures])
    pictures = [
        ShardPicture(
            place,
            members.texts.get(key_of(place[0]), {}),
            members.unreadable.get(key_of(place[0])),
            {kind: places[name] for kind, name in companions.get(place[0], {}).items()},
        )
        for place in members.pictures
    ]
    orphans = members.texts.keys() - {key_of(name) for name, _, _ in members.pictures}
    orphans = sorted(f"{key}{next(iter(members.texts[key]))}" for key in orphans)
    index = ShardIndex(len(pictures), members.captions, orphans, len(lonely), dict(sorted(skipped.items())))
    if memory is not None:
        summary = json.dumps({"version": _VERSION, **asdict(index)})
        memory.note_shard(shard, stamp, summary, map(json.dumps, pictures))
    return index, pictures


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


def _take(tar: tarfile.TarFile, member: tarfile.TarInfo, members: _Members) -> str | None:
    """Note a member; answers why it is skipped, where it is."""
    name = PurePosixPath(member.name)
    ending = name.suffix.lower()
    if not member.isreg() or member.issparse():
        return "links and other members that are no files"
    if name.is_absolute() or ".." in name.parts:
        return "names that lead out of the shard"
    if name.name.startswith("."):
        return "hidden files"
    if is_picture(member.name):
        places = members.companions if companion_kind(member.name) else members.pictures
        places.append((member.name, member.offset_data, member.size))
        return None
    if ending not in TEXT_SUFFIXES:
        return f"neither images nor captions: {ending or 'without an ending'}"
    members.captions += 1
    try:
        members.texts.setdefault(key_of(member.name), {})[ending] = _text(tar, member)
    except (ValueError, RecursionError) as error:
        members.unreadable[key_of(member.name)] = f"{name.name}: {error}"
    return None


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
    raise ValueError(f"the caption is {text!r}, expected a string or a list of them")
