import pytest
import torch
from loops import RandomLatents, latent_sampler, our_loop, our_trainer, schedule, unet_of

import finetune as ft


@pytest.fixture(autouse=True)
def global_generator_untouched() -> None:
    """A benchmark's weights are drawn as torch draws any."""


@pytest.mark.parametrize("method", ["lora", "bf16", "fused"])
def test_our_loop_trains_on_random_latents(method: str) -> None:
    unet = unet_of("sd15", torch.device("cpu"), torch.float32, width=32)
    if method == "lora":
        ft.add_lora(unet, rank=2)
    precision = None if method == "lora" else torch.bfloat16
    objective = ft.NoisePrediction(schedule())
    trainer = our_trainer(unet, latent_sampler(), objective, precision, method)
    source = RandomLatents("sd15", side=64, batch=2)
    with our_loop(trainer, ft.batches(source, batch_size=2, steps=2)) as step:
        step()
        step()
    assert trainer.steps_done == 2
