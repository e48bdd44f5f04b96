"""ImageSample: what is known of one image of a dataset, made once per visit and passed on."""

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from finetune.data.image_checks import ImageInfo
from finetune.data.images import to_rgb
from finetune.data.transforms import Crop, whole

if TYPE_CHECKING:
    from finetune.data.image_dataset import ImageDataset


class ImageSample:
    """One picture of a dataset. Its file is not opened before size, digest, companions or pixels are asked for.

    Args:
        dataset: the dataset that opens it.
        index: of the picture in that dataset.
        id: its id; by default that of the dataset.
    """

    def __init__(self, dataset: "ImageDataset", index: int, id: str | None = None) -> None:  # as in Example
        self._dataset, self._index = dataset, index
        self.id = dataset.ids[index] if id is None else id
        self.transform = dataset.transform
        self.background = dataset.background
        """The colour that shows where the picture is transparent."""
        self.random_flip = self.transform is not None and self.transform.random_flip
        """Whether visits may be mirrored."""

    @cached_property
    def info(self) -> ImageInfo:
        """Size and digest of the picture. Raises DataError where it must be opened for that and cannot be."""
        return self._dataset.image_info(self._index)

    @cached_property
    def companions(self) -> Mapping[str, str]:
        """The kinds of its companions -> the digest of each; see `ImageDataset.companions`."""
        return self._dataset.companions(self._index)

    def open(self) -> Image.Image:
        """The picture as RGB, upright. Raises DataError if it cannot be read, or has changed."""
        image = self._dataset[self._index].image
        return image if image.mode == "RGB" else to_rgb(image, background=self.background)

    def open_companion(self, kind: str) -> Image.Image | None:
        """A companion of the picture, of its shape; None: there is none. See `ImageDataset.companion`."""
        return self._dataset.companion(self._index, kind)

    def crop(self, key: int, size: tuple[int, int] | None = None) -> Crop:
        """The part that is trained on; a random crop is drawn from the sample key.

        Args:
            key: of the visit.
            size: width and height of the picture; by default those of `info`.
        """
        width, height = self.info.size if size is None else size
        return whole(width, height) if self.transform is None else self.transform.crop(width, height, key)

    def companion_pixels(self, kind: str, crop: Crop, flip: bool) -> Tensor | None:
        """(C, H, W) uint8 of a companion, cropped and mirrored as the picture; None: there is none."""
        companion = self.open_companion(kind) if kind in self.companions else None
        return None if companion is None else crop.companion_pixels(companion, flip)
