"""The model that a run starts from."""

import re
from collections.abc import Iterable

import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from finetune.config import ResolvedConfig
from finetune.errors import UsageError
from finetune.models.loading import DiffusionModel, load_model
from finetune.models.locate import Location
from finetune.models.lora import add_lora


def numbers_by_block(option: str, given: Iterable[str], names: Iterable[str]) -> dict[str, float]:
    """ "up_blocks.1=8" ... -> beginning of a layer's name -> number. Raises UsageError for what is otherwise."""
    found: dict[str, float] = {}
    for text in given:
        begin, _, number = text.partition("=")
        if not re.fullmatch(r"\d+(\.\d+)?", number):
            raise UsageError(f"{option} {text}: allowed is BLOCK=NUMBER, such as up_blocks.1=2")
        if not any(name.startswith(begin) for name in names):
            blocks = sorted({".".join(name.split(".")[: 2 if name[:2] in ("do", "up") else 1]) for name in names})
            raise UsageError(f"{option} {text}: no layer begins like that; the UNet's blocks: {', '.join(blocks)}")
        found[begin] = float(number)
    return found


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
        adapt(config, model.unet)
    return model


def adapt(config: ResolvedConfig, unet: UNet2DConditionModel | UNet2DModel) -> None:
    """Add the untrained adapter of a LoRA run to a UNet."""
    add_lora(
        unet,
        rank=config.rank,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        seed=config.seed,
        kind=config.lora_type,
        block_ranks=numbers_by_block("block_rank", config.block_rank or (), dict(unet.named_parameters())),
    )
