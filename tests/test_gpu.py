"""Whole runs on a CUDA device: `pytest -m gpu`."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from finetune.batch import Batch
from finetune.cache.encode import encode
from finetune.config import TrainConfig
from finetune.data.image_folder import ImageFolder
from finetune.data.loader import batches
from finetune.data.prefetch import ahead
from finetune.models.loading import load_model
from finetune.models.lora import add_lora, trainable
from finetune.models.tiny import tiny_folder
from finetune.recipe import fine_tune
from finetune.training import async_writer
from finetune.training.gradient_checkpointing import recompute
from finetune.training.noise_prediction import NoisePrediction
from finetune.training.optimizers import make_optimizer
from finetune.training.trainer import Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(autouse=True)
def global_generator_untouched() -> None:
    """Whole runs go through diffusers pipelines, which may draw from torch's global generator."""


def run(pictures: Path, output: Path, **more: object) -> Path:
    basic = {"data": str(pictures), "output_dir": str(output), "max_train_steps": 6, "train_batch_size": 2}
    return fine_tune(TrainConfig(**(basic | {"sample_every": 3, "num_inference_steps": 2} | more)))


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_every_method_and_precision_trains_and_exports(
    pictures: Path, tmp_path: Path, method: str, precision: str
) -> None:
    out = run(pictures, tmp_path / "out", method=method, mixed_precision=precision)
    assert len(losses(out)) == 6
    assert all(0 < loss < 10 for loss in losses(out))
    if method == "lora":
        StableDiffusionPipeline.from_pretrained(tiny_folder()).load_lora_weights(str(out))
    else:
        StableDiffusionPipeline.from_pretrained(out)


def test_bf16_alone_trains_goes_on_and_exports(pictures: Path, tmp_path: Path) -> None:
    config = {"method": "full", "full_bf16": True, "optimizer": "adafactor", "lr_scheduler": "constant"}
    straight = run(pictures, tmp_path / "straight", deterministic=True, max_train_steps=8, **config)
    run(pictures, tmp_path / "out", deterministic=True, **config)
    out = run(
        pictures, tmp_path / "out", deterministic=True, max_train_steps=8, resume_from_checkpoint="latest", **config
    )
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert (out / unet).read_bytes() == (straight / unet).read_bytes()
    StableDiffusionPipeline.from_pretrained(out)


def test_losses_equal_those_of_a_cpu_run(pictures: Path, tmp_path: Path) -> None:
    """Law 1: noise, timesteps and order are drawn on the CPU, the same for every device."""
    cuda = run(pictures, tmp_path / "cuda", mixed_precision="no", rank=4)
    cpu = tmp_path / "cpu"
    command = [sys.executable, "-m", "finetune", "--config", str(cuda / "config.toml"), "--output_dir", str(cpu)]
    subprocess.run(command, check=True, env=os.environ | {"ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert losses(cuda) == pytest.approx(losses(cpu), rel=1e-2)


def trained(
    pictures: Path, method: str, *, cuda_graphs: bool, recomputed: float = 0.0
) -> tuple[Trainer, Iterator[Batch]]:
    """A trainer of `tiny` in bf16, and eight batches for it."""
    model = load_model("tiny")
    if method == "lora":
        add_lora(model.unet, rank=4)
    encoded = encode(ImageFolder(pictures, "a disc", resolution=64), model, cache_dir="none")
    model.unet.to("cuda")
    recompute(model.unet, recomputed)
    learned = trainable(model.unet.requires_grad_(True) if method == "full" else model.unet)
    optimizer = make_optimizer("adamw", learned, learning_rate=1e-4)
    objective = NoisePrediction(model.scheduler)
    options: dict[str, Any] = {"precision": torch.bfloat16, "cuda_graphs": cuda_graphs, "micro_batch_size": 1}
    trainer = Trainer(model.unet, model.encoder, objective, optimizer, **options)
    return trainer, batches(encoded, batch_size=2, steps=8)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("recomputed", [0.0, 0.5, 1.0])
def test_graphs_change_nothing(pictures: Path, method: str, recomputed: float) -> None:
    found = []
    for cuda_graphs in (True, False):
        trainer, all_batches = trained(pictures, method, cuda_graphs=cuda_graphs, recomputed=recomputed)
        made = [trainer.step(batch) for batch in all_batches]
        assert (trainer.graphs is not None) == cuda_graphs
        assert trainer.graphs is None or trainer.graphs._recorded
        found.append(
            ([metrics.loss for metrics in made], torch.cat([p.flatten() for p in trainer.parameters.values()]))
        )
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-3)
    assert (found[0][1] - found[1][1]).norm() <= 1e-3 * found[1][1].norm()


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_a_step_waits_for_nothing(pictures: Path, method: str, cuda_graphs: bool) -> None:
    trainer, all_batches = trained(pictures, method, cuda_graphs=cuda_graphs)
    with ahead(trainer.prepare(batch) for batch in all_batches) as steps:
        for _ in range(4):  # makes the optimizer's state, and records the graph
            trainer.run_prepared(next(steps))
        torch.cuda.set_sync_debug_mode("error")
        try:
            made = [trainer.run_prepared(step) for step in steps]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(0 < metrics.loss < 10 for metrics in made)


def test_compiled_blocks_give_the_losses_of_others(pictures: Path, tmp_path: Path) -> None:
    plain = run(pictures, tmp_path / "plain", mixed_precision="no", deterministic=True, rank=4, compile=False)
    compiled = run(pictures, tmp_path / "compiled", mixed_precision="no", deterministic=True, rank=4, compile=True)
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-3)


def test_live_encoding_gives_the_losses_of_kept_encodings(pictures: Path, tmp_path: Path) -> None:
    kept = run(pictures, tmp_path / "kept", mixed_precision="no", rank=4)
    live = run(pictures, tmp_path / "live", mixed_precision="no", rank=4, live_encoding=True)
    assert losses(kept) == pytest.approx(losses(live), rel=1e-3)  # cuDNN multiplies in TF32


def test_a_picture_and_a_caption_encode_to_the_same_bits_among_any_others() -> None:
    model = load_model("tiny").to("cuda")
    pixels = torch.rand(11, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    prompts = [f"a disc, number {number}" for number in range(11)]
    order = torch.tensor([3, 10, 0, 7, 5, 1, 9, 2, 8, 6, 4])
    latent_params, states = model.encoder.encode(pixels), model.conditioner.encode(prompts)["encoder_hidden_states"]
    assert torch.equal(model.encoder.encode(pixels[order]), latent_params[order])
    assert torch.equal(model.encoder.encode(pixels[4:5]), latent_params[4:5])
    shuffled = model.conditioner.encode([prompts[number] for number in order.tolist()])["encoder_hidden_states"]
    assert torch.equal(shuffled, states[order])


def test_a_run_in_volumes_trains_on_all_of_them(pictures: Path, tmp_path: Path) -> None:
    out = run(pictures, tmp_path / "out", volume_size=3, resolution=64, validation_fraction=0.0)
    assert len(losses(out)) == 6
    held = [json.loads(line) for line in (out / "volumes.jsonl").read_text().splitlines()]
    assert [line["volume"] for line in held] == [1]  # the first is in ledger.json


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_longer_run_resumes(pictures: Path, tmp_path: Path, precision: str) -> None:
    config = {"mixed_precision": precision, "rank": 4, "use_ema": True, "lr_warmup_steps": 0}
    config["lr_scheduler"] = "constant"  # any other ends with its run
    straight = run(pictures, tmp_path / "straight", max_train_steps=10, **config)
    run(pictures, tmp_path / "out", **config)
    resumed = run(pictures, tmp_path / "out", max_train_steps=10, resume_from_checkpoint="latest", **config)
    assert losses(resumed) == pytest.approx(losses(straight), rel=1e-4)
    ours, theirs = (load_file(out / "checkpoint-10/optimizer.safetensors") for out in (resumed, straight))
    assert all(torch.allclose(tensor, theirs[name], rtol=1e-2, atol=1e-6) for name, tensor in ours.items())


def test_a_deterministic_run_gives_the_same_bits(pictures: Path, tmp_path: Path) -> None:
    a, b = (run(pictures, tmp_path / name, deterministic=True, method="full") for name in "ab")
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert (a / unet).read_bytes() == (b / unet).read_bytes()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_everything_that_can_be_watched_or_weighed_is_where_the_unet_is(
    pictures: Path, tmp_path: Path, method: str
) -> None:
    folder = tmp_path / "masked"
    folder.mkdir()
    for path in sorted(pictures.glob("*.png")):
        (folder / path.name).write_bytes(path.read_bytes())
        with Image.open(path) as picture:
            Image.new("L", picture.size, 128).save(folder / f"{path.stem}.mask.png")
    more = {"class_data": str(pictures), "prior_prediction": True, "validation_data": None, "forgetting_prompts": 4}
    more |= {"prompt": "a disc", "validation_fraction": 0.4, "validate_every": 2, "early_stop": True, "use_ema": True}
    out = run(folder, tmp_path / "out", method=method, checkpointing_steps=3, **more)
    for name in ("metrics.jsonl", "validation.jsonl", "forgetting.jsonl"):
        assert (out / name).read_text().count("\n") >= 2


def test_the_copy_of_a_state_holds_the_values_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_writer, "PIECE", 1024)
    weight = torch.arange(24000.0, device="cuda").view(20, 20, 6, 10).to(memory_format=torch.channels_last)
    state = {
        "weights": {"w": weight, "half": weight.half(), "nothing": weight[:0]},
        "optimizer": {"state": {0: {"step": torch.full((), 3.0, device="cuda"), "host": torch.ones(2)}}},
    }
    copy = async_writer.copied(state)
    assert copy is not None
    assert copy["weights"]["w"].flatten().tolist() == list(range(24000))
    assert copy["weights"]["half"].equal(weight.half().cpu())
    assert copy["weights"]["nothing"].shape == (0, 20, 6, 10)
    assert copy["optimizer"]["state"][0]["step"] == 3
    assert copy["optimizer"]["state"][0]["host"].tolist() == [1, 1]
