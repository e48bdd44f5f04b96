"""Stable Diffusions of the real block layouts, 32 channels wide, with random weights; as folders and as one file."""

import copy
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from finetune.models import single_file
from finetune.models.clip_tokenizer import END, clip_tokenizer
from finetune.models.ldm_file import checkpoint_tensors
from finetune.models.tensor_file import write_tensors
from finetune.models.tiny import tiny_folder

HIDDEN = 64
WIDTH = 64


RELATIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "BK-SDM small": ("sd15", {"layers_per_block": 1}),
    "BK-SDM tiny": (
        "sd15",
        {
            "layers_per_block": 1, "block_out_channels": (64, 128, 256), "mid_block_type": None,
            "down_block_types": ("CrossAttnDownBlock2D",) * 3, "up_block_types": ("CrossAttnUpBlock2D",) * 3,
        },
    ),
    "SSD-1B": (
        "sdxl",
        {
            "transformer_layers_per_block": (1, 2, 4), "mid_block_type": "UNetMidBlock2D",
            "reverse_transformer_layers_per_block": ((4, 4, 5), (2, 1, 1), 1),
        },
    ),
    "inpainting": ("sd15", {"in_channels": 9}),
    "XL inpainting": ("sdxl", {"in_channels": 9}),
    "KOALA": ("sdxl", {"layers_per_block": 1, "transformer_layers_per_block": (1, 2, 5), "mid_block_type": None}),
}  # fmt: skip
"""UNets that paint into pictures, or have fewer blocks -> what they come from, and what is other in their config."""


def small_pipeline(family: str, prediction_type: str = "epsilon", **unet: Any) -> Any:
    """A pipeline of "sd15", "sd21" or "sdxl", its UNet's config changed by what is given."""
    xl, v2 = family == "sdxl", family == "sd21"
    channels = [WIDTH * factor for factor in ((1, 2, 4) if xl else (1, 2, 4, 4))]
    tokenizers = {
        name: clip_tokenizer(str(tiny_folder() / "tokenizer"), pad)
        for name, pad in {"tokenizer": "!" if v2 else END, **({"tokenizer_2": "!"} if xl else {})}.items()
    }
    words = len(tokenizers["tokenizer"])
    text = CLIPTextConfig(
        vocab_size=words, hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_hidden_layers=3, num_attention_heads=1,
        max_position_embeddings=77, projection_dim=HIDDEN, bos_token_id=words - 2, eos_token_id=words - 1,
        pad_token_id=words - 1, hidden_act="gelu" if v2 else "quick_gelu",
    )  # fmt: skip
    shape: dict[str, Any] = {
        "block_out_channels": channels, "cross_attention_dim": HIDDEN, "sample_size": 64,
        "attention_head_dim": 8 if family == "sd15" else [count // 64 for count in channels],
        "use_linear_projection": family != "sd15",
    }  # fmt: skip
    if xl:
        shape |= {
            "cross_attention_dim": 2 * HIDDEN, "sample_size": 128, "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": HIDDEN + 6 * 8,
            "transformer_layers_per_block": (1, 2, 3),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        parts: dict[str, Any] = {
            "unet": UNet2DConditionModel(**shape | unet),
            "vae": AutoencoderKL(
                block_out_channels=(32, 64, 128, 128), layers_per_block=2, latent_channels=4,
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                scaling_factor=0.13025 if xl else 0.18215, sample_size=1024 if xl else 512,
            ),
            "text_encoder": CLIPTextModel(text),
        }  # fmt: skip
        if xl:
            second = copy.deepcopy(text)
            second.hidden_act = "gelu"
            parts["text_encoder_2"] = CLIPTextModelWithProjection(second)
    config = single_file._scheduler(family, prediction_type, zero_snr=False)
    parts["scheduler"] = getattr(diffusers, config["_class_name"]).from_config(config)
    if xl:
        return StableDiffusionXLPipeline(**parts, **tokenizers, add_watermarker=False)
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**parts, **tokenizers, **none)


def write_single_file(path: Path, family: str, pipeline: Any = None, **more: torch.Tensor) -> Path:
    """The pipeline as a checkpoint in one file, with more tensors, such as marks, beside."""
    tensors = dict(checkpoint_tensors(pipeline or small_pipeline(family), family)) | more
    write_tensors(path, tensors, {})
    return path
