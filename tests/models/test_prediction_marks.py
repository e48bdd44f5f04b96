"""What programs take an exported checkpoint in one file for."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from finetune.errors import UsageError
from finetune.models.loading import load_model
from finetune.models.prediction_marks import assumed_predictions, set_by_hand
from finetune.models.single_file import inspect
from finetune.models.tiny import tiny_folder
from finetune.results.export_formats import write_format, write_verified
from tests.small_models import small_pipeline, write_single_file

TOKENIZER = str(tiny_folder() / "tokenizer")


def test_an_xl_that_predicts_velocity_is_marked_for_both_viewers(tmp_path: Path) -> None:
    mark = torch.empty(0)
    base = write_single_file(tmp_path / "base.safetensors", "sdxl", v_pred=mark, ztsnr=mark)
    write_format(
        load_model(base, tokenizer=TOKENIZER),
        tmp_path / "again.safetensors",
        "single-file",
        precision="fp32",
        metadata={},
    )
    assert {"v_pred", "ztsnr"} <= load_file(tmp_path / "again.safetensors").keys()
    assert inspect(tmp_path / "again.safetensors").prediction_type == "v_prediction"


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("family", "width", "encoder"), [("sd15", 768, "FrozenCLIP"), ("sd21", 1024, "FrozenOpenCLIP")]
)
def test_stable_diffusion_1_and_2_that_predict_velocity_have_a_file_beside_them_that_says_so(
    family: str, width: int, encoder: str, prediction_type: str, tmp_path: Path
) -> None:
    base = write_single_file(tmp_path / "base.safetensors", family)
    model = load_model(base, tokenizer=TOKENIZER, prediction_type=prediction_type)
    write_format(model, tmp_path / "dog.safetensors", "single-file", precision="fp32", metadata={})
    velocity = prediction_type == "v_prediction"
    assert (tmp_path / "dog.yaml").exists() == velocity
    assert inspect(tmp_path / "dog.safetensors").prediction_type == prediction_type  # whatever its biases are
    if velocity:
        settings = yaml.safe_load((tmp_path / "dog.yaml").read_text())["model"]["params"]
        assert settings["parameterization"] == "v"
        unet = settings["unet_config"]["params"]
        assert unet["context_dim"] == width
        assert unet.get("num_heads", unet.get("num_head_channels")) == (8 if family == "sd15" else 64)
        assert settings["cond_stage_config"]["target"].endswith(f".{encoder}Embedder")
        with pytest.raises(UsageError, match=r"dog\.yaml exists already"):
            write_verified(model, tmp_path / "dog.ckpt", "single-file", precision="fp32", metadata={})
        assert not (tmp_path / "dog.ckpt").exists()


SAID = {
    ("sd15", "epsilon"): [],
    ("sd15", "v_prediction"): ["ComfyUI takes {} for a model that predicts epsilon, not v_prediction: add the node "
                               "ModelSamplingDiscrete with v_prediction"],
    ("sd21", "v_prediction"): ["ComfyUI takes {} for a model that predicts epsilon, not v_prediction: add the node "
                               "ModelSamplingDiscrete with v_prediction"],
    ("sdxl", "v_prediction"): [],
    ("sd15", "sample"): [
        "ComfyUI takes {} for a model that predicts epsilon, not sample: add the node ModelSamplingDiscrete with x0",
        "Forge takes {} for a model that predicts epsilon, not sample: it has no setting for that",
        "A1111 takes {} for a model that predicts epsilon, not sample: it has no setting for that",
    ],
    ("sdxl", "flow"): [
        "ComfyUI takes {} for a model that predicts epsilon, not flow: add the node ModelSamplingSD3",
        "Forge takes {} for a model that predicts epsilon, not flow: it has no setting for that",
        "A1111 takes {} for a model that predicts epsilon, not flow: it has no setting for that",
    ],
}  # fmt: skip
"""Family and prediction type -> what is said of the programs that will not know."""


@pytest.mark.parametrize(("family", "prediction_type"), SAID)
def test_programs_that_have_to_be_set_by_hand_are_named(
    family: str, prediction_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = write_single_file(tmp_path / "base.safetensors", family, small_pipeline(family, prediction_type))
    if prediction_type == "flow":
        tensors = load_file(base)
        save_file(tensors, base, {"modelspec.prediction_type": "flow"})
    model = load_model(base, tokenizer=TOKENIZER, prediction_type=prediction_type)
    write_verified(model, tmp_path / "dog.safetensors", "single-file", precision="fp32", metadata={})
    warned = [record.message for record in caplog.records if "takes dog" in record.message]
    assert warned == [line.format("dog.safetensors") for line in SAID[family, prediction_type]]


def test_stable_diffusion_2_with_the_biases_of_v_needs_no_hand(tmp_path: Path) -> None:
    pipeline = small_pipeline("sd21", "v_prediction")
    bias = pipeline.unet.up_blocks[3].attentions[2].transformer_blocks[0].norm1.bias
    bias.data = 0.2 * torch.randn(bias.shape, generator=torch.Generator().manual_seed(0))
    base = write_single_file(tmp_path / "base.safetensors", "sd21", pipeline)
    model = load_model(base, tokenizer=TOKENIZER)
    assert model.prediction_type == "v_prediction"
    write_format(model, tmp_path / "dog.safetensors", "single-file", precision="fp32", metadata={})
    assert set_by_hand(tmp_path / "dog.safetensors", "v_prediction") == []
    assert set(assumed_predictions(tmp_path / "dog.safetensors").values()) == {"v_prediction"}
