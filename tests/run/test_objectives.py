"""Runs with each objective and its options."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

import finetune as ft
from finetune.errors import UsageError
from finetune.models.lora import LORA_FILE, Adapter
from finetune.results.export import exported
from tests.models.test_schedulers import FLOW, model_with


@pytest.fixture(autouse=True)
def global_generator_untouched() -> None:
    """Whole runs go through diffusers pipelines, which may draw from torch's global generator."""


def train(pictures: Path, output: Path, **options: object) -> Path:
    basic = {"data": str(pictures), "output_dir": str(output), "max_train_steps": 2, "train_batch_size": 2}
    return ft.fine_tune(ft.TrainConfig(**basic | {"num_inference_steps": 2, "sample_every": 0} | options))


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines() if "loss" in line]


ZERO_SNR = {"prediction_type": "v_prediction", "zero_terminal_snr": True}


@pytest.mark.parametrize(
    "options",
    [
        ZERO_SNR | {"snr_gamma": 5.0},
        ZERO_SNR | {"debiased_estimation": True, "scale_v_pred_loss_like_noise_pred": True},
        {"loss_type": "huber", "huber_schedule": "exponential", "huber_c": 0.2},
        {"loss_type": "smooth_l1"},
        {"loss_type": "l1"},
        {"multires_noise_iterations": 4, "multires_noise_discount": 0.5},
        {"min_timestep": 500, "max_timestep": 600},
        {"timestep_sampling": "logit_normal", "logit_mean": -1.0, "logit_std": 0.5},
        {"timestep_sampling": "sigmoid", "logit_std": 0.5},
        {"timestep_sampling": "beta", "beta_alpha": 3.0, "beta_beta": 1.0},
        {"prediction_type": "flow", "flow_shift": 2.0},
    ],
    ids=lambda options: "-".join(options),
)
def test_each_option_reaches_the_loss_and_the_run_is_exported(
    pictures: Path, tmp_path: Path, options: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = train(
        pictures, tmp_path / "plain", **({"prediction_type": "v_prediction"} if "zero_terminal_snr" in options else {})
    )
    folder = train(pictures, tmp_path / "out", **options)
    assert len(losses(folder)) == 2
    assert losses(folder) != losses(plain)
    row = next(line for line in capsys.readouterr().out.splitlines()[::-1] if line.startswith("Objective"))
    assert all(f"{name} {value}" in row for name, value in options.items())
    for name in options:  # each by itself, too
        if name not in ("prediction_type", "zero_terminal_snr"):
            less = {other: value for other, value in options.items() if other != name}
            if name in ("loss_type", "timestep_sampling", "multires_noise_iterations"):
                continue  # the others need it
            assert losses(train(pictures, tmp_path / name, **less)) != losses(folder), name


def test_a_run_of_a_flow_model(pictures: Path, tmp_path: Path) -> None:
    base = model_with(tmp_path / "flow", FLOW)
    folder = train(pictures, tmp_path / "full", model=str(base), method="full", flow_shift=2.0, sample_every=2)
    loaded = StableDiffusionPipeline.from_pretrained(folder)
    assert loaded.scheduler.config["flow_shift"] == 2.0
    assert loaded.scheduler.config["prediction_type"] == "flow_prediction"
    lora = train(pictures, tmp_path / "lora", model=str(base))
    assert "modelspec.prediction_type" in Adapter.read_metadata(lora / "lora.safetensors")
    with pytest.raises(UsageError, match=r"snr_gamma = 5.0 cannot be used with flow matching"):
        train(pictures, tmp_path / "no", model=str(base), snr_gamma=5.0)


def test_a_lora_says_how_its_scheduler_differs_from_the_bases(pictures: Path, tmp_path: Path) -> None:
    folder = train(pictures, tmp_path / "out", **ZERO_SNR)
    assert (folder / LORA_FILE).exists()
    made = exported(folder)
    assert made is not None
    pipeline = StableDiffusionPipeline.from_pretrained(ft.load_model("tiny").component_dirs["vae"].parent)
    exec(made.load.format(folder), {"pipeline": pipeline})
    assert pipeline.scheduler.config["prediction_type"] == "v_prediction"
    assert pipeline.scheduler.alphas_cumprod[-1] == 0
    generator = torch.Generator().manual_seed(0)
    images = pipeline("", num_inference_steps=2, generator=generator, height=64, width=64, output_type="pt").images
    assert images[0].isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"snr_gamma": 5.0, "prediction_type": "flow"}, "snr_gamma = 5.0 cannot be used with Diff2Flow"),
        ({"loss_type": "huber", "prediction_type": "flow"}, "loss_type = huber cannot be used with Diff2Flow"),
        ({"flow_shift": 2.0}, "flow_shift = 2.0 cannot be used with noise prediction"),
        ({"huber_c": 0.2}, "huber_c cannot be used here: it needs loss_type huber or smooth_l1"),
        ({"logit_mean": 0.2}, "logit_mean cannot be used here: it needs timestep_sampling logit_normal"),
        ({"beta_beta": 3.0}, "beta_beta cannot be used here: it needs timestep_sampling beta"),
        ({"multires_noise_discount": 0.2}, "multires_noise_discount cannot be used here"),
        ({"max_timestep": 1001}, "max_timestep = 1001: the model's schedule has 1000 timesteps"),
        ({"zero_terminal_snr": True}, "prediction_type epsilon: at zero terminal SNR"),
    ],
)
def test_options_that_do_nothing_here_are_refused(
    pictures: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train(pictures, tmp_path / "out", **options)
