"""UserDataset: a validated dataset of the user's own, with our caption rules and preprocessing."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from finetune.data.captions import first_caption
from finetune.data.companions import has_aspect_of
from finetune.data.image_checks import ImageInfo
from finetune.data.image_dataset import Example, ImageDataset
from finetune.data.images import digest_of, to_rgb, upright_size
from finetune.data.transforms import Preprocess
from finetune.errors import DataError, UsageError


class MapDataset(Protocol):
    """Any map-style dataset of (PIL image, caption, id), or of (PIL image, caption, id, companions)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class UserDataset(ImageDataset):
    """Rows of (image, caption, id) that are trained on like a folder of pictures.

    A fourth element of each row holds the picture's companions, kind -> image of the picture's shape: {"mask": image}
    says where an error counts, or where an inpainting model paints. It may be empty.

    Args:
        rows: map-style; its attributes `ids` and `captions`, where it has them, spare opening every picture once, and
            vouch for what they name (with `contents`, a digest of each picture, a changed one is noticed).
        prompt: caption of the pictures whose own is empty or None.
        trigger: word put in place of every [trigger], or in front of each caption.
        transform: how the pictures become squares; None: they are of one size that the model can take.

    Raises:
        DataError: there are no rows, one is something else, or an id stands for two pictures.
    """

    def __init__(
        self,
        rows: MapDataset,
        prompt: str | None = None,
        *,
        trigger: str | None = None,
        transform: Preprocess | None = None,
    ):
        if not len(rows):
            raise DataError("the dataset is empty")
        self._rows, self._infos = rows, dict[int, ImageInfo]()
        self._companions = dict[int, dict[str, str]]()
        self._has_companions = _checked(rows[0], 0).companions is not None
        self.masked = self._has_companions
        ids, texts, contents = (getattr(rows, name, None) for name in ("ids", "captions", "contents"))
        if ids is None or texts is None:
            ids, texts, contents = [], [], []
            for index in range(len(rows)):
                row = self._row(index)
                ids.append(row.id)
                texts.append(row.caption)
                contents.append(_digest(row.image))
                self._companions[index] = _digests(row)
            self.masked = any("mask" in kinds for kinds in self._companions.values())
        if not len(ids) == len(texts) == len(rows):
            raise DataError(f"the dataset has {len(rows)} rows, {len(ids)} ids and {len(texts)} captions")
        if strange := [text for text in texts if not isinstance(text, str | None)]:
            raise DataError(f"a caption of the dataset is {strange[0]!r}; it should be text or None")
        captions = [first_caption((("the dataset", text), ("prompt", prompt))) for text in texts]
        super().__init__(ids, captions, contents or (), trigger=trigger, transform=transform)

    def _row(self, index: int) -> "_Row":
        row = _checked(self._rows[index], index)
        if (row.companions is not None) != self._has_companions:
            here, first = (4 if has else 3 for has in (row.companions is not None, self._has_companions))
            raise DataError(
                f"dataset[{index}] has {here} elements, dataset[0] has {first}; expected the same of all rows"
            )
        return row

    def __getitem__(self, index: int) -> Example:
        return Example(self._row(index).image, self.captions[index], self.ids[index])

    def image_info(self, index: int) -> ImageInfo:
        if index not in self._infos:
            image = to_rgb(self[index].image)
            self._infos[index] = ImageInfo(image.size, _digest(image))
        return self._infos[index]

    def companions(self, index: int) -> Mapping[str, str]:
        if not self._has_companions:
            return {}
        if index not in self._companions:
            self._companions[index] = _digests(self._row(index))
        return self._companions[index]

    def companion(self, index: int, kind: str) -> Image.Image | None:
        image = (self._row(index).companions or {}).get(kind)
        if image is None:
            return None
        return to_rgb(image, background="black").convert("L") if kind == "mask" else to_rgb(image)

    def companion_digests(self) -> list[str]:
        """Return the digests of companions that were opened: a dataset with `ids` vouches for the others."""
        return [digest for index in sorted(self._companions) for digest in self._companions[index].values()]


def refuse_unindexed(dataset: object) -> None:
    """Raise UsageError for a data loader, or a dataset of torch that can only be iterated."""
    if isinstance(dataset, DataLoader):
        raise UsageError("the dataset is a DataLoader, which makes batches of its own: give its .dataset")
    # The streams of `datasets` are torch IterableDatasets too, and have numbered shards to read by.
    ours = type(dataset).__module__.partition(".")[0] == "datasets"
    if isinstance(dataset, IterableDataset) and not ours:
        raise UsageError(
            "the dataset is a torch IterableDataset, whose rows have no numbers: give a map-style dataset, or a "
            "datasets.IterableDataset"
        )


def as_pictures(dataset: ImageDataset | MapDataset) -> ImageDataset:
    """The dataset if it is one of ours; rows of the user's own are checked, and keep a Preprocess that they have."""
    if isinstance(dataset, ImageDataset):
        return dataset
    refuse_unindexed(dataset)
    return UserDataset(dataset, transform=getattr(dataset, "transform", None))


def _digest(image: Image.Image) -> str:
    return digest_of(f"{image.mode} {image.size}".encode() + image.tobytes())


class _Row(NamedTuple):
    """A row of the user's dataset."""

    image: Image.Image
    caption: str | None
    id: str
    companions: Mapping[str, Image.Image] | None = None


def _digests(row: _Row) -> dict[str, str]:
    return {kind: _digest(image) for kind, image in (row.companions or {}).items()}


_EXPECTED = "(PIL image, caption, id) or (PIL image, caption, id, {kind: PIL image})"


def _checked(row: Any, index: int) -> _Row:
    if not isinstance(row, tuple) or len(row) not in (3, 4):
        size = f" of {len(row)}" if isinstance(row, tuple) else ""
        raise DataError(f"dataset[{index}] is a {type(row).__name__}{size}; expected {_EXPECTED}")
    image, caption, name, *more = row
    companions = more[0] if more else None
    if (
        not isinstance(image, Image.Image)
        or not isinstance(caption, str | None)
        or not isinstance(name, str)
        or not isinstance(companions, Mapping | None)
        or not all(isinstance(companion, Image.Image) for companion in (companions or {}).values())
    ):
        kinds = ", ".join(type(part).__name__ for part in row)
        raise DataError(f"dataset[{index}] is ({kinds}); expected {_EXPECTED}")
    for kind, companion in (companions or {}).items():
        (width, height), (across, down) = upright_size(companion), upright_size(image)
        if not has_aspect_of((width, height), (across, down)):
            sizes = f"{width}x{height} for an image of {across}x{down}"
            raise DataError(f"dataset[{index}]: its {kind} has another shape: {sizes}")
    return _Row(image, caption, name, companions)
