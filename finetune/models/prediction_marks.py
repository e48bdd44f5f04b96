"""How a checkpoint in one file tells programs what its UNet predicts: marks in the file, and a YAML file next to it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.models.single_file import V_PREDICTION, ZERO_TERMINAL_SNR, inspect, spread_of_v


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


_SD2 = {
    "num_heads: 8": "num_head_channels: 64",
    "use_spatial_transformer: true": "use_spatial_transformer: true\n        use_linear_in_transformer: true",
    "context_dim: 768": "context_dim: 1024",
    "modules.FrozenCLIPEmbedder": (
        'modules.FrozenOpenCLIPEmbedder\n      params:\n        freeze: true\n        layer: "penultimate"'
    ),
}
"""What is other in it for Stable Diffusion 2, as in its own v2-inference-v.yaml."""


def yaml_beside(scheduler: Mapping[str, Any], family: str, *, image_condition: str | None = None) -> str | None:
    """The YAML file that A1111 and Forge need where nothing in a checkpoint says what it predicts.

    Of Stable Diffusion 2, A1111 runs the UNet to find out, and Forge takes each for a model of noise.
    """
    if family not in ("sd15", "sd21") or scheduler.get("prediction_type") != "v_prediction":
        return None
    text = _VELOCITY_YAML
    other = (_SD2 if family == "sd21" else {}) | (_INPAINTING if image_condition == "inpainting" else {})
    for plain, changed in other.items():
        text = text.replace(plain, changed)
    return text


def assumed_predictions(path: Path) -> dict[str, str]:
    """Program -> what it takes the UNet of a checkpoint in one file to predict, by the rules of its own code.

    Read from ComfyUI (supported_models.py), Forge (loader.py, huggingface_guess) and A1111 (sd_models_config.py). Of
    Stable Diffusion 2, A1111 runs the UNet where there is no YAML file; that is left out.
    """
    checkpoint = inspect(path)
    marked = "v_prediction" if V_PREDICTION in checkpoint.shapes else "epsilon"
    yaml = path.with_suffix(".yaml")
    by_yaml = "v_prediction" if yaml.is_file() and 'parameterization: "v"' in yaml.read_text(encoding="utf-8") else None
    comfyui = "epsilon"
    if checkpoint.family == "sdxl":
        comfyui = marked
    elif checkpoint.family == "sd21" and checkpoint.configs["unet"]["in_channels"] == 4 and spread_of_v(path):
        comfyui = "v_prediction"
    webui = by_yaml or (marked if checkpoint.family == "sdxl" else "epsilon")
    return {"ComfyUI": comfyui, "Forge": webui} | (
        {} if checkpoint.family == "sd21" and not by_yaml else {"A1111": webui}
    )


_NODES = {
    "epsilon": "ModelSamplingDiscrete with eps",
    "v_prediction": "ModelSamplingDiscrete with v_prediction",
    "sample": "ModelSamplingDiscrete with x0",
    "flow": "ModelSamplingSD3",
}
"""Prediction type -> ComfyUI's node that sets it."""


def set_by_hand(path: Path, prediction_type: str) -> list[str]:
    """A line for each program that would take the checkpoint for a model of something else.

    Args:
        path: a checkpoint in one file.
        prediction_type: what its UNet predicts.
    """
    lines = []
    for program, assumed in assumed_predictions(path).items():
        if assumed != prediction_type:
            remedy = f"add the node {_NODES[prediction_type]}" if program == "ComfyUI" else "it has no setting for that"
            lines.append(
                f"{program} takes {path.name} for a model that predicts {assumed}, not {prediction_type}: {remedy}"
            )
    return lines
