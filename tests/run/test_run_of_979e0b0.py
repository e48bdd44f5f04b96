"""A run folder that version 979e0b0 of this program left, at step 1 of 4, goes on as it did there."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune.config import TrainConfig, read_options
from finetune.recipe import fine_tune

FOLDER = Path(__file__).parent / "run_of_979e0b0"


@pytest.fixture(autouse=True)
def global_generator_untouched() -> None:
    """Whole runs go through diffusers pipelines, which may draw from torch's global generator."""


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_it_resumes_and_ends_as_it_would_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    config_file = tmp_path / "run/config.toml"
    config_file.write_text(config_file.read_text().replace("/home/somebody", str(tmp_path)))
    given = read_options(config_file) | {"max_train_minutes": None, "cache_dir": str(tmp_path / "cache")}
    out = fine_tune(TrainConfig(**given))
    assert out == tmp_path / "run"
    expected, found = lines(FOLDER / "metrics-to-the-end.jsonl"), lines(out / "metrics.jsonl")
    assert found[0] == expected[0]  # of the part before
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    for name in ("loss", "grad_norm", "lr"):
        assert [line[name] for line in found] == pytest.approx([line[name] for line in expected], rel=1e-3)
    validations = lines(out / "validation.jsonl")
    assert [line["step"] for line in validations] == [0, 1, 2, 3, 4]
    assert validations[0] == lines(FOLDER / "run/validation.jsonl")[0]
    assert (out / "pytorch_lora_weights.safetensors").exists()
    assert json.loads((out / "result.json").read_text())["trained"] == 4
