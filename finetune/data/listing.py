"""File listings: names relative to a folder, with forward slashes. Plain strings, as there may be millions."""

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from finetune.errors import DataError

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
"""Endings (in any case) of the files that are read as pictures."""

SHARD_SUFFIX = ".tar"
"""Ending of the shards of WebDataset."""

_FOREIGN_SUFFIXES = (".heic", ".heif", ".jxl")
"""Pictures that Pillow cannot read by itself: found all the same, so that they are named as unreadable."""

_ALL_SUFFIXES = PICTURE_SUFFIXES + _FOREIGN_SUFFIXES


def list_files(folder: Path) -> list[str]:
    """Every file below `folder`, at any depth, sorted; hidden ones (leading dot) left out.

    Raises:
        DataError: a folder cannot be listed.
    """
    return sorted(_walk(str(folder), "", frozenset()))


def _walk(folder: str, called: str, above: frozenset[str]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in above:  # a link back to where we came from
        return
    try:
        with os.scandir(folder) as scanned:
            entries = list(scanned)
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        # A link may lead in a circle, for which is_dir would raise.
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            yield from _walk(entry.path, f"{called}{entry.name}/", above | {real})
        else:
            yield called + entry.name


def composed(name: str) -> str:
    """A name as most systems spell it: é in one code point, where macOS may have two."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def links_out(folder: Path) -> list[str]:
    """The links below a folder that lead out of it, as `list_files` names files; those below such a link are left out.

    Raises:
        DataError: a folder cannot be listed.
    """
    root = os.path.realpath(folder)
    links: list[str] = []
    for place, folders, files in os.walk(folder, onerror=_refuse):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            if os.path.islink(path) and not _is_below(os.path.realpath(path), root):
                links.append(os.path.relpath(path, folder))
    return sorted(links)


def files_inside(folder: Path) -> list[str]:
    """As `list_files`, without what only a link out of the folder leads to.

    Raises:
        DataError: a folder cannot be listed.
    """
    links = links_out(folder)
    below = tuple(f"{link}/" for link in links)
    return [file for file in list_files(folder) if file not in links and not file.startswith(below)]


def _is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename}: {error.strerror}") from error


def ending(name: str) -> str:
    """Return the suffix of a file's name in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


def is_picture(name: str) -> bool:
    """Whether its name says that it is one."""
    return name.lower().endswith(_ALL_SUFFIXES)
