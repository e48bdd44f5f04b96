"""Runs in which a picture's encoding is not finite, or memory does not suffice."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.cache.image_source import CachedImages
from finetune.config import TrainConfig
from finetune.recipe import fine_tune
from finetune.training import checkpoint
from finetune.training.metrics import NotFinite
from finetune.training.noise_prediction import NoisePrediction


@pytest.fixture(autouse=True)
def global_generator_untouched() -> None:
    """Whole runs go through diffusers pipelines, which may draw from torch's global generator."""


def options(pictures: Path, output: Path, **more: object) -> TrainConfig:
    basic = {"data": str(pictures), "output_dir": str(output), "max_train_steps": 6, "train_batch_size": 2, "rank": 2}
    return TrainConfig(**basic | {"num_inference_steps": 0, "caption_dropout": 0.5} | more)


@pytest.fixture
def third_is_spoilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third of six pictures has no finite latents."""
    load = CachedImages.load

    def spoil(self: CachedImages, index: int, key: int) -> Any:
        image = load(self, index, key)
        return image._replace(latent_params=image.latent_params * float("nan")) if index == 2 else image

    monkeypatch.setattr(CachedImages, "load", spoil)


def lines(path: Path) -> list[dict]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


@pytest.mark.usefixtures("third_is_spoilt")
def test_the_first_bad_step_ends_the_run_and_is_told_in_full(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFinite, match=r"the loss is not finite for 02\.png; no weight was changed") as caught:
        fine_tune(options(pictures, tmp_path / "out"))
    (line,) = lines(tmp_path / "out/faults.jsonl")
    assert (line["step"], line["loss"]) == (caught.value.fault.step, "nan")
    assert [example["id"] for example in line["examples"]] == list(caught.value.fault.ids)
    (bad,) = [example for example in line["examples"] if example["loss"] == "nan"]
    assert bad["id"] == "02.png"
    assert 0 <= bad["timestep"] < 1000
    assert bad["caption"] in ("", "a red disc, number 2")
    assert line["step"] - 1 == len(lines(tmp_path / "out/metrics.jsonl"))


@pytest.mark.usefixtures("third_is_spoilt")
def test_forgiven_steps_are_told_and_leave_the_rest_of_the_run(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = fine_tune(options(pictures, tmp_path / "out", max_bad_steps=3))
    faults, metrics = lines(out / "faults.jsonl"), lines(out / "metrics.jsonl")
    assert [line["step"] for line in metrics if line["loss"] is None] == [line["step"] for line in faults]
    assert len(faults) == 2  # of six steps of two, two epochs of six pictures
    assert capsys.readouterr().out.count("the loss is not finite for 02.png: its update was left out") == 2
    weights = checkpoint.load(out / "checkpoint-6")["weights"].values()
    assert all(tensor.isfinite().all() for tensor in weights)


def test_a_run_without_memory_for_its_micro_batch_goes_on_in_smaller_ones(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = fine_tune(options(pictures, tmp_path / "plain", train_batch_size=4, resize_mode="squash"))
    loss = NoisePrediction.loss

    def scarce(self: NoisePrediction, unet: Any, noised: Any, *others: Any) -> Tensor:
        if len(noised.t) > 2:
            raise torch.OutOfMemoryError
        return loss(self, unet, noised, *others)

    monkeypatch.setattr(NoisePrediction, "loss", scarce)
    capsys.readouterr()
    out = fine_tune(options(pictures, tmp_path / "out", train_batch_size=4, resize_mode="squash"))
    said = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    message = "from step 1 on 2 images at a time, to the same gradient (the step stays as large)"
    assert said == [f"note         out of memory: {message}"]
    ours, theirs = (lines(folder / "metrics.jsonl") for folder in (out, plain))
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-4)
    assert checkpoint.record(out / "checkpoint-6")["fits"] == 2
