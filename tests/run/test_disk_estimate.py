"""How many bytes a run writes."""

from pathlib import Path

import pytest
import torch

from finetune.config import TrainConfig
from finetune.models.model_info import locate
from finetune.recipe import fine_tune
from finetune.run.build_dataset import open_pictures
from finetune.run.resolve_config import resolve_for
from finetune.run.resource_estimate import DiskUse, disk_line, disk_use


def size_of(*places: Path) -> int:
    files = [path for place in places for path in (place.rglob("*") if place.is_dir() else [place])]
    return sum(path.stat().st_size for path in files if path.is_file())


def estimated(config: TrainConfig) -> DiskUse:
    found = locate(config.model)
    chunks = open_pictures(config, found, None)
    return disk_use(resolve_for(config, found, chunks, torch.device("cpu")), found, chunks)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 32, "use_ema": True, "lora_target_modules": ["to_q", "to_k", "conv1"]},
        {"method": "full", "use_ema": False, "optimizer": "sgd", "random_flip": True, "cache_precision": "fp16"},
        {"method": "full", "use_ema": True, "export_formats": ["unet"], "export_precision": "bf16"},
        {"model": "ddpm", "resolution": 32, "random_flip": True},
    ],
)
def test_a_run_writes_about_what_was_computed(pictures: Path, tmp_path: Path, options: dict[str, object]) -> None:
    common = {
        "data": str(pictures), "output_dir": str(tmp_path / "run"), "cache_dir": str(tmp_path / "cache"),
        "resolution": 64, "max_train_steps": 4, "checkpointing_steps": 1, "checkpoints_total_limit": 3,
        "train_batch_size": 2, "num_inference_steps": 0, "encode": "before", "lr_warmup_steps": 0,
    }  # fmt: skip
    config = TrainConfig(**common | options)
    use, run = estimated(config), fine_tune(config)
    checkpoints = sorted(run.glob("checkpoint-*"))
    assert (len(checkpoints), use.checkpoints) == (3, 4)  # the fourth is whole before the first is deleted
    assert use.checkpoint == pytest.approx(size_of(checkpoints[0]), rel=0.1)
    parts = [
        place for place in run.iterdir() if place.is_dir() and place.name in ("unet", "vae", "text_encoder", "exports")
    ]
    written = size_of(*parts, *run.glob("*.safetensors"))
    assert 0.95 * written < use.exports < 1.15 * written  # frozen parts are copied, and may be in half precision
    assert use.encodings == pytest.approx(size_of(*(tmp_path / "cache").rglob("*.safetensors")), rel=0.2)


def test_nothing_is_written_where_nothing_is_cached(pictures: Path) -> None:
    assert estimated(TrainConfig(data=str(pictures), cache_dir="none")).encodings == 0


def test_too_small_a_disk_is_named(pictures: Path, tmp_path: Path) -> None:
    config = TrainConfig(data=str(pictures))
    found = locate("tiny")
    resolved = resolve_for(config, found, open_pictures(config, found, None), torch.device("cpu"))
    line = disk_line(resolved, DiskUse(0, 1e17, 2, 5e6), tmp_path)
    assert line.startswith("about 2 checkpoints of 100000000.0 GB, exports of 5 MB; ")
    assert line.endswith(f"free in {tmp_path}, which may not suffice")
    assert "suffice" not in disk_line(resolved, DiskUse(0, 1, 2, 5), tmp_path)
