"""A trainer of a UNet of two small levels, for what takes long with `tiny`: half precision on a CPU."""

from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from finetune.batch import Batch
from finetune.models.encoders import PixelEncoder
from finetune.models.lora import add_lora, trainable
from finetune.training.ema import Ema
from finetune.training.noise_prediction import NoisePrediction
from finetune.training.optimizers import make_optimizer
from finetune.training.trainer import Trainer


def small_trainer(
    method: str, optimizer: str = "adamw", objective: type[NoisePrediction] = NoisePrediction, **options: Any
) -> Trainer:
    """With an EMA; `options` are the trainer's."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 64), norm_num_groups=8, cross_attention_dim=32, attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip
    if method == "lora":
        add_lora(unet, rank=2)
    learned = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    made = make_optimizer(optimizer, trainable(unet), learning_rate=1e-3)
    return Trainer(unet, PixelEncoder(), objective(DDPMScheduler()), made, ema=Ema(learned), **options)


def small_batch() -> Batch:
    """Two grey pictures."""
    cond = {"encoder_hidden_states": torch.ones(2, 5, 32)}
    latent_params = torch.full((2, 4, 8, 8), 90, dtype=torch.uint8)
    return Batch(
        latent_params=latent_params,
        cond=cond,
        keys=torch.arange(2),
        time_ids=torch.zeros(2, 6),
        ids=("a", "b"),
        weight=torch.ones(2),
    )
