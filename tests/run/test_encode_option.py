"""--encode: when pictures are encoded changes nothing that is learned."""

from pathlib import Path

import pytest

from finetune.config import TrainConfig
from finetune.recipe import fine_tune


@pytest.fixture(autouse=True)
def global_generator_untouched() -> None:
    """Whole runs go through diffusers pipelines, which may draw from torch's global generator."""


def run(pictures: Path, folder: Path, encode: str, cache: str, **more: object) -> Path:
    basic = {"data": str(pictures), "output_dir": str(folder), "max_train_steps": 4, "train_batch_size": 1, "rank": 4}
    drawn = {"sample_every": 2, "num_inference_steps": 1, "eval_batch_size": 1, "random_flip": True}
    return fine_tune(TrainConfig(**basic | drawn | {"encode": encode, "cache_dir": cache} | more))  # pyright: ignore


def learned(folder: Path) -> tuple[bytes, str]:
    weights = folder / "checkpoint-4/trainable.safetensors"
    return weights.read_bytes(), (folder / "metrics.jsonl").read_text()


def test_encoding_ahead_of_the_steps_changes_nothing(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = run(pictures, tmp_path / "before", "before", "none")
    both = "8 images with their mirror images"  # of 4 of 6 photos
    assert f"{both} (8 new)" in capsys.readouterr().out
    ahead = run(pictures, tmp_path / "ahead", "ahead", str(tmp_path / "cache"))
    assert f"{both} (8 to be encoded during training)" in capsys.readouterr().out
    assert learned(before) == learned(ahead)
    again = run(pictures, tmp_path / "again", "auto", str(tmp_path / "cache"))
    assert f"{both} (all cached)" in capsys.readouterr().out
    assert learned(before) == learned(again)


def test_a_resumed_run_encodes_only_what_is_still_to_be_visited(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(pictures, tmp_path / "whole", "before", "none", random_flip=False, lr_scheduler="constant")
    capsys.readouterr()
    once = {"random_flip": False, "lr_scheduler": "constant", "max_train_steps": 3}
    run(pictures, tmp_path / "parts", "before", "none", **once)
    (tmp_path / "parts/checkpoint-3").rename(tmp_path / "parts/best")  # which may be called as one likes
    more = once | {"max_train_steps": 4, "resume_from_checkpoint": str(tmp_path / "parts/best")}
    resumed = run(pictures, tmp_path / "parts", "before", "none", **more)
    assert "1 image (1 new)" in capsys.readouterr().out
    assert learned(whole) == learned(resumed)
