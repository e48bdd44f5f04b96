"""The scale, shift and padding of a VAE that is not as its family has them (EQ-VAEs and others)."""

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from finetune.errors import UsageError


@torch.no_grad()
def rescale(vae: AutoencoderKL, scale: Sequence[float] | None, shift: Sequence[float] | None) -> None:
    """Change a VAE so that its scaled latents are (z - shift) scale, where z were its latents before.

    Both go into the 1 x 1 convolutions around the latents, and `scaling_factor` stays what every viewer of the family
    takes it to be: pipelines of Stable Diffusion apply no shift, and single files hold no scale.

    Args:
        vae: in fp32; it is changed.
        scale: one number, or one for each channel; None: `scaling_factor` of its config.
        shift: one number, or one for each channel; None: `shift_factor` of its config, or 0.

    Raises:
        UsageError: another number of them than 1 or the channels, or a VAE without these convolutions.
    """
    channels, factor = vae.config["latent_channels"], vae.config["scaling_factor"]
    scales = _of_channels("vae_scale", scale if scale is not None else (factor,), channels) / factor
    given = shift if shift is not None else (vae.config.get("shift_factor") or 0.0,)
    shifts = _of_channels("vae_shift", given, channels)
    if torch.equal(scales, torch.ones(channels)) and not shifts.any():
        return
    before, after = vae.quant_conv, vae.post_quant_conv
    if not isinstance(before, nn.Conv2d) or not isinstance(after, nn.Conv2d):
        raise UsageError("vae_scale and vae_shift: the VAE has no quant_conv and post_quant_conv to take them")
    assert before.bias is not None
    assert after.bias is not None
    mean, logvar = slice(0, channels), slice(channels, 2 * channels)
    before.weight[mean] *= scales.view(-1, 1, 1, 1)
    before.bias[mean] = (before.bias[mean] - shifts) * scales
    before.bias[logvar] += 2 * scales.log()
    after.bias += after.weight[:, :, 0, 0] @ shifts
    after.weight /= scales.view(1, -1, 1, 1)
    vae.register_to_config(shift_factor=None)


def _of_channels(option: str, given: Sequence[float], channels: int) -> Tensor:
    if len(given) not in (1, channels):
        raise UsageError(f"{option} = {list(given)}: expected 1 number, or {channels}, one for each channel")
    return torch.tensor([*given] * (channels if len(given) == 1 else 1), dtype=torch.float32)


def set_padding(vae: AutoencoderKL, mode: str) -> None:
    """Pad the input of each convolution of a VAE by "zeros" or "reflect", as its config's `padding_mode` says.

    Raises:
        UsageError: another mode.
    """
    if mode not in ("zeros", "reflect"):
        raise UsageError(f"padding_mode of the VAE's config is {mode}: expected zeros or reflect")
    for module in vae.modules():
        if isinstance(module, nn.Conv2d) and any(module.padding):
            module.padding_mode = mode
    vae.register_to_config(padding_mode=mode)
