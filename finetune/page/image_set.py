"""ImageSet: a folder of images as the page shows it: each image with its caption, to be searched and edited."""

import os
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from finetune.atomic_io import is_inside
from finetune.data.captions import Caption, find_captions, first_caption, read_metadata
from finetune.data.companions import companion_kind, companions_of, pictures_among
from finetune.data.images import READ_ERRORS, upright_size
from finetune.data.listing import files_inside
from finetune.errors import DataError, UsageError
from finetune.page.caption_edits import CaptionEdits, tags_of

LEFT_OUT = ".left-out"
"""Folder, below the one of images, that holds those which were left out. Hidden, so training does not see it."""

Show = Literal["all", "without caption", "problems", "masked", "left out"]


@dataclass(frozen=True)
class ShownImage:
    """An image on the wall."""

    name: str
    """Path relative to the folder."""
    caption: str
    """As training reads it, without prompt and trigger word."""
    source: str
    """Where the caption comes from: txt, caption, metadata or none."""
    problem: str = ""
    """Why training leaves it out."""
    mask: str = ""
    """Path of its mask relative to the folder."""


class ImageSet:
    """The images of a folder at any depth, as they were when it was read.

    Args:
        folder: of images; what links out of it lead to is not among them.

    Raises:
        DataError: a folder cannot be listed, or a metadata file is malformed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: dict[str, list[str]] = {}
        """Image -> what a check has found about it."""
        self.edits = CaptionEdits(folder, self._said_elsewhere)
        self._lock = threading.Lock()
        self.read()

    def read(self) -> None:
        """Read the folder."""
        files = files_inside(self.folder)
        names = pictures_among(files)
        metadata = read_metadata(self.folder, files, names)
        found = find_captions(self.folder, files, names, metadata=metadata)
        masks = companions_of(files, names)[0]
        images = {}
        for name, caption in zip(names, found.captions, strict=True):
            mask = masks.get(name, {}).get("mask", "")
            images[name] = _shown(name, caption, problem=found.unreadable.get(name, ""), mask=mask)
        with self._lock:
            self._files, self._images, self._metadata = set(files), images, metadata

    def _said_elsewhere(self, name: str) -> str:
        return first_caption([("metadata", self._metadata.get(name))]).text

    def image(self, name: str) -> ShownImage:
        """The image of this name. Raises UsageError where there is none."""
        if name not in self._images:
            raise UsageError(f"{name}: no image in {self.folder}")
        return self._images[name]

    def find(self, text: str = "", show: Show = "all") -> list[ShownImage]:
        """The images whose name or caption contains a text, in any case, in the order of their names.

        Args:
            text: to find; "tag:WORD" finds those with this tag.
            show: which of them.
        """
        if show == "left out":
            return [ShownImage(name, "", "none") for name in self.left_out() if text.casefold() in name.casefold()]
        images = list(self._images.values())
        if show == "without caption":
            images = [image for image in images if not image.caption]
        elif show == "problems":
            images = [image for image in images if image.problem or image.name in self.problems]
        elif show == "masked":
            images = [image for image in images if image.mask]
        if text.startswith("tag:"):
            tag = text.removeprefix("tag:").strip()
            return [image for image in images if tag in tags_of(image.caption)]
        wanted = text.strip().casefold()
        return [image for image in images if wanted in image.caption.casefold() or wanted in image.name.casefold()]

    def tags(self) -> list[tuple[str, int]]:
        """The tags of all captions, each with the number of images that have it, the most frequent first."""
        counts = Counter(tag for image in self._images.values() for tag in dict.fromkeys(tags_of(image.caption)))
        return counts.most_common()

    def path(self, name: str) -> Path:
        """The file of an image or of its mask, or of one that was left out.

        Raises:
            UsageError: it is none of these, or a link out of the folder.
        """
        known = name in self._images or (name.startswith(LEFT_OUT) and name in self.left_out())
        path = self.folder / name
        if not (known or companion_kind(name)) or not is_inside(path, self.folder):
            raise UsageError(f"{name}: no image in {self.folder}")
        return path

    def refresh(self, names: Sequence[str]) -> None:
        """Read the captions of these images again."""
        folders = {os.path.dirname(name) for name in names}
        files = [os.path.join(folder, file) for folder in folders for file in os.listdir(self.folder / folder)]
        files = [file for file in files if file in self._files or is_inside(self.folder / file, self.folder)]
        found = find_captions(self.folder, files, names, metadata=self._metadata)
        with self._lock:
            for name, caption in zip(names, found.captions, strict=True):
                mask = companions_of(files, [name])[0].get(name, {}).get("mask", "")
                self._images[name] = _shown(name, caption, problem=found.unreadable.get(name, ""), mask=mask)

    def left_out(self) -> list[str]:
        """The images that were left out, as paths relative to the folder."""
        below = self.folder / LEFT_OUT
        if not is_inside(below, self.folder) or not below.is_dir():
            return []
        return [f"{LEFT_OUT}/{name}" for name in pictures_among(files_inside(below))]

    def leave_out(self, name: str) -> None:
        """Move an image with its captions and mask to where training does not see it.

        Raises:
            UsageError: there is no such image.
            DataError: it cannot be moved.
        """
        self.image(name)
        if not is_inside(self.folder / LEFT_OUT, self.folder):
            raise UsageError(f"{self.folder / LEFT_OUT}: a link out of the folder")
        _move(self.folder, name, self.folder / LEFT_OUT)
        with self._lock:
            del self._images[name]

    def put_back(self, name: str) -> None:
        """Move an image that was left out to where it was.

        Raises:
            UsageError: no such image was left out, or another one has its name by now.
            DataError: it cannot be moved.
        """
        if name not in self.left_out():
            raise UsageError(f"{name}: it was not left out")
        _move(self.folder / LEFT_OUT, name.removeprefix(f"{LEFT_OUT}/"), self.folder)
        self.read()


def _shown(name: str, caption: Caption, *, problem: str, mask: str) -> ShownImage:
    return ShownImage(name, caption.text, caption.source, problem, mask)


def _move(source: Path, name: str, target: Path) -> None:
    """Move a file and those that belong to it, the captions and masks, from one folder to another."""
    above = os.path.dirname(name)
    siblings = [os.path.join(above, file) for file in sorted(os.listdir(source / above))]
    stem = os.path.splitext(name)[0]
    alone = [other for other in pictures_among(siblings) if os.path.splitext(other)[0] == stem] == [name]
    files = (
        [file for file in siblings if file.startswith(f"{stem}.") or file == f"{stem}-masklabel.png"] if alone else []
    )
    if taken := [file for file in (name, *files) if (target / file).exists()]:
        raise UsageError(f"{taken[0]} is there already")
    try:
        (target / above).mkdir(parents=True, exist_ok=True)
        for file in dict.fromkeys((name, *files)):
            os.rename(source / file, target / file)
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from error


def image_size(path: Path) -> tuple[int, int] | None:
    """Width and height of an image, upright, from its header; None where it cannot be read."""
    try:
        with Image.open(path) as image:
            return upright_size(image)
    except READ_ERRORS:
        return None
