"""ImageFolder: the images in a folder, with the captions next to them."""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Unpack

from finetune.data.caption_files import CAPTION_SUFFIXES
from finetune.data.captions import (
    COLUMN,
    CaptionSource,
    Lines,
    Texts,
    find_captions,
    is_metadata,
)
from finetune.data.companions import companions_of, pictures_among
from finetune.data.image_dataset import ImageFileDataset, Ledger
from finetune.data.image_index import ImageIndex
from finetune.data.images import PictureFile
from finetune.data.listing import PICTURE_SUFFIXES, ending, is_picture, list_files
from finetune.data.transforms import Preprocess, PreprocessOptions, preprocess_of
from finetune.errors import DataError, UsageError
from finetune.text import join_limited

_REPEATED = re.compile(r"(\d{1,3})_(.+)")
"""A folder's name in the layout of sd-scripts: repeats and subject. A year has four digits."""


_MASK_NAME = re.compile(r"(.*)[-_.](?:mask|alpha|seg)", re.IGNORECASE)
"""How other tools call the mask of NAME."""


class FolderPart(NamedTuple):
    """Some of a folder's files, and what only all of them tell."""

    files: Sequence[str]
    metadata: Mapping[str, Texts] | None = None
    """What `read_metadata` has found; None: these are all, and it is asked."""
    repeated: bool = True
    """Whether the others also lie in folders called N_SUBJECT, if these do."""


class ImageFolder(ImageFileDataset):
    """The pictures in a folder, at any depth, with the captions beside them (see `find_captions`).

    Where all pictures lie in folders called N_SUBJECT, as sd-scripts has them, each comes N times in an epoch, and the
    subject is the caption of those that have no other.

    Args:
        folder: where the pictures are; hidden files and folders are left out.
        prompt: caption of the pictures that have none of their own.
        trigger: word put in place of every [trigger], or in front of each caption.
        transform: how the pictures become squares or the sizes of buckets; or give the arguments of `Preprocess`.
        caption_lines: "joined": a caption of several lines is one; "chosen": each line is one, and visits take turns;
            "first": the others are left out.
        masks: where an error counts (see `finetune.data.masks`): the files NAME.mask.png beside pictures; and the
            alpha channel of those without; or everywhere.
        memory: of earlier runs; without it, every picture is decoded once before anything else.
        part: what of the folder to open; None: all that `list_files` finds.
        caption_column: of metadata files.
        caption_source: "files": see `find_captions`; "filename": the pictures' names; "prompt": `prompt` for all.

    An id is a path relative to the folder, with forward slashes.

    Raises:
        UsageError: `folder` is none, or an option is out of range.
        DataError: no picture in it that can be read, or a malformed metadata file.
    """

    def __init__(
        self,
        folder: str | Path,
        prompt: str | None = None,
        *,
        trigger: str | None = None,
        transform: Preprocess | None = None,
        caption_lines: Lines = "joined",
        masks: Literal["files", "files and alpha", "none"] = "files",
        memory: ImageIndex | None = None,
        part: FolderPart | None = None,
        caption_column: str = COLUMN,
        caption_source: CaptionSource = "files",
        **preprocess: Unpack[PreprocessOptions],
    ) -> None:
        root = Path(folder)
        if not root.is_dir():
            raise UsageError(f"{folder}: {'not a folder' if root.exists() else 'no such folder'}")
        self._root = root
        files, metadata, repeated = part or FolderPart(list_files(root))
        self._names = pictures_among(files)
        if metadata is None and (project := _project(root, self._names)):
            raise UsageError(project)
        if not self._names:
            raise DataError(f"{folder}: no image found; expected {' '.join(PICTURE_SUFFIXES)}")
        companions, self._lonely_masks = companions_of(files, self._names)
        files_by_picture = {
            root / picture: {kind: root / file for kind, file in some.items()} for picture, some in companions.items()
        }
        unusable = self._open_companions(files_by_picture, masks, memory)
        repeats = repeats_of(self._names) if repeated else []
        self._repeated = bool(repeats)
        subjects = {name: name.split("/")[0].partition("_")[2] for name in self._names} if repeats else {}
        captions = find_captions(
            root,
            files,
            pictures=self._names,
            prompt=prompt,
            subjects=subjects,
            lines=caption_lines,
            metadata=metadata,
            column=caption_column,
            source=caption_source,
        )
        self._count, self._caption_files = len(files), captions.files
        self._others = Counter(ending(file) or "without an ending" for file in files if _is_strange(file))
        super().__init__(
            str(folder),
            self._names,
            captions.captions,
            trigger=trigger,
            transform=preprocess_of(transform, preprocess),
            memory=memory,
            bad=captions.unreadable | {name: unusable[root / name] for name in companions if root / name in unusable},
            repeats=repeats,
            orphans=captions.orphans,
            empty=captions.empty,
            more=metadata is not None,
        )
        self.passed_over = captions.passed_over
        resolved = root.resolve()
        if not repeats and _REPEATED.fullmatch(resolved.name):
            self.passed_over.append(
                f"the folder's own name, {resolved.name}: give --data {resolved.parent} for what it says"
            )

    def _file(self, place: int) -> PictureFile:
        return self._root / self._names[place]

    def ledger(self) -> Ledger:
        strange = {f"neither images nor captions: {ending}": count for ending, count in sorted(self._others.items())}
        orphans = {"caption files without an image": len(self.orphans)} if self.orphans else {}
        orphans |= {"masks without an image": len(self._lonely_masks)} if self._lonely_masks else {}
        ledger = super().ledger()
        skipped = {**orphans, **strange, **ledger.skipped}
        masks = len({file for some in self._companions.values() for file in some.values()})
        return ledger._replace(found=self._count, captions=self._caption_files, masks=masks, skipped=skipped)

    def _warnings(self) -> list[str]:
        """What looks as if it were not meant so."""
        ignored = sum(self._others.values())
        lines = [f"most files are ignored: {ignored} of {self._count}"] if 2 * ignored > self._count else []
        stems = {os.path.splitext(name)[0] for name in self._names}
        mask_like = [name for name in self._names if _MASK_NAME.fullmatch(stem := os.path.splitext(name)[0]) and
                  _MASK_NAME.sub(r"\1", stem) in stems]  # fmt: skip
        if mask_like:
            lines.append(
                f"images whose names look like masks are trained on: {join_limited(mask_like)}; "
                "a mask is named NAME.mask.png"
            )
        return lines

    def notes(self) -> list[str]:
        kinds = join_limited([f"{count} {suffix}" for suffix, count in sorted(self._others.items())])
        named = sorted({name.split("/")[0] for name in self.ids if _REPEATED.match(name)})
        unused, lonely = [] if self._repeated else named, self._lonely_masks
        lines = {
            f"masks without an image ({len(lonely)}): {join_limited(lonely)}": lonely,
            f"ignored files (neither image nor caption): {kinds}": kinds,
            f"folder names not read as repeats, because other folders hold images too: {join_limited(unused)}": unused,
        }
        return super().notes() + [line for line, applies in lines.items() if applies] + self._warnings()


def _project(root: Path, names: Sequence[str]) -> str:
    """Why a folder that holds several folders of pictures is not one of pictures, and what to give; "": it is."""
    first = {name.split("/")[0] for name in names if "/" in name}
    if len(first) < 2 or any("/" not in name for name in names):
        return ""
    in_folders = all(_REPEATED.match(name.split("/")[1]) for name in names if name.count("/") > 1)
    if first <= {"img", "image", "reg", "regularization"} and in_folders:
        images, others = (next(name for name in first if name.startswith(begin)) for begin in ("im", "reg"))
        return f"{root} is a project folder of sd-scripts: give --data {root / images} --class_data {root / others}"
    held_out = first & {"test", "val", "valid", "validation"}
    if "train" in first and held_out and first <= {"train", *held_out}:
        return f"{root} has its own split: give --data {root / 'train'} --validation_data {root / min(held_out)}"
    return ""


def repeats_of(pictures: Sequence[str]) -> list[int]:
    """Return how many times each picture comes in an epoch, by its folder's name; [] unless all lie in such folders."""
    matches = [_REPEATED.fullmatch(name.split("/")[0]) if "/" in name else None for name in pictures]
    repeats = [int(match[1]) for match in matches if match and int(match[1])]
    return repeats if len(repeats) == len(pictures) else []


def _is_strange(file: str) -> bool:
    return not is_picture(file) and not is_metadata(file) and not file.lower().endswith(CAPTION_SUFFIXES)
