"""TarShards: tar files of images and captions in WebDataset layout, read in place."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Unpack

from finetune.data.captions import Caption, CaptionSource, Lines, Texts, caption_of_name, first_caption
from finetune.data.data_source import folder_of, is_pattern
from finetune.data.image_dataset import ImageFileDataset, Ledger
from finetune.data.image_index import ImageIndex
from finetune.data.images import Member, PictureFile
from finetune.data.listing import SHARD_SUFFIX, is_picture
from finetune.data.shard_index import TEXT_SUFFIXES, Place, ShardIndex, ShardPicture, index_of, pictures_of
from finetune.data.transforms import Preprocess, PreprocessOptions, preprocess_of
from finetune.errors import DataError, UsageError


class TarShards(ImageFileDataset):
    """The pictures in tar files, KEY.jpg or another ending, with KEY.txt, KEY.caption or KEY.json beside them, and
    KEY.mask.png.

    A .json holds the caption, or a list of them, under "caption", "text" or "prompt". No name in a tar file is ever
    used as a path, and nothing is unpacked.

    Args:
        shards: not compressed.
        root: the folder that they are called relative to.
        prompt: caption of the pictures that have none of their own.
        trigger, transform, caption_source, caption_lines, masks, memory: as for `ImageFolder`.
        part: the numbers of the pictures to open; None: all.

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
        transform: Preprocess | None = None,
        caption_source: CaptionSource = "files",
        caption_lines: Lines = "joined",
        masks: Literal["files", "files and alpha", "none"] = "files",
        memory: ImageIndex | None = None,
        part: Sequence[int] | None = None,
        **preprocess: Unpack[PreprocessOptions],
    ) -> None:
        members, indices = _opened(shards, memory, part)
        if not members:
            raise DataError(f"{root}: no image found in {', '.join(shard.name for shard in shards[:3])}")
        self._members = [member for member, _ in members]
        called = {shard: shard.relative_to(root).as_posix() for shard in shards}
        captions = [
            _caption(member.name, picture.texts, prompt, source=caption_source, lines=caption_lines)
            for member, picture in members
        ]
        ids = [f"{called[member.shard]}/{member.name}" for member in self._members]
        bad = {name: picture.unreadable for name, (_, picture) in zip(ids, members, strict=True) if picture.unreadable}
        companions = {
            member: {kind: _member(member.shard, place) for kind, place in picture.companions.items()}
            for member, picture in members
            if picture.companions
        }
        others = indices if part is None or part[0] == 0 else {}  # what is no picture is accounted for with the first
        self._lonely_masks = sum(index.lonely_masks for index in others.values())
        self._skipped = sum((Counter(index.skipped) for index in others.values()), Counter[str]())
        self._captions = sum(index.captions for index in others.values())
        unusable = self._open_companions(companions, masks, memory)
        bad |= {f"{called[member.shard]}/{member.name}": reason for member, reason in unusable.items()}
        super().__init__(
            str(root),
            ids,
            captions,
            trigger=trigger,
            transform=preprocess_of(transform, preprocess),
            memory=memory,
            bad=bad,
            orphans=[f"{called[shard]}/{name}" for shard, index in others.items() for name in index.orphans],
            more=part is not None,
        )

    def _file(self, place: int) -> PictureFile:
        return self._members[place]

    def ledger(self) -> Ledger:
        ledger = super().ledger()
        lonely = {"masks without an image": self._lonely_masks} if self._lonely_masks else {}
        skipped = {**lonely, **dict(sorted(self._skipped.items())), **ledger.skipped}
        masks = len({file for some in self._companions.values() for file in some.values()})
        total = ledger.found + self._captions + masks + self._lonely_masks + sum(self._skipped.values())
        return ledger._replace(found=total, captions=self._captions, masks=masks, skipped=skipped)

    def notes(self) -> list[str]:
        return [*super().notes(), *(f"in the shards, {why}: {count}" for why, count in sorted(self._skipped.items()))]


def _opened(
    shards: Sequence[Path], memory: ImageIndex | None, part: Sequence[int] | None
) -> tuple[list[tuple[Member, ShardPicture]], dict[Path, ShardIndex]]:
    """The pictures with these rising numbers, counted through all shards, or all; and what each shard holds in all."""
    members, indices = list[tuple[Member, ShardPicture]](), dict[Path, ShardIndex]()
    before = at = 0
    for shard in shards:
        numbers = None
        if part is not None:
            stop = bisect_left(part, before + index_of(shard, memory).pictures, at)
            numbers, at = [number - before for number in part[at:stop]], stop
        indices[shard], pictures = pictures_of(shard, memory, numbers)
        members += [(_member(shard, picture.place), picture) for picture in pictures]
        before += indices[shard].pictures
    return members, indices


def _member(shard: Path, place: Place) -> Member:
    name, offset, size = place
    return Member(shard, name, offset, size)


def find_shards(source: str, path: Path, files: Sequence[str]) -> tuple[list[Path], Path] | None:
    """The tar files that --data names, and the folder that they are called relative to; None: it names none.

    Args:
        source: as it was given: a tar file, a folder with such and no pictures, or a pattern such as shards/*.tar.
        path: the same as a path.
        files: in that folder, where it is one.

    Raises:
        UsageError: nothing fits the pattern.
    """
    if path.is_file():
        return ([path], path.parent) if path.suffix.lower() == SHARD_SUFFIX else None
    if path.is_dir():
        shards = [path / file for file in files if file.lower().endswith(SHARD_SUFFIX)]
        return (shards, path) if shards and not any(map(is_picture, files)) else None
    if not is_pattern(source):
        return None
    root = folder_of(str(path))
    shards = sorted(file for file in root.glob(str(path.relative_to(root))) if file.is_file())
    if not shards:
        raise UsageError(f"--data {source}: no such files")
    return shards, root


def _caption(
    name: str, texts: Mapping[str, Texts], prompt: str | None, *, source: CaptionSource, lines: Lines
) -> Caption:
    if source == "filename":
        return first_caption((("filename", caption_of_name(name)), ("prompt", prompt)))
    candidates = ((ending[1:], texts.get(ending)) for ending in TEXT_SUFFIXES) if source == "files" else ()
    return first_caption((*candidates, ("prompt", prompt)), lines=lines)
