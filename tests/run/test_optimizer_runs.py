"""Runs with optimizers and schedules of other packages, and of the user's own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import finetune as ft
from finetune.errors import Interrupted, RunError, UsageError
from finetune.models.lora import LORA_FILE


@pytest.fixture(autouse=True)
def global_generator_untouched() -> None:
    """Whole runs go through diffusers pipelines, which may draw from torch's global generator."""


def config(pictures: Path, output: Path, **options: Any) -> ft.TrainConfig:
    basic = {"data": str(pictures), "output_dir": str(output), "max_train_steps": 5, "train_batch_size": 1, "rank": 2}
    basic |= {"num_inference_steps": 2, "validation_fraction": 0.4, "validate_every": 1}
    return ft.TrainConfig(**basic | options)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["schedulefree_adamw", "soap", "muon", "prodigy_schedulefree"])
def test_a_resumed_run_ends_with_the_same_bits(pictures: Path, tmp_path: Path, name: str) -> None:
    straight = ft.fine_tune(config(pictures, tmp_path / "straight", optimizer=name))
    with pytest.raises(Interrupted):
        ft.fine_tune(config(pictures, tmp_path / "resumed", optimizer=name, max_train_minutes=1e-9))
    resumed = ft.fine_tune(config(pictures, tmp_path / "resumed", optimizer=name))
    assert metrics(resumed) == metrics(straight)
    assert (resumed / LORA_FILE).read_bytes() == (straight / LORA_FILE).read_bytes()


def test_validation_and_exports_see_the_average_and_change_nothing(pictures: Path, tmp_path: Path) -> None:
    often = ft.fine_tune(config(pictures, tmp_path / "often", optimizer="schedulefree_adamw"))
    few = {"validate_every": 5, "sample_every": 0}
    rarely = ft.fine_tune(config(pictures, tmp_path / "rarely", optimizer="schedulefree_adamw", **few))
    assert [line["loss"] for line in metrics(often)] == [line["loss"] for line in metrics(rarely)]
    exported = load_file(rarely / LORA_FILE)
    assert all(torch.equal(tensor, exported[key]) for key, tensor in load_file(often / LORA_FILE).items())
    trained = load_file(rarely / "checkpoint-5/trainable.safetensors")
    pairs = [
        (tensor, trained[key.removeprefix("unet.").replace(".weight", ".default.weight")])
        for key, tensor in exported.items()
    ]
    assert len(pairs) == len(trained)
    assert not all(torch.equal(mean, last) for mean, last in pairs)


def test_an_ema_of_an_average_is_refused(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="use_ema cannot be used with optimizer schedulefree_adamw, which averages"):
        ft.fine_tune(config(pictures, tmp_path, optimizer="schedulefree_adamw", use_ema=True))


def test_an_optimizer_and_a_schedule_by_import_path(pictures: Path, tmp_path: Path) -> None:
    own: dict[str, Any] = {
        "optimizer": "torch.optim:NAdam",
        "optimizer_args": ("momentum_decay=0.01", "betas=0.8,0.9"),
        "lr_scheduler": "tests.training.test_learning_rate:halved",
        "lr_warmup_steps": 0,
        "learning_rate": 1e-3,
    }
    folder = ft.fine_tune(config(pictures, tmp_path / "own", **own))
    rates = [line["lr"] for line in metrics(folder)]
    assert rates == [1e-3 * 0.5**step for step in range(5)]
    with pytest.raises(RunError, match="halved returned nan for step 5"):
        ft.fine_tune(config(pictures, tmp_path / "nan", **own | {"lr_warmup_steps": 1, "max_train_steps": 6}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adamv"}, "optimizer = adamv: expected adamw, .*, stableadamw or package.module:name"),
        ({"optimizer": "no.where:X"}, "optimizer = 'no.where:X': No module named 'no'"),
        ({"optimizer": "lion", "adam_beta1": 0.5}, "adam_beta1 cannot be used here: it needs an optimizer of the Adam"),
        ({"optimizer_args": ("speed=2",)}, "optimizer_args speed: AdamW has no such argument"),
        ({"lr_scheduler": "cosin"}, "lr_scheduler = cosin: expected constant, .* or package.module:name"),
        (
            {"lr_scheduler": "constant", "lr_end": 0.1},
            "lr_end cannot be used here: it needs a schedule that has an end",
        ),
        ({"lr_scheduler": "cosine", "lr_power": 2.0}, "lr_power cannot be used here: it needs lr_scheduler polynomial"),
    ],
)
def test_what_cannot_be_used_is_refused_before_training(
    pictures: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        ft.fine_tune(config(pictures, tmp_path / "out", **options))
