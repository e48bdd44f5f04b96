"""Keys of a checkpoint in one file (the LDM layout of Stable Diffusion 1, 2 and XL) for those of a diffusers folder.

Each function answers diffusers' key of a module -> that file's key, built from the module's config, so that both ways
can be gone. Weights are equal, but for the VAE's attention (1 x 1 convolutions in the file) and OpenCLIP's text encoder
(query, key and value in one matrix), which `openclip_keys` and `single_file` take care of.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

UNET = "model.diffusion_model."
VAE = "first_stage_model."

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0",
    "conv_out": "out.2", "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip


def unet_keys(config: Mapping[str, Any], keys: Iterable[str]) -> dict[str, str]:
    """The UNet's keys -> the file's.

    Args:
        config: of the UNet.
        keys: of its state dict.
    """
    return {key: UNET + _renamed(key, _unet_blocks(config), _RESNET) for key in keys}


def _unet_blocks(config: Mapping[str, Any]) -> dict[str, str]:
    """A block's name in diffusers -> in the file: numbered through from the input, and from the middle on."""
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    blocks = dict(_UNET_ENDS)
    for level in range(levels):
        down, first = f"down_blocks.{level}", 1 + level * (layers + 1)
        for layer in range(layers):
            blocks[f"{down}.resnets.{layer}"] = f"input_blocks.{first + layer}.0"
            blocks[f"{down}.attentions.{layer}"] = f"input_blocks.{first + layer}.1"
        blocks[f"{down}.downsamplers.0.conv"] = f"input_blocks.{first + layers}.0.op"
        up, first = f"up_blocks.{level}", level * (layers + 1)
        for layer in range(layers + 1):
            blocks[f"{up}.resnets.{layer}"] = f"output_blocks.{first + layer}.0"
            blocks[f"{up}.attentions.{layer}"] = f"output_blocks.{first + layer}.1"
        after = 2 if "Attn" in config["up_block_types"][level] else 1
        blocks[f"{up}.upsamplers.0.conv"] = f"output_blocks.{first + layers}.{after}.conv"
    return blocks


_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def vae_keys(config: Mapping[str, Any], keys: Iterable[str]) -> dict[str, str]:
    """The VAE's keys -> the file's. Its decoder counts levels from the picture, diffusers from the latents."""
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    blocks = {"encoder.conv_norm_out": "encoder.norm_out", "decoder.conv_norm_out": "decoder.norm_out"}
    for side in ("encoder", "decoder"):
        blocks[f"{side}.mid_block.attentions.0"] = f"{side}.mid.attn_1"
        blocks |= {f"{side}.mid_block.resnets.{i}": f"{side}.mid.block_{i + 1}" for i in (0, 1)}
    for level in range(levels):
        down, up, there = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{level}", levels - 1 - level
        blocks |= {f"{down}.resnets.{i}": f"encoder.down.{level}.block.{i}" for i in range(layers)}
        blocks |= {f"{up}.resnets.{i}": f"decoder.up.{there}.block.{i}" for i in range(layers + 1)}
        blocks[f"{down}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        blocks[f"{up}.upsamplers.0.conv"] = f"decoder.up.{there}.upsample.conv"
    return {key: VAE + _renamed(key, blocks, {"conv_shortcut": "nin_shortcut"} | _VAE_ATTENTION) for key in keys}


def newer_vae_key(key: str) -> str:
    """A key of the VAE's attention in the file as newer programs write it: `attn_1.to_q` for `attn_1.q`."""
    for ours, theirs in _VAE_ATTENTION.items():
        key = key.replace(f".attn_1.{theirs}.", f".attn_1.{ours}.")
    return key


def is_vae_attention(key: str) -> bool:
    """Whether a VAE's weight is a matrix in diffusers and a 1 x 1 convolution in the file."""
    return key.endswith(tuple(f".{name}.weight" for name in ("to_q", "to_k", "to_v", "to_out.0")))


def _renamed(key: str, blocks: Mapping[str, str], inside: Mapping[str, str]) -> str:
    """The key with its block's name, and within a block the layer's, exchanged."""
    for block, theirs in blocks.items():
        if key.startswith(f"{block}."):
            rest = key.removeprefix(f"{block}.")
            layer = next((name for name in inside if rest.startswith(f"{name}.")), None)
            # Attention blocks of the UNet keep their inner names; none begins like a layer of a residual block.
            return f"{theirs}.{inside[layer]}{rest.removeprefix(layer)}" if layer else f"{theirs}.{rest}"
    return key


_OPENCLIP_ENDS = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_OPENCLIP_LAYER = {
    "self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}  # fmt: skip
QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")
"""The thirds, in order, of OpenCLIP's `attn.in_proj_weight` and `attn.in_proj_bias`."""


def openclip_keys(layers: int) -> Iterator[tuple[str, str, int | None]]:
    """(transformers' key, OpenCLIP's, which third of it or None for all) of a text encoder without its projection."""
    yield from ((ours, theirs, None) for ours, theirs in _OPENCLIP_ENDS.items())
    for layer in range(layers):
        ours, theirs = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            yield from ((f"{ours}.{a}.{kind}", f"{theirs}.{b}.{kind}", None) for a, b in _OPENCLIP_LAYER.items())
            for third, name in enumerate(QUERY_KEY_VALUE):
                yield f"{ours}.self_attn.{name}.{kind}", f"{theirs}.attn.in_proj_{kind}", third
