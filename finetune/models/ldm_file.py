"""Writing a checkpoint in one file: the inverse of `source.FileSource`."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from finetune.errors import ModelError
from finetune.models.ldm_keys import QUERY_KEY_VALUE, is_vae_attention, openclip_keys, unet_keys, vae_keys
from finetune.models.single_file import CLIP, OPENCLIP_XL, V_PREDICTION, ZERO_TERMINAL_SNR, Checkpoint, Shapes


def checkpoint_tensors(pipeline: Any, family: str) -> Iterator[tuple[str, Tensor]]:
    """Key and tensor of UNet, VAE and text encoders as the LDM layout has them, made one by one.

    What a diffusers folder does not hold is not there: tables of the schedule, EMA weights. The last block of Stable
    Diffusion 2's text encoder, which no folder has and no viewer computes, but all count, is a copy of the one before.

    Args:
        pipeline: of Stable Diffusion 1, 2 or XL.
        family: "sd15", "sd21" or "sdxl".
    """
    for part, keys in (("unet", unet_keys), ("vae", vae_keys)):
        module = getattr(pipeline, part)
        state = module.state_dict()
        for ours, theirs in keys(module.config, state).items():
            convolution = part == "vae" and is_vae_attention(ours)
            yield theirs, state[ours][:, :, None, None] if convolution else state[ours]
    if family != "sd21":
        for key, tensor in classic_names(pipeline.text_encoder).items():
            yield CLIP[family] + key, tensor
    if family == "sdxl":
        yield from _openclip(pipeline.text_encoder_2, OPENCLIP_XL)
    if family == "sd21":
        layers = pipeline.text_encoder.config.num_hidden_layers
        last, after = _last_block(layers - 1), _last_block(layers)
        for key, tensor in _openclip(pipeline.text_encoder, CLIP[family]):
            yield key, tensor
            if key.startswith(last):
                yield key.replace(last, after), tensor


def rest_of(base: Checkpoint, written: Shapes, family: str) -> list[str]:
    """Keys of a checkpoint that a diffusers folder has no place for: tables of the schedule, EMA weights, and the last
    block of Stable Diffusion 2's text encoder, which `checkpoint_tensors` had to make up. Marks are not among them.

    Args:
        base: a checkpoint in one file.
        written: key -> shape of what `checkpoint_tensors` makes of a model of this family.

    Raises:
        ModelError: it is of another family or shape than the model.
    """
    if base.family != family:
        raise ModelError(f"--base {base.path}: a checkpoint of {base.family}, not of {family}")
    for name, shape in written.items():
        if shape != base.shapes.get(name, shape):
            raise ModelError(f"--base {base.path}: {name} is {base.shapes[name]}, and the model's {shape}")
    made_up = _last_block(base.configs["text_encoder"]["num_hidden_layers"]) if family == "sd21" else None
    return [
        name
        for name in base.shapes
        if name not in (V_PREDICTION, ZERO_TERMINAL_SNR)
        and (name not in written or (made_up is not None and name.startswith(made_up)))
    ]


def _last_block(layers: int) -> str:
    """What the keys of the block after these layers of Stable Diffusion 2's text encoder begin with."""
    return f"{CLIP['sd21']}transformer.resblocks.{layers}."


def classic_names(text_encoder: Any) -> dict[str, Tensor]:
    """A text encoder's weights under the names that every version of transformers reads."""
    state = text_encoder.state_dict()
    return {key if key.startswith("text_") else f"text_model.{key}": tensor for key, tensor in state.items()}


def _openclip(text_encoder: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    state = classic_names(text_encoder)
    thirds: dict[str, list[Tensor]] = {}
    for ours, theirs, third in openclip_keys(text_encoder.config.num_hidden_layers):
        if third is None:
            yield prefix + theirs, state[ours]
            continue
        parts = thirds.setdefault(prefix + theirs, [])
        parts.append(state[ours])
        if len(parts) == len(QUERY_KEY_VALUE):
            yield prefix + theirs, torch.cat(parts)
    if "text_projection.weight" in state:
        yield f"{prefix}text_projection", state["text_projection.weight"].T
