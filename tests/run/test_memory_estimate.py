import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from finetune.config import ResolvedConfig, TrainConfig
from finetune.errors import UsageError
from finetune.models.loading import load_model
from finetune.models.model_info import locate
from finetune.models.source import open_source
from finetune.recipe import fine_tune
from finetune.run.resolve_config import resolve
from finetune.run.resource_estimate import (
    LIBRARIES,
    bytes_of,
    check_memory,
    kept_numbers,
    needed_bytes,
    out_of_memory,
    takes_less,
)

CPU = torch.device("cpu")
SD15 = {
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
}


def resolved(**options: object) -> ResolvedConfig:
    config = TrainConfig(**options)
    return resolve(config, locate(config.model), pictures=9, varied_captions=False, device=CPU)


@pytest.mark.parametrize(("model", "side"), [("tiny", 16), ("tiny", 32), ("ddpm", 32)])
def test_what_is_kept_for_the_backward_pass_is_as_counted(model: str, side: int) -> None:
    unet = load_model(model, resolution=32 if model == "ddpm" else None).unet
    weights = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    latent = model == "tiny"
    cond = {"encoder_hidden_states": torch.zeros(1, 77, 96)} if latent else {}
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        unet(torch.zeros(1, unet.config["in_channels"], side, side), torch.tensor([5]), **cond)
    pluralize = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 4
    assert kept_numbers(unet.config, side, latent=latent) == pytest.approx(pluralize, rel=0.06)


def test_stable_diffusion_at_512_pixels_keeps_what_was_counted() -> None:
    assert kept_numbers(SD15, 64, latent=True) == pytest.approx(467_768_192, rel=0.01)


def test_what_learns_and_how_it_computes_counts() -> None:
    def needed(**options: object) -> float:
        return needed_bytes(resolved(model="tiny", data="x", **options), locate("tiny"), torch.device("cuda"))

    lora, full = needed(), needed(method="full", use_ema=False)
    weights = 4_707_556  # of its UNet
    assert lora > 4 * weights
    frozen = 4 * sum(open_source(locate("tiny")).numbers(part) for part in ("vae", "text_encoder"))
    in_main_memory = needed_bytes(resolved(model="tiny", data="x"), locate("tiny"), CPU)
    assert in_main_memory == pytest.approx(1.1 * (lora + frozen) + LIBRARIES)
    assert full - lora == 4 * 3 * weights  # gradients and two moments
    assert needed(method="full", use_ema=True) - full == 4 * weights
    assert needed(method="full", use_ema=False, optimizer="sgd") == full - 4 * 2 * weights
    masters = {"method": "full", "mixed_precision": "bf16", "use_ema": False, "optimizer": "adafactor"}
    many = {"train_batch_size": 64}  # whose activations are more than what an update takes
    assert needed(**masters, **many) - needed(**masters, **many, full_bf16=True) == 4 * weights
    alone = {**masters, "model": "tiny", "data": "x", "full_bf16": True, "aspect_ratio_bucketing": False}
    plain, fused = (bytes_of(resolved(**alone, fused_backward_pass=on), weights, activations=0) for on in (None, True))
    assert plain - fused == 2 * weights
    assert needed(train_batch_size=16) > lora > needed(gradient_checkpointing=0.25)
    assert (
        needed(gradient_checkpointing=0.25) > needed(gradient_checkpointing=0.6) > needed(gradient_checkpointing=True)
    )


def needed_on_an_h100(method: str, batch: int) -> float:
    """GB of Stable Diffusion 1.5 at 512 px in bf16, where its frozen parts are on the CPU."""
    options: dict[str, Any] = {"method": method, "train_batch_size": batch, "mixed_precision": "bf16"}
    config = resolved(model="tiny", data="x", use_ema=False, **options)
    return bytes_of(config, 859_520_964, kept_numbers(SD15, 64, latent=True) * batch) / 1e9


@pytest.mark.parametrize(
    ("method", "batch", "measured"),
    [("lora", 1, 2.9), ("lora", 4, 5.8), ("lora", 16, 17.5), ("full", 16, 28.0), ("full", 32, 43.7)],
)
def test_a_gpu_needs_what_was_measured_on_one(method: str, batch: int, measured: float) -> None:
    assert needed_on_an_h100(method, batch) == pytest.approx(measured, rel=0.1)


def test_sizes_that_cannot_work_are_refused_before_anything_is_made(pictures: Path, tmp_path: Path) -> None:
    config = TrainConfig(model="ddpm", resolution=4096, data=str(pictures), output_dir=str(tmp_path / "out"))
    with pytest.raises(UsageError, match=r"training 16 x 4096 px at once would take about [\d.]+ GB of the .* GB here"):
        fine_tune(config)
    assert not (tmp_path / "out").exists()
    assert check_memory(resolved(data="x"), locate("tiny"), CPU).startswith("about 0.")


def test_what_would_fit_is_what_costs_the_least_time() -> None:
    many: dict[str, Any] = {"model": "tiny", "data": "x", "resolution": 512, "train_batch_size": 24}
    config, found = resolved(**many), locate("tiny")

    def less(at_most: float) -> str:
        return takes_less(config, found, CPU, at_most * 1e9)

    assert needed_bytes(config, found, CPU) > 4e9
    assert less(8).startswith("--train_batch_size 12 --gradient_accumulation_steps 2 would take about ")
    assert less(1.5).startswith("--train_batch_size 1 --gradient_accumulation_steps 24 would take about 1.")
    assert re.fullmatch(
        r"--gradient_checkpointing --train_batch_size 1 --gradient_accumulation_steps 24 would take about \d\.\d GB, "
        r"and a lower --resolution less",
        less(0.1),
    )
    assert re.fullmatch(
        r"out of memory, of which training 1 x 512 px was thought to take about 1\.\d GB; "
        r"--gradient_checkpointing would take about \d\.\d GB",
        out_of_memory(config, found, CPU),
    )


def test_of_full_fine_tuning_bf16_alone_takes_less_and_updates_in_the_backward_pass_the_least() -> None:
    options: dict[str, Any] = {"resolution": 128, "mixed_precision": "bf16", "train_batch_size": 1}
    config, found = resolved(model="ddpm", data="x", gradient_checkpointing=True, **options), locate("ddpm")
    needed = needed_bytes(config, found, CPU)
    told = takes_less(config, found, CPU, needed - 1e5)
    assert told.startswith("--full_bf16 --optimizer adafactor would take about ")
    told = takes_less(config, found, CPU, needed - 1e9)
    assert told.startswith("--full_bf16 --optimizer adafactor --fused_backward_pass would take about ")
    tiny = resolved(model="tiny", data="x", method="full", train_batch_size=1, gradient_checkpointing=True)
    assert takes_less(tiny, locate("tiny"), CPU, 1).startswith("--method lora would take about 0.8 GB, and a lower ")
    lora = resolved(model="tiny", data="x", train_batch_size=1, gradient_checkpointing=True)
    assert takes_less(lora, locate("tiny"), CPU, 1) == "a lower --resolution takes less"


def test_the_largest_resolution_of_the_sources_decides() -> None:
    options: dict[str, Any] = {"model": "tiny", "data": ("a", "b"), "resolution": 64}
    sources = ("resolution = 128", "random_flip = true")
    plain, found = resolved(**options), locate("tiny")
    larger = resolved(**options, source_settings=sources)
    needed = [needed_bytes(config, found, torch.device("cuda")) for config in (plain, larger)]
    at_128 = needed_bytes(resolved(**options | {"resolution": 128}), found, torch.device("cuda"))
    assert needed[1] == at_128 > needed[0]
