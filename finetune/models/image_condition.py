"""ImageCondition: what a UNet sees of an image in addition to x_t, as channels of its input."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from PIL import Image
from torch import Tensor

from finetune.models.encoders import Encoder
from finetune.models.inpainting import Inpainting


class ConditionImages(NamedTuple):
    """A picture and its condition, for a pipeline of diffusers."""

    picture: Image.Image
    """RGB, of a size that the model takes."""
    condition: Image.Image
    """What `ImageCondition.pixels` returns, as an image of the same size."""


class ImageCondition(Protocol):
    """A kind of picture that conditions the UNet, such as the hole of an inpainting model.

    A condition is made from a companion of the picture (its mask), or drawn from a sample key where the picture
    has none. K is the number of its channels as bytes.
    """

    companion: str
    """The kind of companion that it is made from: a key of `ImageDataset.companions`."""
    pipeline_example: Mapping[str, str]
    """Argument of the diffusers pipeline -> the name of an image file, for the example in a model card."""

    def variants(self, key: int | None, *, has_companion: bool) -> Sequence[int]:
        """Return the numbers of the conditions that a visit with this sample key may use of those that are cached.

        Args:
            key: None stands for every visit.
            has_companion: whether the picture has a companion of this kind.
        """
        ...

    def pixels(self, companion: Tensor | None, size: tuple[int, int], key: int | None) -> Tensor:
        """Return the condition of a picture, (K, H, W) uint8.

        Args:
            companion: (C, H, W) uint8, cropped and mirrored as the picture is; None where it has none.
            size: height and width of the cropped picture.
            key: the key that random conditions are drawn from; None: nothing is random, as in sample grids.
        """
        ...

    def cache_name(self, companion: str | None, key: int) -> str:
        """Return what the cache key says of `pixels`: a different text wherever these may differ.

        Args:
            companion: digest of the companion; None where there is none.
            key: as for `pixels`.
        """
        ...

    def encode(self, encoder: Encoder, pixels: Tensor, condition: Tensor) -> dict[str, Tensor]:
        """Return what is stored of conditions: tensors of first size B on the CPU.

        Args:
            encoder: the model's, on the device where it runs.
            pixels: the pictures, (B, 3, H, W) in [-1, 1].
            condition: their conditions, (B, K, H, W) uint8.
        """
        ...

    def channels(self, encoder: Encoder, stored: Mapping[str, Tensor], keys: Tensor) -> Tensor:
        """Return the channels for the UNet, (B, C', h, w) fp32, of what `encode` returned and the sample keys (B,)."""
        ...

    def empty(self, encoder: Encoder, keys: Tensor, side: int) -> Tensor:
        """Return channels that show nothing, (B, C', h, w) on the CPU, for pictures of `side` pixels."""
        ...

    def preview(self, pixels: Tensor, condition: Tensor) -> Tensor:
        """Return a picture (3, H, W) uint8 that shows people a picture (3, H, W) and its condition (K, H, W)."""
        ...

    def pipeline_arguments(self, images: ConditionImages | None, *, width: int, height: int) -> dict[str, Any]:
        """Return the arguments of the diffusers pipeline that hold images and size; None: nothing is shown."""
        ...

    def summary(self, companions: int, *, live: bool) -> str:
        """Return a line for the summary of a run.

        Args:
            companions: how many pictures have a companion.
            live: whether pictures are encoded at each visit.
        """
        ...


_IMAGE_CONDITIONS: Mapping[str, ImageCondition] = {"inpainting": Inpainting()}


def image_condition_of(name: str | None) -> ImageCondition | None:
    """Return the image condition that a `Family` names; None where it names none."""
    return None if name is None else _IMAGE_CONDITIONS[name]
