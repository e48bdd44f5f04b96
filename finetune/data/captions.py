"""Where a picture's caption comes from, and the trigger word in it."""

import codecs
import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from finetune.data.images import list_files
from finetune.errors import DataError
from finetune.wording import counted, listed

TRIGGER = "[trigger]"
"""Stands for the trigger word in a caption."""

CAPTION_SUFFIXES = (".txt", ".caption")
METADATA = ("metadata.csv", "metadata.jsonl")
_OTHER_NAMES = {"caption", "captions", "prompt", "prompts", "description", "txt"}


class Caption(NamedTuple):
    """A caption without line breaks, and its source."""

    text: str
    source: str
    """txt, caption, metadata, column, the dataset or prompt; none, with an empty text, where there is no caption."""


class FoundCaptions(NamedTuple):
    """What `find_captions` has found."""

    captions: list[Caption]
    """Of each picture."""
    orphans: list[Path]
    """Caption files that no picture belongs to."""
    empty: list[Path]
    """Caption files beside a picture that say nothing."""


def first_caption(candidates: Iterable[tuple[str, str | None]]) -> Caption:
    """The first of (source, text) whose text says something; line breaks become single spaces."""
    for source, text in candidates:
        lines = (line.strip() for line in (text or "").splitlines())
        if joined := " ".join(line for line in lines if line):
            return Caption(joined, source)
    return Caption("", "none")


def find_captions(folder: Path, pictures: Sequence[Path], prompt: str | None = None) -> FoundCaptions:
    """The caption of each picture below `folder`.

    In order of precedence: NAME.txt beside the picture; NAME.caption beside it; metadata.jsonl or metadata.csv in the
    folder or in any folder below it (the nearest to the picture wins, jsonl before csv); `prompt`.
    What is empty counts as absent.

    Raises:
        DataError: caption files are not UTF-8 (all are named), a metadata file is not or is malformed, or it names a
            file that is no picture.
    """
    files = list_files(folder)
    sidecars = {
        (file.with_suffix(""), file.suffix.lower()): file for file in files if file.suffix.lower() in CAPTION_SUFFIXES
    }
    metadata = _read_metadata([file for file in files if file.name in METADATA], pictures)

    unreadable: list[Path] = []
    empty: list[Path] = []

    def beside(picture: Path, suffix: str) -> str | None:
        file = sidecars.get((picture.with_suffix(""), suffix))
        if file is None:
            return None
        try:
            text = _decoded(file)
        except UnicodeDecodeError:
            unreadable.append(file)
            return None
        if not text.strip():
            empty.append(file)
        return text

    captions = [
        first_caption(
            (
                ("txt", beside(picture, ".txt")),
                ("caption", beside(picture, ".caption")),
                ("metadata", metadata.get(picture)),
                ("prompt", prompt),
            )
        )
        for picture in pictures
    ]
    if unreadable:
        names = listed([str(file.relative_to(folder)) for file in unreadable], most=20)
        raise DataError(f"{folder}: not UTF-8 {counted(len(unreadable), 'caption file')}: {names}; save as UTF-8")
    stems = {picture.with_suffix("") for picture in pictures}
    orphans = [file for (stem, _), file in sidecars.items() if stem not in stems]
    return FoundCaptions(captions, orphans, empty)


def with_trigger(caption: str, trigger: str | None) -> str:
    """`caption` with the trigger word: in place of every [trigger], else in front.

    Without a trigger word, [trigger] is taken out together with the separator it leaves behind.
    """
    if trigger:
        return caption.replace(TRIGGER, trigger) if TRIGGER in caption else f"{trigger} {caption}".strip()
    if TRIGGER not in caption:
        return caption
    # In a list ("tall, [trigger], red" or "tall, [trigger]") the separator before it goes too.
    rest = re.sub(r"[,;]?\s*\[trigger\](?=\s*(?:[,;]|$))|\s*\[trigger\]", "", caption)
    return rest.lstrip(" ,;:.-").rstrip()


def placed_trigger(caption: str) -> str | None:
    """A caption that says "of a dog" with [trigger] where it reads well, "of [trigger] dog"; None for all others."""
    placed = re.sub(r"\bof (an?|the|my) ", f"of {TRIGGER} ", caption, count=1)
    return placed if placed != caption else None


def _decoded(path: Path) -> str:
    """The text of a file: UTF-8, or UTF-16 where it begins with a byte order mark. Raises UnicodeDecodeError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if wide else "utf-8-sig")


def _read_text(path: Path) -> str:
    try:
        return _decoded(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error


def _read_metadata(files: list[Path], pictures: Sequence[Path]) -> dict[Path, str | None]:
    """Picture -> caption. What is read later wins: files further down, and by their names jsonl after csv."""
    by_place = {os.path.normpath(picture): picture for picture in pictures}
    captions: dict[Path, str | None] = {}
    for file in sorted(files, key=lambda file: (len(file.parts), file)):
        lines: dict[Path, int] = {}
        for line, name, text in _json_rows(file) if file.suffix == ".jsonl" else _csv_rows(file):
            place = os.path.normpath(file.parent / name)
            if place not in by_place:
                wrong = "is no picture that is read" if os.path.exists(place) else "does not exist"
                raise DataError(f"{file}, line {line}: {name} {wrong}")
            picture = by_place[place]
            if picture in lines:
                raise DataError(f"{file}, line {line}: {name} was named before, in line {lines[picture]}")
            lines[picture] = line
            captions[picture] = text or captions.get(picture)
    return captions


def _refuse_other_names(where: str, names: Iterable[str]) -> None:
    """Raise DataError where captions stand under another name than text: they would be lost in silence."""
    if "text" not in names and (other := sorted(set(names) & _OTHER_NAMES)):
        raise DataError(f"{where}: captions go under text, not {other[0]}")


def _json_rows(file: Path) -> Iterator[tuple[int, str, str | None]]:
    """Line number, file name and caption of each row of a metadata.jsonl."""
    for number, line in enumerate(_read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{file}, line {number}: not JSON ({error.msg})") from error
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise DataError(f'{file}, line {number}: no file_name; a row is {{"file_name": "a.png", "text": "..."}}')
        text = row.get("text")
        _refuse_other_names(f"{file}, line {number}", row)
        if text is not None and not isinstance(text, str):
            raise DataError(f"{file}, line {number}: text is {text!r}, allowed is a string")
        yield number, row["file_name"], text


def _csv_rows(file: Path) -> Iterator[tuple[int, str, str | None]]:
    """Line number, file name and caption of each row of a metadata.csv."""
    reader = csv.DictReader(io.StringIO(_read_text(file)), strict=True)
    try:
        if "file_name" not in (reader.fieldnames or ()):
            raise DataError(f"{file}, line 1: no column file_name among: {', '.join(reader.fieldnames or ())}")
        _refuse_other_names(f"{file}, line 1", reader.fieldnames or ())
        for row in reader:
            if None in row:
                raise DataError(f"{file}, line {reader.line_num}: more fields than columns; quote text with commas")
            if not row["file_name"]:
                raise DataError(f"{file}, line {reader.line_num}: file_name is empty")
            yield reader.line_num, row["file_name"], row.get("text")
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.line_num + 1}: not CSV ({error})") from error
