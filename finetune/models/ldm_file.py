"""Writing a checkpoint in one file: the inverse of `source.FileSource`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from finetune.errors import ModelError
from finetune.models.ldm_keys import is_vae_attention, openclip_keys, unet_keys, vae_keys
from finetune.models.single_file import CLIP, OPENCLIP_XL, V_PREDICTION, ZERO_TERMINAL_SNR, Checkpoint


def checkpoint_tensors(pipeline: Any, family: str) -> dict[str, Tensor]:
    """UNet, VAE and text encoders as the LDM layout has them.

    What a diffusers folder does not hold is not there: tables of the schedule, EMA weights. The last block of Stable
    Diffusion 2's text encoder, which no folder has and no viewer computes, but all count, is a copy of the one before.

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
        text = _openclip(pipeline.text_encoder, CLIP[family])
        layers = pipeline.text_encoder.config.num_hidden_layers
        last, after = _last_block(layers - 1), _last_block(layers)
        unused = {name.replace(last, after): tensor.clone() for name, tensor in text.items() if name.startswith(last)}
        return tensors | text | unused
    tensors |= {CLIP[family] + key: tensor for key, tensor in classic_names(pipeline.text_encoder).items()}
    return tensors | (_openclip(pipeline.text_encoder_2, OPENCLIP_XL) if family == "sdxl" else {})


def rest_of(base: Checkpoint, written: Mapping[str, Tensor], family: str) -> list[str]:
    """Keys of a checkpoint that a diffusers folder has no place for: tables of the schedule, EMA weights, and the last
    block of Stable Diffusion 2's text encoder, which `checkpoint_tensors` had to make up. Marks are not among them.

    Args:
        base: a checkpoint in one file.
        written: what `checkpoint_tensors` made of a model of this family.

    Raises:
        ModelError: it is of another family or shape than the model.
    """
    if base.family != family:
        raise ModelError(f"--base {base.path}: a checkpoint of {base.family}, not of {family}")
    for name, tensor in written.items():
        if tuple(tensor.shape) != base.shapes.get(name, tuple(tensor.shape)):
            raise ModelError(
                f"--base {base.path}: {name} is {base.shapes[name]}, and the model's {tuple(tensor.shape)}"
            )
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


def marks(scheduler: Mapping[str, Any], family: str) -> dict[str, Tensor]:
    """The empty tensors by which ComfyUI and A1111 know what an XL checkpoint predicts; each looks for its own."""
    if family != "sdxl":
        return {}
    there = {
        V_PREDICTION: scheduler.get("prediction_type") == "v_prediction",
        ZERO_TERMINAL_SNR: bool(scheduler.get("rescale_betas_zero_snr")),
    }
    return {name: torch.empty(0) for name, marked in there.items() if marked}


_VELOCITY_YAML = """\
# Read by A1111 and Forge, where it lies beside a checkpoint of the same name: this one predicts velocity.
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    parameterization: "v"
    linear_start: 0.00085
    linear_end: 0.0120
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: 1000
    first_stage_key: "jpg"
    cond_stage_key: "txt"
    image_size: 64
    channels: 4
    cond_stage_trainable: false
    conditioning_key: crossattn
    scale_factor: 0.18215
    use_ema: false
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        image_size: 32
        in_channels: 4
        out_channels: 4
        model_channels: 320
        attention_resolutions: [4, 2, 1]
        num_res_blocks: 2
        channel_mult: [1, 2, 4, 4]
        num_heads: 8
        use_spatial_transformer: true
        transformer_depth: 1
        context_dim: 768
        use_checkpoint: true
        legacy: false
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        ddconfig:
          double_z: true
          z_channels: 4
          resolution: 256
          in_channels: 3
          out_ch: 3
          ch: 128
          ch_mult: [1, 2, 4, 4]
          num_res_blocks: 2
          attn_resolutions: []
          dropout: 0.0
        lossconfig:
          target: torch.nn.Identity
    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenCLIPEmbedder
"""


_INPAINTING = {
    "ddpm.LatentDiffusion": "ddpm.LatentInpaintDiffusion",
    "conditioning_key: crossattn": "conditioning_key: hybrid\n    finetune_keys: null",
    "in_channels: 4\n        out": "in_channels: 9\n        out",
}
"""What is other in it for an inpainting model, as in Stable Diffusion's own v1-inpainting-inference.yaml."""


def yaml_beside(scheduler: Mapping[str, Any], family: str, *, image_condition: str | None = None) -> str | None:
    """What A1111 and Forge need beside a checkpoint where nothing in the file can say what it predicts."""
    if family != "sd15" or scheduler.get("prediction_type") != "v_prediction":
        return None
    text = _VELOCITY_YAML
    for plain, other in _INPAINTING.items() if image_condition == "inpainting" else ():
        text = text.replace(plain, other)
    return text


def classic_names(text_encoder: Any) -> dict[str, Tensor]:
    """A text encoder's weights under the names that every version of transformers reads."""
    state = text_encoder.state_dict()
    return {key if key.startswith("text_") else f"text_model.{key}": tensor for key, tensor in state.items()}


def _openclip(text_encoder: Any, prefix: str) -> dict[str, Tensor]:
    state, tensors = classic_names(text_encoder), {}
    thirds: dict[str, list[Tensor]] = {}
    for ours, theirs, third in openclip_keys(text_encoder.config.num_hidden_layers):
        if third is None:
            tensors[prefix + theirs] = state[ours]
        else:
            thirds.setdefault(prefix + theirs, []).append(state[ours])
    tensors |= {name: torch.cat(projections) for name, projections in thirds.items()}
    if "text_projection.weight" in state:
        tensors[f"{prefix}text_projection"] = state["text_projection.weight"].T.contiguous()
    return tensors
