"""Configs of other trainers, as people share them: nothing that matters is left out, and each trains two steps."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune.cli import main
from finetune.config import TrainConfig, load_config, replace
from finetune.recipe import fine_tune
from finetune.source_options import parse_settings, settings_text

FOLDER = Path(__file__).parents[1] / "foreign"
CONFIGS = sorted(
    path
    for path in FOLDER.rglob("*.*")
    if path.parent == FOLDER or path.name in ("config.json", "train.json")
)  # fmt: skip
HALVES = 16
"""How many times smaller images are here than there."""


@pytest.fixture(autouse=True)
def global_generator_untouched() -> None:
    """Loading an adapter through diffusers or peft draws from the global generator."""


def imported(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    monkeypatch.chdir(tmp_path)
    assert main(["import", "--file", str(path), "--to", "imported.toml"]) == 0
    return load_config("imported.toml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_at_most_one_setting_is_left_out(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    imported(path, tmp_path, monkeypatch)
    left = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left: ")]
    assert len(left) <= 1, left


def made_small(config: TrainConfig) -> TrainConfig:
    """The same for a small model and two steps, without what is elsewhere: models, trackers, GPUs."""
    pixels = config.model == "ddpm"
    small: dict[str, Any] = {
        "model": "ddpm" if pixels else "tiny", "vae": None, "resolution": 32 if pixels else 64, "cache_dir": "none",
        "max_train_steps": 2, "num_train_epochs": None, "train_batch_size": min(config.train_batch_size or 1, 2),
        "gradient_accumulation_steps": 1, "mixed_precision": "no", "num_inference_steps": 0, "report_to": (),
        "forgetting_prompts": 0, "sample_every": 0, "save_image_epochs": None, "compile": False,
        "dataloader_num_workers": 0, "min_bucket_reso": None, "max_bucket_reso": None, "bucket_reso_steps": None,
        "num_class_images": None, "output_dir": "run",
    }  # fmt: skip
    if config.lr_warmup_steps:
        small["lr_warmup_steps"] = 1
    if config.lora_type != "lokr":
        small |= {"rank": min(config.rank, 8), "conv_rank": config.conv_rank and min(config.conv_rank, 8)}
    if config.full_bf16:
        small["mixed_precision"] = "bf16"
    settings = [parse_settings(text) for text in config.source_settings]
    for each in settings:
        if "resolution" in each:
            each["resolution"] //= HALVES
    small["source_settings"] = tuple(map(settings_text, settings))
    given = frozenset(name for name in config.given if small.get(name, ...) is not None)
    return replace(config, given | {"model", "max_train_steps"}, **small)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_foreign_config_trains(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_pictures: Callable[..., Path]
) -> None:
    config = imported(path, tmp_path, monkeypatch)
    for folder in filter(None, (*config.data, config.class_data, config.validation_data)):
        make_pictures(tmp_path / folder, count=6, captions=config.caption_source == "files")
    if config.validation_data:  # other images than those that are trained on
        for number, file in enumerate(sorted((tmp_path / config.validation_data).glob("*.png"))):
            Image.effect_mandelbrot((64, 64), (-3, -2.5 + number / 3, 2, 2.5), 90).convert("RGB").save(file)
    if not config.data:
        config = replace(config, frozenset(config.given | {"data"}), data=(str(make_pictures(tmp_path / "data")),))
    small = made_small(config)
    run = fine_tune(small)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 2
