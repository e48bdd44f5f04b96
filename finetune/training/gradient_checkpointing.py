"""Gradient checkpointing: a UNet's blocks recompute their activations in the backward pass."""

from functools import partial
from typing import Any

from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(unet: ModelMixin, share: float = 1.0) -> None:
    """Gradient checkpointing (Chen et al. 2016, arXiv:1604.06174) in a share of the UNet's blocks, transformers counted
    by themselves.

    The first are those of the fewest channels. They see the most positions, so they give back the most memory for what
    it takes to compute them again.

    Args:
        unet: of diffusers, with its adapter: dropout draws the same again.
        share: in [0, 1].
    """
    if not share:
        return
    draws = any(isinstance(module, nn.Dropout) and module.p > 0 for module in unet.modules())
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=draws)  # which takes time for each block
    unet.enable_gradient_checkpointing(again)
    blocks: list[Any] = sorted((m for m in unet.modules() if hasattr(m, "gradient_checkpointing")), key=_channels)
    for block in blocks[round(share * len(blocks)) :]:
        block.gradient_checkpointing = False


def sets_generator(network: nn.Module) -> bool:
    """Whether its backward pass sets a random generator back to what it was, as torch's gradient checkpointing does
    unless told otherwise."""
    blocks: list[Any] = [m for m in network.modules() if getattr(m, "gradient_checkpointing", False)]
    functions = [getattr(block, "_gradient_checkpointing_func", None) for block in blocks]
    return any(getattr(f, "keywords", {}).get("preserve_rng_state", True) for f in functions)


def _channels(block: Any) -> int:
    """A transformer knows how many come in; other blocks have residual parts that know."""
    return block.resnets[0].out_channels if hasattr(block, "resnets") else block.in_channels
