"""A model's weights under the keys of a checkpoint in one file: the way back of `source.FileSource`."""

from typing import Any

import torch
from torch import Tensor

from finetune.models.ldm_keys import is_vae_attention, openclip_keys, unet_keys, vae_keys
from finetune.models.single_file import CLIP, OPENCLIP_XL


def checkpoint_tensors(pipeline: Any, family: str) -> dict[str, Tensor]:
    """UNet, VAE and text encoders as the LDM layout has them.

    What a diffusers folder does not hold (tables of the schedule, EMA weights, the last block of Stable Diffusion 2's
    text encoder) is not there.

    Args:
        pipeline: of Stable Diffusion 1, 2 or XL.
        family: "sd15", "sd21" or "sdxl".
    """
    tensors: dict[str, Tensor] = {}
    for part, keys in (("unet", unet_keys), ("vae", vae_keys)):
        module = getattr(pipeline, part)
        state = module.state_dict()
        for ours, theirs in keys(module.config, state).items():
            convolution = part == "vae" and is_vae_attention(ours)
            tensors[theirs] = state[ours][:, :, None, None] if convolution else state[ours]
    if family == "sd21":
        return tensors | _openclip(pipeline.text_encoder, CLIP[family])
    tensors |= {CLIP[family] + key: tensor for key, tensor in _classic(pipeline.text_encoder).items()}
    return tensors | (_openclip(pipeline.text_encoder_2, OPENCLIP_XL) if family == "sdxl" else {})


def _classic(text_encoder: Any) -> dict[str, Tensor]:
    """A text encoder's weights under the names that every version of transformers reads."""
    state = text_encoder.state_dict()
    return {key if key.startswith("text_") else f"text_model.{key}": tensor for key, tensor in state.items()}


def _openclip(text_encoder: Any, prefix: str) -> dict[str, Tensor]:
    state, tensors = _classic(text_encoder), {}
    thirds: dict[str, list[Tensor]] = {}
    for ours, theirs, third in openclip_keys(text_encoder.config.num_hidden_layers):
        if third is None:
            tensors[prefix + theirs] = state[ours]
        else:
            thirds.setdefault(prefix + theirs, []).append(state[ours])
    tensors |= {name: torch.cat(parts) for name, parts in thirds.items()}
    if "text_projection.weight" in state:
        tensors[f"{prefix}text_projection"] = state["text_projection.weight"].T.contiguous()
    return tensors
