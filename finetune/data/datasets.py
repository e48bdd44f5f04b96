"""open_dataset: what `--data` names, as a folder of images, tar shards, or a Hugging Face dataset."""

import atexit
import glob
import io
import os
import shutil
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

from finetune.atomic_io import is_inside
from finetune.data.captions import CaptionSource, Lines, Texts, first_caption, is_metadata
from finetune.data.data_source import check_source, is_pattern
from finetune.data.hub_dataset import CAPTION_COLUMN, IMAGE_COLUMN, first_hub_rows, hub_rows, kept
from finetune.data.image_dataset import ImageFileDataset
from finetune.data.image_folder import FolderPart, ImageFolder
from finetune.data.image_index import FileStamp, ImageIndex
from finetune.data.images import PictureFile, Row
from finetune.data.listing import PICTURE_SUFFIXES, SHARD_SUFFIX, ending, list_files
from finetune.data.shards import TarShards, find_shards
from finetune.data.transforms import Preprocess, PreprocessOptions, preprocess_of
from finetune.errors import DataError, UsageError, first_line
from finetune.seeding import wide_fold

if TYPE_CHECKING:
    import datasets

_TABLE_SUFFIXES = (".parquet", ".arrow")


class HuggingFaceDataset(ImageFileDataset):
    """The rows of a `datasets.Dataset` with a column of pictures, and perhaps one of captions.

    Args:
        rows: one split. It is not changed; a format set on it is not used.
        prompt: caption of the rows that have none.
        trigger: word put in place of every [trigger], or in front of each caption.
        transform: how the pictures become squares or the sizes of buckets; or give the arguments of `Preprocess`.
        caption_lines, memory: as for `ImageFolder`.
        caption_source: "files": the column; "prompt": `prompt` for all. Rows have no "filename".
        part: the numbers of the rows to open; None: all.
        inside: folders in which files must lie that rows name, relative to the first one; None: anywhere, as in a
            dataset of your own making.
        image_column: a column of pictures: `datasets.Image`, encoded bytes, or paths.
        caption_column: a column of strings, or of lists of them, of which each visit takes one. The default one may be
            absent.

    An id is the number of the row from 0: "row 12".

    Raises:
        UsageError: an option is out of range.
        DataError: a column is absent or holds something else, or no row has a picture that can be read.
    """

    def __init__(
        self,
        rows: "datasets.Dataset",
        prompt: str | None = None,
        *,
        trigger: str | None = None,
        transform: Preprocess | None = None,
        caption_source: CaptionSource = "files",
        caption_lines: Lines = "joined",
        memory: ImageIndex | None = None,
        image_column: str = IMAGE_COLUMN,
        caption_column: str = CAPTION_COLUMN,
        part: Sequence[int] | None = None,
        inside: Sequence[Path] | None = None,
        **preprocess: Unpack[PreprocessOptions],
    ) -> None:
        self._inside = inside
        if not len(rows):
            raise DataError("the dataset has no rows")
        if caption_source == "filename":
            raise UsageError("caption_source filename is for folders of images and shards; rows have no file names")
        self._numbers = range(len(rows)) if part is None else part
        pictures = _picture_column(rows, image_column)
        self._origin = _origin(pictures)
        self._pictures = pictures if part is None else pictures.select(part)
        texts_by_row = (
            _caption_texts(rows, caption_column, self._numbers)
            if caption_source == "files"
            else [None] * len(self._numbers)
        )
        captions = [
            first_caption((("column", texts), ("prompt", prompt)), lines=caption_lines) for texts in texts_by_row
        ]
        names = [f"row {number}" for number in self._numbers]
        more = part is not None
        super().__init__(
            "the dataset",
            names,
            captions,
            trigger=trigger,
            transform=preprocess_of(transform, preprocess),
            memory=memory,
            more=more,
        )

    def _file(self, place: int) -> PictureFile:
        if self._origin is not None:
            return Row(self._origin / str(self._numbers[place]), partial(self._bytes, place))
        picture = self._pictures[place]["picture"]
        if picture is not None and picture["bytes"] is not None:
            return io.BytesIO(picture["bytes"])
        if picture is not None and picture["path"]:
            return Path(picture["path"]) if self._inside is None else _inside(picture["path"], self._inside)
        raise ValueError("no image in this row")

    def _bytes(self, place: int) -> bytes:
        return self._pictures[place]["picture"]["bytes"]


def _inside(path: str, folders: Sequence[Path]) -> Path:
    """The file that a row names. Raises ValueError where it lies in none of the folders, links followed."""
    inside = folders[0] / path
    if not any(is_inside(inside, folder) for folder in folders):
        raise ValueError(f"the row names a file outside of the dataset: {path}")
    return inside


def _may_name_files_in(source: "str | datasets.Dataset") -> list[Path] | None:
    """The folders in which files must lie that the rows of a source name: its own, or the caches of the hub."""
    if not isinstance(source, str):
        return None
    path = Path(os.path.expanduser(source)).absolute()
    if path.exists():
        return [path if path.is_dir() else path.parent]
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub.constants import HF_HUB_CACHE

    return [Path(str(folder)) for folder in (HF_DATASETS_CACHE, HF_HUB_CACHE)]


def _origin(pictures: "datasets.Dataset") -> Path | None:
    """What rows are remembered by: their table and the files that it is in. None: they are in memory, or elsewhere."""
    files = sorted({file["filename"] for file in pictures.cache_files})
    chunks = pictures.data.column("picture").chunks
    if not files or any(chunk.null_count or chunk.field("bytes").null_count for chunk in chunks):
        return None
    return Path("rows") / wide_fold(pictures._fingerprint, *[f"{file} {FileStamp.read(Path(file))}" for file in files])


def _picture_column(rows: "datasets.Dataset", column: str) -> "datasets.Dataset":
    """The one column as undecoded pictures, {"bytes", "path"}, under the name "picture"."""
    import datasets

    if not isinstance(rows, datasets.Dataset):
        raise DataError(f"a {type(rows).__name__} is not a datasets.Dataset; give one split, such as data['train']")
    if column not in rows.column_names:
        raise DataError(f"--image_column {column}: no such column; there are {', '.join(rows.column_names)}")
    try:
        pictures = rows.with_format(None).select_columns([column])
        return pictures.cast_column(column, datasets.Image(decode=False)).rename_columns({column: "picture"})
    except (ValueError, TypeError, NotImplementedError) as error:
        kind = rows.features[column]
        plain = f"Value({kind.dtype!r})" if isinstance(kind, datasets.Value) else kind
        raise DataError(f"--image_column {column}: holds {plain}, not images") from error


def _caption_texts(rows: "datasets.Dataset", column: str, numbers: Sequence[int]) -> list[Texts]:
    """The captions of these rows, without decoding their pictures."""
    if column not in rows.column_names:
        if column == CAPTION_COLUMN:
            return [None] * len(numbers)
        raise DataError(f"--caption_column {column}: no such column; there are {', '.join(rows.column_names)}")
    texts = rows.with_format(None).select_columns([column])
    values = (texts if len(numbers) == len(rows) else texts.select(numbers))[:][column]
    for number, value in zip(numbers, values, strict=True):
        for text in value if isinstance(value, list) else [value]:
            if text is not None and not isinstance(text, str):
                raise DataError(f"--caption_column {column}: row {number} holds {text!r}, expected text")
    return [[text for text in value if text] if isinstance(value, list) else value for value in values]


def is_table(dataset: Any) -> bool:
    """Whether it is a `datasets.Dataset`, without importing that library for what is none."""
    return type(dataset).__module__.partition(".")[0] == "datasets"


def open_dataset(
    source: "str | datasets.Dataset",
    prompt: str | None = None,
    *,
    image_column: str = IMAGE_COLUMN,
    caption_column: str = CAPTION_COLUMN,
    masks: Literal["files", "files and alpha", "none"] = "files",
    stream_rows: int | None = None,
    kept_in: Path | None = None,
    part: FolderPart | Sequence[int] | None = None,
    **options: Any,
) -> ImageFolder | TarShards | HuggingFaceDataset:
    """Open what --data names.

    Args:
        source: a folder of pictures; a tar file, a folder with such, or a pattern (shards/*.tar); or rows, as
            `open_rows` has them.
        stream_rows, kept_in: as for `open_rows`.
        part: of a folder of pictures; or the numbers of rows, or of pictures in shards; None: all.
        prompt, image_column, caption_column, masks, options: as for `ImageFolder` and `HuggingFaceDataset`.

    Raises:
        UsageError: `source` is empty or neither a path nor an id, or a column is named for a folder of pictures.
        DataError: there is nothing to train on, or the hub cannot be reached.
    """
    columns = {"image_column": image_column, "caption_column": caption_column}
    if part is None and isinstance(source, str) and (files := picture_folder(source)) is not None:
        part = FolderPart(files)
    if not isinstance(part, FolderPart) and holds_rows(source):
        if masks == "files and alpha":
            raise no_masks(source)
        rows = open_rows(source, stream_rows=stream_rows, kept_in=kept_in, **columns)
        return HuggingFaceDataset(rows, prompt, part=part, inside=_may_name_files_in(source), **columns, **options)
    assert isinstance(source, str)
    if stream_rows is not None:
        raise UsageError(f"stream_rows is for datasets on the Hugging Face hub; {source} is on this machine")
    if image_column != IMAGE_COLUMN:
        raise UsageError(f"--image_column is for Hugging Face datasets; {source} holds images")
    path = Path(os.path.expanduser(source))
    if isinstance(part, FolderPart):
        return ImageFolder(path, prompt, masks=masks, part=part, caption_column=caption_column, **options)
    if caption_column != CAPTION_COLUMN:
        raise UsageError(f"--caption_column is for rows and metadata files; {source} holds shards")
    shards = shards_of(source)
    assert shards is not None
    tars, root = shards
    return TarShards(tars, root, prompt, masks=masks, part=part, **options)


def no_masks(source: "str | datasets.Dataset") -> UsageError:
    """The error where masks are wanted of rows."""
    what = source if isinstance(source, str) else "the dataset"
    return UsageError(f"--masked_loss is for folders of images and shards; {what} holds rows, without masks")


def holds_rows(source: "str | datasets.Dataset") -> bool:
    """Whether it is a table or on the hub, and no pictures in files. Raises as `open_dataset`."""
    if not isinstance(source, str):
        return True
    check_source(source)
    path = Path(os.path.expanduser(source))
    if not os.path.exists(path):
        return not is_pattern(source)
    files = list_files(path) if path.is_dir() else []
    return not find_shards(source, path, files) and _holds_tables(path, files)


def open_rows(
    source: "str | datasets.Dataset",
    *,
    image_column: str = IMAGE_COLUMN,
    caption_column: str = CAPTION_COLUMN,
    stream_rows: int | None = None,
    kept_in: Path | None = None,
) -> "datasets.Dataset":
    """The rows that --data names.

    Args:
        source: a folder written by `Dataset.save_to_disk`; a folder of parquet or arrow files, or one such file; the id
            of a dataset on the Hugging Face hub (its split "train"); or a Dataset or IterableDataset itself. Only a
            source that does not exist on this machine is looked for on the hub.
        image_column, caption_column: what is kept of a stream.
        stream_rows: of a dataset on the hub, or an IterableDataset: take so many rows as they come.
        kept_in: the folder where rows of streams are kept; None: there is none.

    Raises:
        UsageError: `stream_rows` is given for what is no stream, or without a folder.
        DataError: they cannot be read, or the hub cannot be reached.
    """
    if not isinstance(source, str):
        return _passed_once(source, stream_rows, image_column, caption_column)
    path = Path(os.path.expanduser(source))
    if os.path.exists(path) and stream_rows is not None:
        raise UsageError(f"stream_rows is for datasets on the Hugging Face hub; {source} is on this machine")
    if os.path.exists(path):
        return _load_tables(path)
    if stream_rows is None:
        return hub_rows(source)
    if kept_in is None:
        raise UsageError("stream_rows needs a folder where rows are kept; leave --cache_dir none out")
    return first_hub_rows(source, stream_rows, kept_in, image_column, caption_column)


def picture_folder(source: str) -> list[str] | None:
    """What lies in a folder of pictures; None: the source is something else. Raises DataError as `open_dataset`."""
    check_source(source)
    path = Path(os.path.expanduser(source))
    if not path.is_dir():
        return None
    files = list_files(path)
    return None if find_shards(source, path, files) or _holds_tables(path, files) else files


def shards_of(source: str) -> tuple[list[Path], Path] | None:
    """The tar files that are meant, and the folder that they are called relative to; None: something else."""
    path = Path(os.path.expanduser(source))
    return find_shards(source, path, list_files(path) if path.is_dir() else [])


def _holds_tables(path: Path, files: Sequence[str]) -> bool:
    """Whether what lies there is for `datasets` to read, not a folder of pictures."""
    if not path.is_dir():
        if path.suffix.lower() in _TABLE_SUFFIXES:
            return True
        raise UsageError(
            f"--data {path}: not a folder; expected folders and {' '.join((SHARD_SUFFIX, *_TABLE_SUFFIXES))} files"
        )
    if _was_saved(path):
        return True
    tables = {ending(file) for file in files if file.lower().endswith(_TABLE_SUFFIXES) and not is_metadata(file)}
    if tables and any(file.lower().endswith(PICTURE_SUFFIXES) for file in files):
        raise DataError(f"--data {path}: holds images and {' '.join(sorted(tables))} files; name one of them")
    return bool(tables)


def _was_saved(path: Path) -> bool:
    """Whether `save_to_disk` of a Dataset or of a DatasetDict wrote this folder."""
    return (path / "state.json").exists() or (path / "dataset_dict.json").exists()


def _load_tables(path: Path) -> "datasets.Dataset":
    """The rows of one file or of a folder. Never touches the network."""
    import datasets
    from datasets.exceptions import DatasetsError

    # Not load_dataset("parquet", data_files=...): it counts its use on a server of Hugging Face.
    try:
        if path.is_file() and path.suffix.lower() == ".parquet":
            loaded = datasets.Dataset.from_parquet(glob.escape(str(path)))
        elif path.is_file():
            loaded = datasets.Dataset.from_file(str(path))
        elif _was_saved(path):
            loaded = datasets.load_from_disk(path)
        else:
            loaded = datasets.load_dataset(os.path.abspath(path))
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(f"--data {path}: {first_line(error)}") from error
    if not isinstance(loaded, dict):
        return loaded
    if "train" not in loaded and len(loaded) != 1:
        raise DataError(f"--data {path}: no split called train; there are {', '.join(map(str, loaded))}")
    return loaded["train"] if "train" in loaded else next(iter(loaded.values()))


def _passed_once(rows: Any, count: int | None, image_column: str, caption_column: str) -> "datasets.Dataset":
    """The rows of a stream, in a folder that goes with this process; of another dataset, as they are."""
    import datasets

    if not isinstance(rows, datasets.IterableDataset):
        if count is not None:
            raise UsageError("stream_rows is for an IterableDataset; this dataset can be selected from: rows.select")
        return rows
    folder = Path(tempfile.mkdtemp(prefix="finetune-rows-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return kept(lambda: rows, folder, image_column, caption_column, count)
