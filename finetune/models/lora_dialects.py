"""Dialects of LoRA files, converted to the two formats of `lora_formats`: keys renamed, extra tensors folded in.

Read are diffusers' attention processors and `lora.down` of 2023, peft's own `base_model.model.`, the dotted kohya names
of ComfyUI's LoraSave and of OMI, LyCORIS' prefix, its `lora_mid` (Tucker) and `scalar`, and OneTrainer's embeddings.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from finetune.errors import ModelError

_TEXT = ("lora_te", "text_encoder", "bundle_emb", "clip_l.", "clip_g.", "te1.", "te2.", "lora_clip")
"""Beginnings of keys that are not for a UNet: of text encoders, and embeddings."""

_OTHER_MODELS = {
    "single_transformer_blocks": "FLUX",
    "double_blocks": "FLUX",
    "single_blocks": "FLUX",
    "joint_blocks": "Stable Diffusion 3",
    "add_k_proj": "Stable Diffusion 3",
    "adaln_single": "PixArt",
    "cross_attn.k_img": "Wan",
}
"""Part of a key -> a model without a UNet that has it."""

_OTHER_KINDS = {
    ".on_input": "an (IA)3, which scales activations",
    ".oft_blocks": "an OFT, which rotates weights",
    ".oft_R": "an OFT, which rotates weights",
    ".boft_R": "a BOFT, which rotates weights",
    ".a1.weight": "a GLoRA",
    ".diff": "whole weights' differences",
    ".diff_b": "whole biases' differences",
    ".w_norm": "norms' weights",
    ".b_norm": "norms' biases",
    ".set_weight": "whole weights",
    ".reshape_weight": "a layer of another shape",
}
"""End of a key -> what it is of, that is not read."""

_PROCESSOR = re.compile(r"(.*)\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight")
_NESTED = re.compile(r"(.*?)\.(?:lora|lora_linear_layer)\.(down|up)\.weight")
_DOTTED = re.compile(
    r"(?:diffusion_model|unet)\.(.*)\.(lora_down\.weight|lora_up\.weight|alpha|dora_scale|lora_mid\.weight)"
)
_MATRIX = {"down": "lora_A.weight", "up": "lora_B.weight"}


class Normalized(NamedTuple):
    """The tensors of a file for a UNet, in kohya's layout or in peft's."""

    tensors: dict[str, Tensor]
    text: int
    """How many tensors are for text encoders, or embeddings."""


def normalized(state: Mapping[str, Tensor]) -> Normalized:
    """The tensors of a file under the keys of one of the two layouts, whatever wrote it.

    Raises:
        ModelError: it is for a model that has no UNet, or of a kind that is not read; the message names it.
    """
    text = [key for key in state if key.startswith(_TEXT)]
    ours = {_renamed(key): tensor for key, tensor in state.items() if key not in text}
    for part, model in _OTHER_MODELS.items():
        if any(part in key for key in ours):
            raise ModelError(f"it is for {model}, which has no UNet")
    for end, what in _OTHER_KINDS.items():
        if named := [key for key in ours if key.endswith(end)]:
            raise ModelError(f"{named[0]}: {what}; read are LoRA, DoRA, LoHa and LoKr")
    return Normalized(_with_scalars(_without_cores(ours)), len(text))


def _renamed(key: str) -> str:
    """A key in kohya's or in peft's layout; one that is in neither stays."""
    key = key.replace("base_model.model.", "").replace(".default.weight", ".weight")
    if key.startswith("lycoris_"):
        return f"lora_unet_{key.removeprefix('lycoris_')}"
    if match := _PROCESSOR.fullmatch(key):
        layer, projection, matrix = match.groups()
        return f"{layer}.{'to_out.0' if projection == 'to_out' else projection}.{_MATRIX[matrix]}"
    if match := _NESTED.fullmatch(key):
        return f"{match[1]}.{_MATRIX[match[2]]}"
    if match := _DOTTED.fullmatch(key):
        return f"lora_unet_{match[1].replace('.', '_')}.{match[2]}"
    return key


def _without_cores(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tucker's middle factor of a convolution, (rank, rank, height, width), multiplied into the lower one."""
    merged = dict(state)
    for key in [key for key in state if key.endswith(".lora_mid.weight")]:
        below = key.replace("lora_mid", "lora_down")
        if below not in merged:
            raise ModelError(f"{below} is missing")
        down = merged[below].float().flatten(1)
        merged[below] = torch.einsum("mnhw,ni->mihw", merged.pop(key).float(), down).to(state[below].dtype)
    return merged


_SCALED: Sequence[str] = ("lora_up.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a")
"""The tensor that a layer's scalar is multiplied into: the first that is there."""


def _with_scalars(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LyCORIS' number for each layer, by which its update is multiplied, in one of its factors."""
    scaled = dict(state)
    for key in [key for key in state if key.endswith(".scalar")]:
        scalar, layer = scaled.pop(key), key.removesuffix(".scalar")
        name = next((f"{layer}.{end}" for end in _SCALED if f"{layer}.{end}" in scaled), None)
        if name is None:
            raise ModelError(f"{key}: a scalar of no layer")
        scaled[name] = scaled[name] * scalar.to(scaled[name].dtype)
    return scaled
