"""What a tar shard holds: found by reading it once, remembered for as long as it is unchanged."""

import json
import os
import tarfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from finetune.data.captions import CAPTION_SUFFIXES, Texts
from finetune.data.listing import is_picture
from finetune.data.masks import is_mask
from finetune.data.picture_memory import PictureMemory, Stamp
from finetune.errors import DataError

TEXT_SUFFIXES = (*CAPTION_SUFFIXES, ".json")
"""Endings of captions, in the order of precedence."""

_TEXT_KEYS = ("caption", "text", "prompt")
"""Under which a .json holds its caption: the first that is there."""

_LONGEST_TEXT = 1_000_000
"""Bytes of a caption's file."""

_END = 1024
"""Zeros, at least, that end a tar file."""

_VERSION = 2
"""Of what is remembered: another one is read anew."""


@dataclass
class ShardIndex:
    """What a shard holds, fit for JSON."""

    pictures: list[tuple[str, int, int]] = field(default_factory=list)
    """Name, offset, and size in bytes."""
    masks: list[tuple[str, int, int]] = field(default_factory=list)
    """Likewise."""
    texts: dict[str, dict[str, Texts]] = field(default_factory=dict)
    """Name without its ending -> ending -> the caption."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Name without its ending -> what is wrong with its caption."""
    captions: int = 0
    """Files that hold one."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Why -> how many."""


def index_of(shard: Path, memory: PictureMemory | None) -> ShardIndex:
    """What a shard holds, by memory if it can be. Raises DataError where it is none, or not whole."""
    try:
        stamp = Stamp.of(shard)
        text = memory.shard(shard, stamp) if memory is not None else None
        remembered = json.loads(text) if text is not None else {}
        if remembered.pop("version", None) == _VERSION:
            return ShardIndex(**remembered)
        index = _read(shard)
    except OSError as error:
        raise DataError(f"{shard}: {error.strerror}") from error
    if memory is not None:
        memory.note_shard(shard, stamp, json.dumps({"version": _VERSION, **asdict(index)}))
    return index


def key_of(name: str) -> str:
    """The name without its ending: what a picture and its caption share."""
    return os.path.splitext(name)[0]


def _read(shard: Path) -> ShardIndex:
    index, skipped = ShardIndex(), Counter[str]()
    try:
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            before = -1
            while (member := tar.next()) is not None:
                if tar.offset <= before:  # some versions of Python would go round for ever
                    raise tarfile.ReadError("a member of negative size")
                before = tar.offset
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] # it would keep all of them
                if not member.isdir() and (reason := _take(tar, member, index)):
                    skipped[reason] += 1
            _check_end(file, tar.offset)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"{shard}: not a whole tar file ({error}); fetch it again, or leave it out") from error
    index.skipped = dict(sorted(skipped.items()))
    return index


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


def _take(tar: tarfile.TarFile, member: tarfile.TarInfo, index: ShardIndex) -> str | None:
    """Note a member in the index; answers why it is skipped, where it is."""
    name = PurePosixPath(member.name)
    ending = name.suffix.lower()
    if not member.isreg() or member.issparse():
        return "links and other members that are no files"
    if name.is_absolute() or ".." in name.parts:
        return "names that lead out of the shard"
    if name.name.startswith("."):
        return "hidden files"
    if is_picture(member.name):
        found = index.masks if is_mask(member.name) else index.pictures
        found.append((member.name, member.offset_data, member.size))
        return None
    if ending not in TEXT_SUFFIXES:
        return f"neither pictures nor captions: {ending or 'without an ending'}"
    index.captions += 1
    try:
        index.texts.setdefault(key_of(member.name), {})[ending] = _text(tar, member)
    except (ValueError, RecursionError) as error:
        index.unreadable[key_of(member.name)] = f"{name.name}: {error}"
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
    raise ValueError(f"the caption is {text!r}, allowed is a string or a list of them")
