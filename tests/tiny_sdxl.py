"""A Stable Diffusion XL of the smallest size with random weights: the real one's parts and block layout."""

import shutil
from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from finetune.models.loading import load_model
from finetune.models.tiny import tiny_folder

WIDTH = 32


def make_tiny_sdxl(folder: Path) -> Path:
    """Write the pipeline, with the embedded model's VAE and its tokenizer twice; 64 px."""
    for part in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tiny_folder() / "tokenizer", folder / part)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=77, projection_dim=WIDTH, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=16, block_out_channels=(32, 64, 64), norm_num_groups=8, cross_attention_dim=2 * WIDTH,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 3), attention_head_dim=(2, 4, 4), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=WIDTH + 6 * 8,
        )  # fmt: skip
        encoders = CLIPTextModel(text), CLIPTextModelWithProjection(text)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    StableDiffusionXLPipeline(
        vae=load_model("tiny").encoder.vae, text_encoder=encoders[0], text_encoder_2=encoders[1], tokenizer=tokenizer,
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"), unet=unet, scheduler=scheduler,
    ).save_pretrained(folder)  # fmt: skip
    return folder
