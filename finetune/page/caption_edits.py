"""CaptionEdits: captions written next to images, with a journal from which each edit can be undone."""

import contextlib
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from finetune.atomic_io import each_json_line, flush_to_disk, is_inside, write_whole
from finetune.data.caption_files import CAPTION_SUFFIXES, CaptionFiles, decode_caption
from finetune.data.images import digest_of
from finetune.errors import DataError, FinetuneError, UsageError

JOURNAL = ".caption-edits.jsonl"
"""In the folder of images: each change of a file, with what it held before. Hidden, so training does not see it."""

NO_FILE = ""
"""Version of a caption file that does not exist."""

TagAction = Literal["add first", "add last", "remove", "replace"]
"""What is done to the tags of a caption, which commas or line breaks separate."""


class ConflictError(FinetuneError):
    """A caption file has changed since it was read."""


@dataclass(frozen=True)
class CaptionText:
    """The text of a caption file."""

    file: str
    """Path relative to the folder of images; where the first text of an image will be written, if it has none."""
    text: str
    version: str
    """Digest of its bytes; `NO_FILE` where there is no file."""


@dataclass(frozen=True)
class _Change:
    """One file of an edit. Texts hold bytes that are not UTF-8 as lone surrogates (PEP 383)."""

    edit: str
    time: float
    file: str
    before: str | None
    """None: there was no file."""
    after: str | None
    undoes: str = ""
    """The edit that this one undoes."""


class CaptionEdits:
    """Edits of the caption files in a folder of images.

    Args:
        folder: of images; links out of it are not followed.
        otherwise: image -> what a metadata file says of it, which holds until it has a caption file.
    """

    def __init__(self, folder: Path, otherwise: Callable[[str], str] = lambda picture: "") -> None:
        self.folder, self._otherwise = folder, otherwise
        self._lock = threading.Lock()

    def read(self, picture: str) -> CaptionText:
        """The file that holds the caption of an image: NAME.txt, else NAME.caption, or NAME.txt to be made.

        Raises:
            DataError: it cannot be read or is not UTF-8.
        """
        return self._read(picture, self._files([picture]))

    def _files(self, pictures: Sequence[str]) -> CaptionFiles:
        """The caption files in the folders of these images."""
        names = []
        for above in dict.fromkeys(os.path.dirname(picture) for picture in pictures):
            try:
                siblings = os.listdir(self.folder / above)
            except OSError as error:
                raise DataError(f"{self.folder / above}: {error.strerror}") from error
            names += [os.path.join(above, name) for name in siblings if name.lower().endswith(CAPTION_SUFFIXES)]
        return CaptionFiles(sorted(names))

    def _read(self, picture: str, caption_files: CaptionFiles) -> CaptionText:
        files = caption_files.of(picture)
        texts = [self._caption(files[suffix]) for suffix in CAPTION_SUFFIXES if suffix in files]
        if written := [text for text in texts if text.text.strip()]:
            return written[0]
        new = CaptionText(os.path.splitext(picture)[0] + CAPTION_SUFFIXES[0], "", NO_FILE)
        return replace((texts or [new])[0], text=self._otherwise(picture))

    def _caption(self, file: str) -> CaptionText:
        content = self._bytes(file)
        try:
            return CaptionText(file, decode_caption(content or b""), digest_of(content or b""))
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8 at byte {error.start}; save it as UTF-8") from error

    def _bytes(self, file: str) -> bytes | None:
        path = self.folder / file
        if not is_inside(path, self.folder):
            raise DataError(f"{file}: a link out of the folder")
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(f"{file}: {error.strerror}") from error

    def write(self, picture: str, text: str, *, version: str) -> CaptionText:
        """Write the caption of an image, UTF-8.

        Args:
            picture: path relative to the folder.
            text: of the caption file.
            version: that the text was edited from.

        Raises:
            ConflictError: the file has another version by now.
            DataError: it cannot be read or written.
        """
        with self._lock:
            now = self.read(picture)
            if now.version != version:
                raise ConflictError(f"{now.file} was changed by another program or tab")
            if text != now.text:
                self._apply([self._change(secrets.token_hex(4), now.file, text)])
            return self.read(picture)

    def edit_tags(self, pictures: Sequence[str], action: TagAction, tag: str, new: str = "") -> int:
        """Add, remove or replace a tag of several captions, as one edit.

        Args:
            pictures: paths relative to the folder.
            action: what to do.
            tag: the tag.
            new: what replaces it.

        Returns:
            The number of files that were changed.

        Raises:
            UsageError: a tag is empty.
            DataError: a file cannot be read or written; those before it are changed, and can be undone.
        """
        tag, new = tag.strip(), new.strip()
        if not tag or (action == "replace" and not new):
            raise UsageError("tag: expected a text")
        edited = _TAG_EDITS[action]
        with self._lock:
            edit = secrets.token_hex(4)
            files = self._files(pictures)
            captions = dict.fromkeys(self._read(picture, files) for picture in pictures)
            texts = [(caption, edited(caption.text, tag, new)) for caption in captions]
            changes = [self._change(edit, caption.file, text) for caption, text in texts if text != caption.text]
            self._apply(changes)
        return len(changes)

    def _change(self, edit: str, file: str, text: str) -> _Change:
        content = self._bytes(file)
        before = None if content is None else content.decode("utf-8", "surrogateescape")
        return _Change(edit, time.time(), file, before, text)

    def _apply(self, changes: Sequence[_Change]) -> None:
        """Note the changes in the journal, then make them."""
        if not changes:
            return
        journal = self.folder / JOURNAL
        if not is_inside(journal, self.folder):
            raise DataError(f"{journal}: a link out of the folder")
        try:
            with journal.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(change)) + "\n" for change in changes)
            flush_to_disk(journal)
            for change in changes:
                path = self.folder / change.file
                if change.after is None:
                    path.unlink(missing_ok=True)
                else:
                    write_whole(path, change.after.encode("utf-8", "surrogateescape"))
        except OSError as error:
            raise DataError(
                f"{error.filename or self.folder}: {error.strerror}; what was changed before can be undone"
            ) from error

    def _undoable(self) -> list[_Change]:
        changes: dict[str, list[_Change]] = {}
        with contextlib.suppress(OSError, ValueError):  # a journal that was edited by hand: nothing can be undone
            for line in each_json_line(self.folder / JOURNAL):
                change = _Change(**line)
                changes.setdefault(change.edit, []).append(change)
                changes.pop(change.undoes, None)
        left = [some for some in changes.values() if not some[0].undoes]
        return left[-1] if left else []

    def undo(self) -> int:
        """Take back the last edit that was not taken back.

        Returns:
            The number of files that hold again what they held before.

        Raises:
            UsageError: there is no edit.
            ConflictError: one of its files was changed since; nothing is undone.
            DataError: a file cannot be written.
        """
        with self._lock:
            changes = self._undoable()
            if not changes:
                raise UsageError("undo: no caption was edited here")
            edit = secrets.token_hex(4)
            back = []
            for change in changes:
                content = self._bytes(change.file)
                now = None if content is None else content.decode("utf-8", "surrogateescape")
                if now not in (change.after, change.before):  # the latter where writing it had failed
                    raise ConflictError(f"{change.file} was changed since; nothing is undone")
                back.append(_Change(edit, time.time(), change.file, now, change.before, undoes=change.edit))
            self._apply(back)
        return len(back)


def tags_of(caption: str) -> list[str]:
    """The tags of a caption, in order: what commas or line breaks separate."""
    return [tag for part in re.split(r"[,\n]", caption) if (tag := part.strip())]


def _add_first(text: str, tag: str, new: str) -> str:
    if tag in tags_of(text):
        return text
    return f"{tag}, {text.lstrip()}" if text.strip() else tag


def _add_last(text: str, tag: str, new: str) -> str:
    if tag in tags_of(text):
        return text
    body = text.rstrip().removesuffix(",")
    return f"{body}, {tag}" if body else tag


def _remove(text: str, tag: str, new: str) -> str:
    return _without(text, tag, "")


def _replace(text: str, tag: str, new: str) -> str:
    return _without(text, tag, "" if new in tags_of(text) else new)


def _without(text: str, tag: str, instead: str) -> str:
    """The text with `instead` in place of the first such tag, and without the others and their separators."""
    parts = re.split(r"([,\n])", text)
    kept: list[str] = []  # tags and separators in turn
    for at in range(0, len(parts), 2):
        part, separator = parts[at], parts[at - 1] if at else ""
        if part.strip() == tag:
            if not instead:
                continue
            part, instead = part.replace(tag, instead), ""
        kept += [separator, part] if kept else [part.lstrip() if at else part]
    return "".join(kept)


_TAG_EDITS: dict[TagAction, Callable[[str, str, str], str]] = {
    "add first": _add_first,
    "add last": _add_last,
    "remove": _remove,
    "replace": _replace,
}
