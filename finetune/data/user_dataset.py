"""A dataset of the user's own, checked, with our caption rules and preprocessing put over it."""

from typing import Any, Protocol

from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from finetune.data.captions import first_caption
from finetune.data.image_checks import ImageInfo
from finetune.data.image_dataset import Example, ImageDataset
from finetune.data.images import digest_of, to_rgb
from finetune.data.transforms import Preprocess
from finetune.errors import DataError, UsageError


class MapDataset(Protocol):
    """Any map-style dataset of (PIL picture, caption, id)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class UserDataset(ImageDataset):
    """Rows of (picture, caption, id) that are trained on like a folder of pictures.

    Args:
        rows: map-style; its attributes `ids` and `captions`, where it has them, spare opening every picture once, and
            vouch for what they name (with `contents`, a digest of each picture, a changed one is noticed).
        prompt: caption of the pictures whose own is empty or None.
        trigger: word put in place of every [trigger], or in front of each caption.
        transform: how the pictures become squares; None: they are of one size that the model can take.

    Raises:
        DataError: there are no rows, one is not (picture, caption, id), or an id stands for two pictures.
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
        self._rows, self._known = rows, dict[int, ImageInfo]()
        ids, texts, contents = (getattr(rows, name, None) for name in ("ids", "captions", "contents"))
        if ids is None or texts is None:
            opened = [_checked(rows[index], index) for index in range(len(rows))]
            texts, ids = [text for _, text, _ in opened], [name for _, _, name in opened]
            contents = [_digest(image) for image, _, _ in opened]
        if not len(ids) == len(texts) == len(rows):
            raise DataError(f"the dataset has {len(rows)} rows, {len(ids)} ids and {len(texts)} captions")
        if strange := [text for text in texts if not isinstance(text, str | None)]:
            raise DataError(f"a caption of the dataset is {strange[0]!r}; it should be text or None")
        captions = [first_caption((("the dataset", text), ("prompt", prompt))) for text in texts]
        super().__init__(ids, captions, contents or (), trigger=trigger, transform=transform)

    def __getitem__(self, index: int) -> Example:
        return Example(_checked(self._rows[index], index)[0], self.captions[index], self.ids[index])

    def image_info(self, index: int) -> ImageInfo:
        if index not in self._known:
            image = to_rgb(self[index].image)
            self._known[index] = ImageInfo(image.size, _digest(image))
        return self._known[index]


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


def _checked(row: Any, index: int) -> tuple[Image.Image, str | None, str]:
    if not isinstance(row, tuple) or len(row) != 3:
        raise DataError(f"row {index} of the dataset is no (picture, caption, id) but {type(row).__name__}")
    image, caption, name = row
    if not isinstance(image, Image.Image) or not isinstance(caption, str | None) or not isinstance(name, str):
        kinds = ", ".join(type(part).__name__ for part in row)
        raise DataError(f"row {index} of the dataset is ({kinds}); it should be (PIL picture, caption, id)")
    return image, caption, name
