"""Loss masks: where in an image the loss counts. White: fully; black: not at all; grey: in proportion."""

from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from finetune.data.transforms import Crop


def weights(mask: Image.Image, crop: Crop, flip: bool, size: tuple[int, int]) -> Tensor:
    """(1, h, w) in [0, 1] for a latent of this size: the mean of the mask over what each position stands for.

    Args:
        mask: 8 bit grey, of the picture's own shape; it is scaled to its size.
        placement, flip: of the picture.
        size: h and w.
    """
    return F.interpolate(crop.companion_pixels(mask, flip)[None] / 255, size, mode="area")[0]
