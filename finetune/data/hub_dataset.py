"""Datasets on the Hugging Face hub, and other iterable ones, whose rows are written to disk and read from there."""

import fcntl
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from tqdm import tqdm

from finetune.errors import DataError, RunError, UsageError, first_line, hub_errors
from finetune.seeding import wide_fold

if TYPE_CHECKING:
    import datasets

IMAGE_COLUMN, CAPTION_COLUMN = "image", "text"
"""Unless others are named; there need be no column of captions under that name."""

_ROWS, _BYTES = 1000, 256 * 2**20
"""Of a chunk, which is held in memory until it is written: at most so many, or as soon as it is so large."""

_STATE, WHOLE = "stream.json", "whole"
"""Where the stream goes on after a chunk; and what lies beside the chunks when it has ended."""


def kept(
    opened: "Callable[[], datasets.IterableDataset] | None",
    folder: Path,
    image_column: str,
    caption_column: str,
    count: int | None,
    *,
    from_hub: bool = False,
) -> "datasets.Dataset":
    """The rows of a stream, or the first of them, as a table on the disk: pictures as they came, and captions.

    What is in the folder already is not asked for again; a stream that breaks off goes on after its last chunk of rows.

    Args:
        opened: opens the stream, which comes in the same order each time; None: it cannot be asked.
        folder: of this stream alone; it need not exist.
        image_column: its pictures.
        caption_column: its captions.
        count: how many rows are wanted; None: all.
        from_hub: whoever wrote the rows may name files on the hub, and none elsewhere.

    Raises:
        DataError: a row holds something else, or the stream has broken off.
        RunError: the folder cannot be written.
    """
    import datasets

    with _alone(folder):
        chunks = sorted(folder.glob("chunk-*"))
        there = sum(len(datasets.load_from_disk(chunk)) for chunk in chunks)
        if opened is not None and (count is None or there < count) and not (folder / WHOLE).exists():
            rows = _undecoded(opened(), image_column)
            if chunks:
                rows.load_state_dict(json.loads((chunks[-1] / _STATE).read_text(encoding="utf-8")))
            _fill(
                rows,
                folder=folder,
                image_column=image_column,
                caption_column=caption_column,
                there=there,
                count=count,
                from_hub=from_hub,
            )
            chunks = sorted(folder.glob("chunk-*"))
    if not chunks:
        raise DataError("the dataset has no rows")
    tables: Any = [datasets.load_from_disk(chunk) for chunk in chunks]
    table = datasets.concatenate_datasets(tables)
    return table if count is None or count >= len(table) else table.select(range(count))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lock the folder, so that another run that fills it waits and finds what this one has kept."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fill(
    rows: "datasets.IterableDataset",
    folder: Path,
    image_column: str,
    caption_column: str,
    there: int,
    count: int | None,
    *,
    from_hub: bool,
) -> None:
    """Write chunks of the rows to come, `there` of which were written before."""
    chunk, size, number = list[dict[str, Any]](), 0, there
    arriving = islice(_arriving(rows, there), None if count is None else count - there)  # which asks for none in vain
    for row in tqdm(arriving, "keeping rows", count, initial=there, unit="", delay=3, leave=False, disable=None):
        picture = _picture(row, number, image_column, from_hub=from_hub)
        chunk.append({image_column: picture, caption_column: _caption(row, number, caption_column)})
        size += len(picture["bytes"]) if picture and picture["bytes"] else 0
        number += 1
        if len(chunk) == _ROWS or size >= _BYTES:
            _write(chunk, folder, rows.state_dict(), image_column, caption_column)
            chunk, size = [], 0
    if chunk:
        _write(chunk, folder, rows.state_dict(), image_column, caption_column)
    if count is None or number < count:
        (folder / WHOLE).touch()


def _undecoded(rows: "datasets.IterableDataset", column: str) -> "datasets.IterableDataset":
    """Return the stream with pictures as bytes, undecoded: encoding them again would change them."""
    import datasets

    if rows.features is None or not isinstance(rows.features.get(column), datasets.Image):
        return rows
    return rows.cast_column(column, datasets.Image(decode=False))


def _arriving(rows: "datasets.IterableDataset", number: int) -> Iterator[Mapping[str, Any]]:
    from datasets.exceptions import DatasetsError

    try:
        for row in rows:
            yield row
            number += 1
    except (*hub_errors(), OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(
            f"the dataset stream failed at row {number}: {first_line(error)}; run the same command to continue"
        ) from error


_ON_THE_HUB = ("hf://", "https://huggingface.co/")


def _picture(row: Mapping[str, Any], number: int, column: str, *, from_hub: bool) -> dict[str, Any] | None:
    """Encoded bytes, whatever the row holds of a picture."""
    import datasets
    import fsspec

    if column not in row:
        raise DataError(f"--image_column {column}: no such column; there are {', '.join(row)}")
    value = _losslessly(row[column]) if isinstance(row[column], Image.Image) else row[column]
    if value is None:
        return None
    try:
        picture = datasets.Image().encode_example(value)
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"--image_column {column}: row {number} holds {type(value).__name__}, no image") from error
    content, path = picture.get("bytes"), picture.get("path")
    if content is None and path:
        if from_hub and not path.rpartition("::")[2].startswith(_ON_THE_HUB):
            raise DataError(f"--image_column {column}: row {number} names a file outside of the hub: {path}")
        try:
            with fsspec.open(path, "rb") as file:  # on the hub, or inside of an archive there
                content = file.read()  # pyright: ignore[reportAttributeAccessIssue]
        except FileNotFoundError:  # the row is one without a picture
            pass
        except (*hub_errors(), OSError, ValueError) as error:
            raise DataError(f"row {number}: {path}: {first_line(error)}; run the same command to continue") from error
    return {"bytes": content, "path": None}


def _losslessly(image: Image.Image) -> bytes:
    """A picture that comes decoded as a file, with its orientation and colour profile."""
    file = io.BytesIO()
    supported = image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")
    image.save(file, "PNG" if supported else "TIFF", exif=image.getexif())
    return file.getvalue()


def _caption(row: Mapping[str, Any], number: int, column: str) -> str | list[str] | None:
    """A caption, or several."""
    if column not in row and column != CAPTION_COLUMN:
        raise DataError(f"--caption_column {column}: no such column; there are {', '.join(row)}")
    for text in row[column] if isinstance(row.get(column), list) else [row.get(column)]:
        if text is not None and not isinstance(text, str):
            raise DataError(f"--caption_column {column}: row {number} holds {text!r}, expected text")
    return row.get(column)


def _write(
    chunk: list[dict[str, Any]], folder: Path, state: Mapping[str, Any], image_column: str, caption_column: str
) -> None:
    """Keep rows and where the stream goes on after them, whole or not at all."""
    import datasets

    text = datasets.Value("string")
    if several := any(isinstance(row[caption_column], list) for row in chunk):
        given = [(row, row[caption_column]) for row in chunk]
        chunk = [row | {caption_column: texts if isinstance(texts, list) else [texts]} for row, texts in given]
    features = {image_column: datasets.Image(decode=False), caption_column: [text] if several else text}
    number = len(list(folder.glob("chunk-*")))
    part = folder / f".chunk-{number}-{os.getpid()}.part"
    try:
        datasets.Dataset.from_list(chunk, features=datasets.Features(features)).save_to_disk(part)
        (part / _STATE).write_text(json.dumps(state), encoding="utf-8")
        part.rename(folder / f"chunk-{number:06}")
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def hub_rows(name: str) -> "datasets.Dataset":
    """Split "train" of a dataset on the hub, or in the cache if HF_HUB_OFFLINE is set. Raises as `first_hub_rows`."""
    _revision(name)
    return _loaded(name)


def first_hub_rows(name: str, count: int, folder: Path, image_column: str, caption_column: str) -> "datasets.Dataset":
    """The first rows of that split, without a download of the others; what was kept before is asked for no more.

    Args:
        name: of the dataset.
        count: how many rows are wanted.
        folder: where rows of streams are kept. If HF_HUB_OFFLINE is set, those that came last are taken.
        image_column, caption_column: what is kept of a row.

    Raises:
        UsageError: no dataset can have that name.
        DataError: there is no such dataset, or the hub is out of reach, or a column is absent.
    """
    revision = _revision(name)
    of_dataset = folder / "rows" / wide_fold(name, image_column, caption_column)
    if revision is None:
        newest = max(of_dataset.glob("*"), key=lambda path: path.stat().st_mtime, default=None)
        if newest is None:
            raise DataError(f"--data {name}: HF_HUB_OFFLINE is set, and no rows of it are kept in {folder}")
        rows = kept(None, newest, image_column, caption_column, count)
        if len(rows) < count and not (newest / WHOLE).exists():
            raise DataError(
                f"--data {name}: HF_HUB_OFFLINE is set, and only {len(rows)} rows of it are kept in {folder}"
            )
        return rows
    opened = partial(_loaded, name, streaming=True)
    return kept(opened, of_dataset / revision, image_column, caption_column, count, from_hub=True)


def _revision(name: str) -> str | None:
    """Which version of the dataset the hub has; None: it must not be asked."""
    from huggingface_hub import HfApi, errors

    missing = f"--data {name}: no such folder"
    try:
        # load_dataset would try an unreachable hub for half a minute; this asks once.
        return HfApi().dataset_info(name, timeout=10).sha or "unknown"
    except errors.HFValidationError as error:
        raise UsageError(missing) from error
    except errors.OfflineModeIsEnabled:
        return None
    except errors.RepositoryNotFoundError as error:
        raise DataError(f"{missing}, and no such dataset on the hub (for a private one: hf auth login)") from error
    except hub_errors() as error:
        reason = f"the hub was not reachable ({first_line(error)})"
        raise DataError(f"{missing}, and {reason}; give a local folder of images") from error


def _loaded(name: str, *, streaming: bool = False) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        return datasets.load_dataset(name, split="train", streaming=streaming)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(f"--data {name}: {first_line(error)}") from error
