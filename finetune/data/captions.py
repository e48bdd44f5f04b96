"""Captions: where each comes from, and the trigger word."""

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from finetune.data.caption_files import CAPTION_SUFFIXES, CaptionFiles, read_caption
from finetune.data.listing import composed
from finetune.errors import DataError
from finetune.text import pluralize

TRIGGER = "[trigger]"
"""Stands for the trigger word in a caption."""

COLUMN = "text"
"""Of a metadata file, that holds the captions unless another one is named."""

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_OTHER_NAMES = {"caption", "captions", "prompt", "prompts", "description", "txt"}


class Caption(NamedTuple):
    """A caption without line breaks, and its source."""

    text: str
    source: str
    """txt, caption, metadata, column, filename, the dataset, prompt or folder; none, with an empty text, where there is
    none."""
    others: tuple[str, ...] = ()
    """More texts for the same picture; each visit takes one of all."""


class CaptionResult(NamedTuple):
    """What `find_captions` has found."""

    captions: list[Caption]
    """Of each picture."""
    orphans: list[str]
    """Caption files that no picture belongs to."""
    empty: list[str]
    """Caption files beside a picture that say nothing."""
    unreadable: dict[str, str]
    """Pictures whose caption file is not UTF-8 -> what is wrong."""
    files: int
    """How many files captions were read from."""
    passed_over: list[str]
    """What lies there and looks like captions, but was not read."""


Texts = str | Sequence[str] | None
"""What a source says of a picture: a text, several of them, or nothing."""


Lines = Literal["joined", "chosen", "first"]
"""What the lines of a text are: one caption, captions that visits take turns with, or one and what is left out."""

CaptionSource = Literal["files", "filename", "prompt"]
"""Where captions come from: files or columns; the names of the images; or the prompt, for all images alike."""


def first_caption(candidates: Iterable[tuple[str, Texts]], *, lines: Lines = "joined") -> Caption:
    """The first of (source, texts) that says something; line breaks become single spaces.

    Args:
        candidates: in the order of precedence.
        lines: what the lines of each text are.
    """
    for source, given in candidates:
        texts = [given] if isinstance(given, str) else given or []
        if lines == "chosen":
            texts = [line for text in texts for line in text.splitlines()]
        elif lines == "first":
            texts = [next((line for line in text.splitlines() if line.strip()), "") for text in texts]
        if captions := [line for text in texts if (line := _without_breaks(text))]:
            return Caption(captions[0], source, tuple(captions[1:]))
    return Caption("", "none")


def _without_breaks(text: str) -> str:
    lines = (line.strip() for line in text.splitlines())
    return " ".join(line for line in lines if line)


def find_captions(
    folder: Path,
    files: Sequence[str],
    pictures: Sequence[str],
    prompt: str | None = None,
    subjects: Mapping[str, str] | None = None,
    lines: Lines = "joined",
    metadata: Mapping[str, Texts] | None = None,
    column: str = COLUMN,
    source: CaptionSource = "files",
) -> CaptionResult:
    """The caption of each picture.

    In order of precedence: NAME.txt beside the picture; NAME.caption beside it; metadata.parquet, metadata.jsonl or
    metadata.csv in its folder or one above (the nearest to the picture wins, and these in this order); `prompt`; its
    subject.
    What is empty counts as absent. With another `source` than "files", caption files are not read: the name of the
    picture is the caption (see `caption_of_name`), or `prompt` alone.

    Args:
        folder: what the names are relative to.
        files: all that there are, the pictures among them.
        pictures: those that want a caption.
        prompt: caption of those that have none of their own.
        subjects: what the folders' names say of pictures.
        lines: what the lines of a caption file are.
        metadata: what `read_metadata` has found; None: it is asked.
        column: of the metadata files, that holds the captions.
        source: where the captions come from.

    Raises:
        DataError: a metadata file is not UTF-8 or is malformed, or it names a file that is no picture.
    """
    if source != "files":
        return _captions_without_files(files, pictures, prompt, subjects or {}, source)
    sidecars = CaptionFiles(files)
    unread: list[str] = []
    metadata = read_metadata(folder, files, pictures, column, unread) if metadata is None else metadata

    captions, empty, unreadable, stems = list[Caption](), dict[str, None](), dict[str, str](), set[str]()
    for picture in pictures:
        files_by_suffix = sidecars.of(picture)
        stems.update(os.path.splitext(file)[0] for file in files_by_suffix.values())
        texts = _read_sidecars(folder, picture, files_by_suffix, unreadable) if files_by_suffix else {}
        empty |= {files_by_suffix[suffix]: None for suffix, text in texts.items() if not text.strip()}
        candidates = (
            (CAPTION_SUFFIXES[0][1:], texts.get(CAPTION_SUFFIXES[0])),
            (CAPTION_SUFFIXES[1][1:], texts.get(CAPTION_SUFFIXES[1])),
            ("metadata", metadata.get(picture)),
            ("prompt", prompt),
            ("folder", (subjects or {}).get(picture)),
        )
        captions.append(first_caption(candidates, lines=lines))
    by_stem = sidecars.by_stem
    orphans = [file for stem, some in by_stem.items() if stem not in stems for file in some.values()]
    read = sum(map(len, by_stem.values())) - len(orphans) + sum(map(is_metadata, files))
    orphans += sidecars.doubled
    unread += _unread_beside(files, pictures, orphans)
    return CaptionResult(
        captions=captions, orphans=orphans, empty=list(empty), unreadable=unreadable, files=read, passed_over=unread
    )


def _captions_without_files(
    files: Sequence[str], pictures: Sequence[str], prompt: str | None, subjects: Mapping[str, str], source: str
) -> CaptionResult:
    """The captions where no caption file is read; that they lie there is said."""
    named = source == "filename"
    captions = [
        first_caption(
            (
                ("filename", caption_of_name(picture) if named else None),
                ("prompt", prompt),
                ("folder", subjects.get(picture)),
            )
        )
        for picture in pictures
    ]
    unread = [file for file in files if is_metadata(file) or file.lower().endswith(CAPTION_SUFFIXES)]
    passed_over = [f"{pluralize(len(unread), 'caption file')} (caption_source is {source})"] if unread else []
    return CaptionResult(
        captions=captions, orphans=[], empty=[], unreadable={}, files=len(unread), passed_over=passed_over
    )


def caption_of_name(file: str) -> str:
    """The caption that a file's name is: "a_dog_on_grass_12.jpg" and "a dog on grass (2).jpg" say "a dog on grass"."""
    stem = os.path.splitext(os.path.basename(file))[0]
    return re.sub(r"(_\d+|\s*\(\d+\))$", "", stem).replace("_", " ").strip()


_READ_ELSEWHERE = (".tags", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".cap", ".text", ".md")
"""Endings of files in which other tools keep captions."""


def _unread_beside(files: Sequence[str], pictures: Sequence[str], orphans: Sequence[str]) -> list[str]:
    """Files that look like captions and are none that are read: of another ending, or called otherwise."""
    names = {picture.casefold() for picture in pictures}
    stems = {os.path.splitext(name)[0] for name in names}
    unread: list[str] = []
    for file in files:
        stem, suffix = os.path.splitext(file)
        if is_metadata(file):
            continue
        doubled = stem.casefold() in names and suffix.lower() in (*CAPTION_SUFFIXES, *_READ_ELSEWHERE)
        belongs = stem.casefold() in stems and suffix.lower() in _READ_ELSEWHERE
        table = suffix.lower() in (".json", ".jsonl", ".csv", ".tsv")
        if doubled or belongs or table:
            unread.append(file)
    spelt = [file for file in orphans if os.path.splitext(file)[0].casefold() in stems]
    return [*unread, *(f"{file} (in other letters than its image)" for file in spelt)]


def is_metadata(file: str) -> bool:
    """Whether a file's name says that it holds captions of many pictures."""
    return file.endswith(METADATA) and os.path.basename(file) in METADATA


def _read_sidecars(
    folder: Path, picture: str, sidecars: Mapping[str, str], unreadable: dict[str, str]
) -> dict[str, str]:
    """The texts of the files beside a picture, by their endings; what is not UTF-8 is noted as unreadable."""
    texts: dict[str, str] = {}
    for suffix in CAPTION_SUFFIXES:
        try:
            if suffix in sidecars:
                texts[suffix] = read_caption(f"{folder}/{sidecars[suffix]}")
        except UnicodeDecodeError as error:
            name = os.path.basename(sidecars[suffix])
            unreadable[picture] = f"{name} is not UTF-8 at byte {error.start}; save it as UTF-8"
    return texts


def with_trigger(caption: str, trigger: str | None) -> str:
    """`caption` with the trigger word: in place of every [trigger], else in front, unless it says the word itself.

    Without a trigger word, [trigger] is taken out together with the separator it leaves behind.
    """
    if trigger:
        if TRIGGER in caption:
            return caption.replace(TRIGGER, trigger)
        mention = re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption)
        return caption if mention else f"{trigger} {caption}".strip()
    if TRIGGER not in caption:
        return caption
    # In a list ("tall, [trigger], red" or "tall, [trigger]") the separator before it goes too.
    rest = re.sub(r"[,;]?\s*\[trigger\](?=\s*(?:[,;]|$))|\s*\[trigger\]", "", caption)
    return rest.lstrip(" ,;:.-").rstrip()


def placed_trigger(caption: str) -> str | None:
    """A caption that says "of a dog" with [trigger] where it reads well, "of [trigger] dog"; None for all others."""
    placed = re.sub(r"\bof (an?|the|my) ", f"of {TRIGGER} ", caption, count=1)
    return placed if placed != caption else None


def _read_text(path: Path) -> str:
    try:
        return read_caption(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error


def read_metadata(
    folder: Path,
    files: Sequence[str],
    pictures: Sequence[str],
    column: str = COLUMN,
    unread: list[str] | None = None,
) -> dict[str, Texts]:
    """Picture -> what the metadata files say of it, in all folders: files further down win, and later names.

    Args:
        folder: what the names are relative to.
        files: all that there are.
        pictures: those that may be named; with slashes or backslashes, composed or decomposed.
        column: that holds the captions.
        unread: gets a line for each file that has other columns, but not this one.

    Raises:
        DataError: a file is not UTF-8 or is malformed, or names what is no picture.
    """
    tables = [folder / file for file in files if is_metadata(file)]
    by_place = {os.path.normpath(folder / picture): picture for picture in pictures} if tables else {}
    by_place |= {composed(place): picture for place, picture in by_place.items() if not place.isascii()}
    captions: dict[str, Texts] = {}
    for file in sorted(tables, key=lambda file: (len(file.parts), file)):
        lines: dict[str, int] = {}
        others: dict[str, None] = {}
        for line, name, text, columns in _ROWS[file.suffix](file, column):
            others |= dict.fromkeys(columns)
            place = composed(os.path.normpath(file.parent / name))
            if place not in by_place and "\\" in name:
                place = composed(os.path.normpath(file.parent / name.replace("\\", "/")))
            if place not in by_place:
                wrong = "is not an image in a supported format" if os.path.exists(place) else "does not exist"
                raise DataError(f"{file}, line {line}: {name} {wrong}")
            picture = by_place[place]
            if picture in lines:
                raise DataError(f"{file}, line {line}: {name} was named before, in line {lines[picture]}")
            lines[picture] = line
            captions[picture] = text or captions.get(picture)
        others.pop("file_name", None)
        if unread is not None and column not in others and others:
            columns = ", ".join(others)
            unread.append(f"{file.relative_to(folder)}: {columns} (--caption_column takes another one than {column})")
    return captions


def _refuse_other_names(where: str, names: Iterable[str], column: str) -> None:
    """Raise DataError where captions stand under another name than text: they would be lost in silence."""
    if column == COLUMN and column not in names and (other := sorted(set(names) & _OTHER_NAMES)):
        raise DataError(
            f"{where}: captions belong in the column text, not {other[0]}; or give --caption_column {other[0]}"
        )


_Rows = Iterator[tuple[int, str, Texts, Sequence[str]]]
"""Line number, file name, captions and columns of each row."""


def _json_rows(file: Path, column: str) -> _Rows:
    """The rows of a metadata.jsonl."""
    for number, line in enumerate(_read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{file}, line {number}: not JSON ({error.msg})") from error
        yield number, *_name_and_text(f"{file}, line {number}", row, column), list(row)


def _parquet_rows(file: Path, column: str) -> _Rows:
    """Read the rows of a metadata.parquet."""
    from pyarrow import ArrowException, parquet  # late: only who has such a file waits for it

    try:
        rows = parquet.read_table(file).to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"{file}: not Parquet ({str(error).splitlines()[0]})") from error
    for number, row in enumerate(rows, start=1):
        yield number, *_name_and_text(f"{file}, line {number}", row, column), list(row)


def _name_and_text(where: str, row: Any, column: str) -> tuple[str, Texts]:
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise DataError(f'{where}: no file_name; a row is {{"file_name": "a.png", "text": "..."}}')
    text = row.get(column)
    _refuse_other_names(where, row, column)
    several = isinstance(text, list) and all(isinstance(one, str) for one in text)
    if text is not None and not isinstance(text, str) and not several:
        raise DataError(f"{where}: {column} is {text!r}, expected a string or a list of them")
    return row["file_name"], text


def _csv_rows(file: Path, column: str) -> _Rows:
    """Read the rows of a metadata.csv."""
    reader = csv.DictReader(io.StringIO(_read_text(file)), strict=True)
    try:
        if "file_name" not in (reader.fieldnames or ()):
            raise DataError(f"{file}, line 1: no column file_name among: {', '.join(reader.fieldnames or ())}")
        _refuse_other_names(f"{file}, line 1", reader.fieldnames or (), column)
        for row in reader:
            if None in row:
                raise DataError(f"{file}, line {reader.line_num}: more fields than columns; quote text with commas")
            if not row["file_name"]:
                raise DataError(f"{file}, line {reader.line_num}: file_name is empty")
            yield reader.line_num, row["file_name"], row.get(column), reader.fieldnames or ()
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.line_num + 1}: not CSV ({error})") from error


_ROWS: dict[str, Callable[[Path, str], _Rows]] = {
    ".csv": _csv_rows,
    ".jsonl": _json_rows,
    ".parquet": _parquet_rows,
}
