"""Datasets on the Hugging Face hub: a complete one, or the first rows of one."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.hub_dataset import WHOLE, kept
from finetune.errors import DataError, UsageError, first_line, hub_errors
from finetune.seeding import wide_fold

if TYPE_CHECKING:
    import datasets


def whole(name: str) -> "datasets.Dataset":
    """Split "train" of a dataset on the hub, or in the cache if HF_HUB_OFFLINE is set. Raises as `streamed`."""
    _revision(name)
    return _loaded(name)


def streamed(name: str, count: int, folder: Path, image_column: str, caption_column: str) -> "datasets.Dataset":
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
