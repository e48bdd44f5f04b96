"""What an inpainting UNet sees beside x_t: where it is to paint, and the latents of what is left of the picture."""

import torch
from torch import Tensor

from finetune.models.encoders import Encoder


def split_inpainting_latents(encoder: Encoder, stored: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """What is stored of pictures alone, and the channels for the UNet.

    Args:
        encoder: has made what is stored.
        stored: (B, 2C + 2C + 1, h, w): of the pictures, of what is left of them, and the mask, 1 where to paint.
        keys: of the visits (B,).

    Returns:
        (B, 2C, h, w), and (B, 1 + C, h, w): the mask and the scaled latents, in the order of diffusers' pipelines.
    """
    channels = stored.shape[1] // 2
    pictures, left, mask = stored.split([channels, channels, 1], dim=1)
    return pictures, inpainting_channels(encoder, left, mask, keys)


def fully_masked_channels(encoder: Encoder, keys: Tensor, side: int) -> Tensor:
    """Return the channels for pictures of `side` pixels of which everything is to be painted: keys (B,), so (B, 1 + C).

    The encoder is used where it is; the answer is on the CPU.
    """
    stored = encoder.encode(torch.zeros(1, 3, side, side)).cpu()
    mask = torch.ones(len(keys), 1, *stored.shape[2:])
    return inpainting_channels(encoder, stored.expand(len(keys), -1, -1, -1), mask, keys)


def inpainting_channels(encoder: Encoder, left: Tensor, mask: Tensor, keys: Tensor) -> Tensor:
    """The channels for the UNet, (B, 1 + C, h, w), of what is stored of what is left (B, 2C, h, w) and the mask."""
    return torch.cat([mask, encoder.sample(left, keys, "sample of what is shown")], dim=1)
