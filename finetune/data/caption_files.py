"""Caption files: which files next to an image hold its caption, and their text."""

import codecs
import os
from collections.abc import Iterable
from pathlib import Path

from finetune.data.listing import composed
from finetune.errors import DataError

CAPTION_SUFFIXES = (".txt", ".caption")
"""Endings, in any case, of the files that hold captions, in the order of precedence."""


class CaptionFiles:
    """The caption files of a folder by the images they belong to.

    Args:
        files: all files of the folder, as `list_files` names them.
    """

    def __init__(self, files: Iterable[str]) -> None:
        self.by_stem: dict[str, dict[str, str]] = {}
        """Name without ending -> ending -> file."""
        self.doubled: list[str] = []
        """Files that another one precedes which differs in case alone: cat.TXT next to cat.txt."""
        for file in files:
            stem, suffix = os.path.splitext(file)
            if suffix.lower() in CAPTION_SUFFIXES:
                some = self.by_stem.setdefault(stem, {})
                self.doubled += [file] if suffix.lower() in some else []
                some.setdefault(suffix.lower(), file)
        self._by_composed = {composed(stem): some for stem, some in self.by_stem.items() if not stem.isascii()}

    def of(self, picture: str) -> dict[str, str]:
        """The caption files of an image by their endings in lower case."""
        stem = os.path.splitext(picture)[0]
        return self.by_stem.get(stem) or (self._by_composed.get(composed(stem), {}) if self._by_composed else {})


def read_caption(path: str | Path) -> str:
    """The text of a file: UTF-8, or UTF-16 with or without a byte order mark. Raises UnicodeDecodeError, DataError."""
    try:
        with open(path, "rb", buffering=0) as file:  # small files by the million
            content = file.read()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    return decode_caption(content)


def decode_caption(content: bytes) -> str:
    """The text of a file's bytes, see `read_caption`. Raises UnicodeDecodeError."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    for encoding, high in (("utf-16-le", content[1::2]), ("utf-16-be", content[::2])):
        if 2 * high.count(0) > len(high):  # as in no text of UTF-8: UTF-16 without a mark
            return content.decode(encoding)
    return content.decode("utf-8-sig")
