"""The model that a run starts from."""

import torch

from finetune.config import ResolvedConfig
from finetune.models.loading import DiffusionModel, load_model
from finetune.models.locate import Location
from finetune.models.lora import add_lora


def load_base(config: ResolvedConfig, found: Location, dtype: torch.dtype) -> DiffusionModel:
    """The base model as the run's config says, with an untrained adapter for a LoRA; `dtype` is its UNet's."""
    model = load_model(
        found,
        resolution=config.resolution,
        dtype=dtype,
        prediction_type=config.prediction_type,
        max_token_length=config.max_token_length,
        clip_skip=config.clip_skip,
        tokenizer=config.tokenizer,
        vae=config.vae,
        seed=config.seed,
    )
    if config.method == "lora":
        add_lora(
            model.unet,
            config.rank,
            config.lora_alpha,
            config.lora_dropout,
            config.lora_target_modules,
            config.seed,
            config.lora_type,
        )
    return model
