"""Names of UNet layers in LoRA files."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from finetune.models.ldm_keys import UNET, unet_keys

_WEIGHT = ".weight"
_XL: Mapping[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UNETS: Mapping[str, Mapping[str, Any]] = {
    "sd15": {"cross_attention_dim": 768},
    "sd21": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    "sdxl": _XL,
}
"""Family -> its UNet's config, where it is not diffusers' default."""


def layer_names(config: Mapping[str, Any], weights: Iterable[str]) -> dict[str, str]:
    """Every name by which a kohya file may call a layer, with dots -> the layer's name in diffusers.

    sd-scripts calls the layers of SDXL as the LDM layout does, those of SD 1 and 2 as diffusers.

    Args:
        config: of the UNet.
        weights: its weights' names.
    """
    layers = [weight.removesuffix(_WEIGHT) for weight in weights if weight.endswith(_WEIGHT)]
    names = {layer: layer for layer in layers}
    if isinstance(config["layers_per_block"], int):
        ldm = unet_keys(config, [layer + _WEIGHT for layer in layers])
        names |= {ldm[layer + _WEIGHT].removeprefix(UNET).removesuffix(_WEIGHT): layer for layer in layers}
    return names


def family_layers(family: str) -> tuple[dict[str, str], dict[str, torch.Size]]:
    """The names of the layers of "sd15", "sd21" or "sdxl", as `layer_names`, and the shape of each layer's weight."""
    return layers_of(UNETS[family])


def layers_of(config: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, torch.Size]]:
    """Return the names of the layers of the UNet with this config."""
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(dict(config))
    state: Mapping[str, torch.Tensor] = unet.state_dict()
    shapes = {name.removesuffix(_WEIGHT): tensor.shape for name, tensor in state.items() if name.endswith(_WEIGHT)}
    return layer_names(dict(unet.config), state), shapes
