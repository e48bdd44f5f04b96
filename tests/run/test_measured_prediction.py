"""A checkpoint of XL without a mark: what it predicts is measured, remembered, and asked for where it is unclear."""

import json
from pathlib import Path

import pytest
import torch

from finetune.config import TrainConfig, load_config
from finetune.data.image_folder import ImageFolder
from finetune.errors import UsageError
from finetune.models.model_info import locate
from finetune.models.tiny import tiny_folder
from finetune.recipe import fine_tune
from finetune.run.measured_prediction import with_measured_prediction
from finetune.run.resume import load_resolved
from tests.small_models import small_pipeline, write_single_file

TOKENIZER = str(tiny_folder() / "tokenizer")


@pytest.fixture(scope="module")
def unmarked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_single_file(tmp_path_factory.mktemp("xl") / "xl.safetensors", "sdxl", small_pipeline("sdxl"))


def config(model: Path, data: Path, tmp_path: Path, **options: object) -> TrainConfig:
    return TrainConfig(
        model=str(model), data=str(data), output_dir=str(tmp_path / "run"), cache_dir=str(tmp_path / "cache"),
        tokenizer=TOKENIZER, resolution=64, max_train_steps=1, num_inference_steps=0, forgetting_prompts=0, rank=2,
        mixed_precision="no", gradient_accumulation_steps=1, lr_warmup_steps=0, **options,
    )  # fmt: skip


def remember(tmp_path: Path, **errors: float) -> None:
    """Change the errors that were measured, as another checkpoint would have had them."""
    memory = tmp_path / "cache/predictions.json"
    memory.write_text(json.dumps(dict.fromkeys(json.loads(memory.read_text()), errors)))


def test_unclear_errors_are_shown_and_the_prediction_type_is_asked_for(
    unmarked: Path, pictures: Path, tmp_path: Path
) -> None:
    given = config(unmarked, pictures, tmp_path)
    question = (
        r"^xl.safetensors does not say what it predicts, and its errors do not tell it "
        r"\((\w+ \d\.\d\d, ){2}\w+ \d\.\d\d\): give --prediction_type$"
    )
    with pytest.raises(UsageError, match=question):
        fine_tune(given)
    (errors,) = json.loads((tmp_path / "cache/predictions.json").read_text()).values()
    assert errors.keys() == {"epsilon", "v_prediction", "flow"}
    run = fine_tune(config(unmarked, pictures, tmp_path, prediction_type="epsilon"))
    assert load_resolved(run / "config.toml").prediction_type == "epsilon"


def test_a_clear_one_is_taken_recorded_and_resumed(
    unmarked: Path, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = config(unmarked, pictures, tmp_path)
    with pytest.raises(UsageError):
        fine_tune(given)
    remember(tmp_path, epsilon=1.31, v_prediction=0.12, flow=0.8)
    with caplog.at_level("INFO", logger="finetune"):
        run = fine_tune(given)
    figures = "(v_prediction 0.12, flow 0.80, epsilon 1.31)"
    assert f"v_prediction, by the errors of a checkpoint that does not say it {figures}" in caplog.text
    resolved = load_resolved(run / "config.toml")
    assert resolved.prediction_type == "v_prediction"
    assert "prediction_type" not in resolved.given
    assert "prediction_type" not in load_config(run / "config.toml").given
    fine_tune(config(unmarked, pictures, tmp_path))  # the same run, which is finished
    assert "v_prediction" in (run / "pytorch_lora_weights.safetensors").read_bytes().decode("latin-1")


def test_what_says_it_or_was_given_is_not_measured(unmarked: Path, pictures: Path, tmp_path: Path) -> None:
    mark = torch.empty(0)
    marked = write_single_file(tmp_path / "v.safetensors", "sdxl", small_pipeline("sdxl"), v_pred=mark)
    for given in (
        config(marked, pictures, tmp_path),
        config(unmarked, pictures, tmp_path, prediction_type="v_prediction"),
        config(tiny_folder(), pictures, tmp_path),
    ):
        folder = ImageFolder(pictures, resolution=64)
        assert with_measured_prediction(given, locate(given.model), folder, torch.device("cpu")) is given
    assert not (tmp_path / "cache").exists()


def test_no_class_image_is_drawn_by_a_model_that_does_not_say_what_it_predicts(
    unmarked: Path, pictures: Path, tmp_path: Path
) -> None:
    options = {"class_data": str(tmp_path / "class"), "class_prompt": "a disc", "num_class_images": 1}
    with pytest.raises(UsageError, match=r"xl.safetensors does not say what it predicts; give --prediction_type"):
        fine_tune(config(unmarked, pictures, tmp_path, **options))
    assert not (tmp_path / "class").exists()
