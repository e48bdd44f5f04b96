"""Recompute: what a UNet's blocks have computed is not kept for the backward pass, but computed again there."""

from typing import Any

from diffusers.models.modeling_utils import ModelMixin


def recompute(unet: ModelMixin, share: float = 1.0) -> None:
    """Gradient checkpointing (Chen et al. 2016, arXiv:1604.06174) in a share of the UNet's blocks, transformers counted
    by themselves.

    The first are those of the fewest channels. They see the most positions, so they give back the most memory for what
    it takes to compute them again.

    Args:
        unet: of diffusers.
        share: in [0, 1].
    """
    if not share:
        return
    unet.enable_gradient_checkpointing()
    blocks: list[Any] = sorted((m for m in unet.modules() if hasattr(m, "gradient_checkpointing")), key=_channels)
    for block in blocks[round(share * len(blocks)) :]:
        block.gradient_checkpointing = False


def _channels(block: Any) -> int:
    """A transformer knows how many come in; other blocks have residual parts that know."""
    return block.resnets[0].out_channels if hasattr(block, "resnets") else block.in_channels
