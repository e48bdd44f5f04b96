"""Several runs on one page."""

import json
from pathlib import Path

import pytest
from PIL import Image

from finetune.cli import main
from finetune.config import ResolvedConfig, TrainConfig, config_text
from tests.results.test_report import NASTY, Page

DECIDED = {
    "method": "full", "lora_alpha": 16.0, "lora_target_modules": ("to_q",), "mixed_precision": "no", "compile": False,
    "resolution": 64, "aspect_ratio_bucketing": False, "caption_dropout": 0.0, "max_train_steps": 9,
    "train_batch_size": 1, "gradient_accumulation_steps": 1, "num_processes": 1, "learning_rate": 1e-3,
    "lr_scheduler": "constant", "lr_warmup_steps": 0, "validation_fraction": 0.0, "adam_beta1": 0.9, "use_ema": False,
    "eval_batch_size": 1, "num_inference_steps": 2, "guidance_scale": 1.0,
}  # fmt: skip


def a_run(folder: Path, loss: float, **given: object) -> Path:
    (folder / "samples").mkdir(parents=True)
    Image.new("RGB", (90, 30)).save(folder / "samples/step-9.png")
    config = ResolvedConfig(TrainConfig(data="pics", output_dir=str(folder), **given), **DECIDED)
    (folder / "config.toml").write_text(config_text(config))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 9, "loss": loss}) + "\n")
    drifts = [{"step": 0, "forgetting": 0.0}, {"step": 9, "forgetting": loss / 2}]
    (folder / "forgetting.jsonl").write_text("".join(json.dumps(line) + "\n" for line in drifts))
    return folder


def test_it_shows_what_differs_and_what_came_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [a_run(tmp_path / "one", 0.25, prompt=NASTY), a_run(tmp_path / "two", 0.5, snr_gamma=5.0)]
    path = tmp_path / "page.html"
    assert main(["compare", "--runs", *map(str, runs), "--output", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    page = Page(path)
    for text in ("one and two", "snr_gamma5.0", "training loss, smoothed0.25000.5000", "forgetting12.5%25.0%"):
        assert text in page.text
    assert "output_dir" not in page.text
    assert "learning_rate" not in page.text
    assert page.of("script") == []
    assert len(page.of("img")) == 2
    assert all(source["src"].startswith("data:image/jpeg") for source in page.of("img"))


def test_what_is_no_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path / "one", 0.25)
    assert main(["compare", "--runs", str(run)]) == 2
    assert "expected two or more" in capsys.readouterr().err
    assert main(["compare", "--runs", str(run), str(tmp_path)]) == 2
    assert f"--runs {tmp_path}: no run there" in capsys.readouterr().err
    assert main(["compare", "--runs", str(run), str(run), "--output", str(tmp_path)]) == 2
    assert "cannot be written" in capsys.readouterr().err
