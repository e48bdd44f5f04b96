"""Names of UNet layers in LoRA files."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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


BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")
"""What the names of most layers begin with. diffusers before 0.42 reads no other layer from a kohya file of SDXL."""


@dataclass(frozen=True)
class UNetLayers:
    """The layers of a UNet, and their names in LoRA files."""

    shapes: Mapping[str, torch.Size]
    """Layer -> shape of its weight."""
    names: Mapping[str, str]
    """See `layer_names`."""
    kohya_names: Mapping[str, str]
    """See `kohya_names`."""


def layer_names(config: Mapping[str, Any], weights: Iterable[str]) -> dict[str, str]:
    """Every name by which a kohya file may call a layer, with dots -> the layer's name in diffusers.

    Args:
        config: of the UNet.
        weights: its weights' names.
    """
    layers = [weight.removesuffix(_WEIGHT) for weight in weights if weight.endswith(_WEIGHT)]
    return {layer: layer for layer in layers} | {name: layer for layer, name in _ldm_names(config, layers).items()}


def kohya_names(config: Mapping[str, Any], layers: Iterable[str]) -> dict[str, str]:
    """Layer -> its name in a kohya file, with dots.

    sd-scripts calls the layers of SDXL as the LDM layout does, those of SD 1 and 2 as diffusers does.

    Args:
        config: of the UNet.
        layers: names in diffusers.
    """
    layers = list(layers)
    xl = config.get("addition_embed_type") == "text_time"
    return {layer: layer for layer in layers} | (_ldm_names(config, layers) if xl else {})


def _ldm_names(config: Mapping[str, Any], layers: Iterable[str]) -> dict[str, str]:
    """Layer -> its name in a checkpoint in one file; empty for a UNet that has no such file."""
    if not isinstance(config["layers_per_block"], int):
        return {}
    keys = unet_keys(config, [layer + _WEIGHT for layer in layers])
    return {
        ours.removesuffix(_WEIGHT): theirs.removeprefix(UNET).removesuffix(_WEIGHT) for ours, theirs in keys.items()
    }


def family_layers(family: str) -> UNetLayers:
    """The layers of the UNet of "sd15", "sd21" or "sdxl"."""
    return layers_of(UNETS[family])


def layers_of(config: Mapping[str, Any]) -> UNetLayers:
    """The layers of the UNet with this config."""
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(dict(config))
    state: Mapping[str, torch.Tensor] = unet.state_dict()
    shapes = {name.removesuffix(_WEIGHT): tensor.shape for name, tensor in state.items() if name.endswith(_WEIGHT)}
    return UNetLayers(shapes, layer_names(unet.config, state), kohya_names(unet.config, shapes))
