import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)

from finetune.errors import ModelError, UsageError
from finetune.models.loading import load_model
from finetune.models.schedulers import make_sampler
from finetune.results.export import export
from tests.tiny_copy import copy_tiny

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "use_flow_sigmas": True,
    "prediction_type": "flow_prediction",
    "flow_shift": 2.0,
    "steps_offset": 1,
}
PNDM = {
    "_class_name": "PNDMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


def model_with(folder: Path, scheduler: dict[str, object]) -> Path:
    copy_tiny(folder)
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


@pytest.mark.parametrize(("scheduler", "shift"), [(FLOW, 3.0), (UNIPC, 2.0)])
def test_a_flow_model_is_read_and_written_with_its_shift(
    tmp_path: Path, scheduler: dict[str, object], shift: float
) -> None:
    folder = model_with(tmp_path / "flow", scheduler)
    model = load_model(folder)
    assert isinstance(model.scheduler, FlowMatchEulerDiscreteScheduler)
    assert model.scheduler.config["shift"] == shift
    assert model.prediction_type == "flow"
    assert load_model(folder, prediction_type="flow", flow_shift=4.0).scheduler.config["shift"] == 4.0
    export(model, tmp_path / "out")
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(loaded.scheduler, UniPCMultistepScheduler)
    assert loaded.scheduler.config["flow_shift"] == shift
    with torch.random.fork_rng(devices=[]):
        images = loaded("", num_inference_steps=2, height=64, width=64, output_type="pt").images
    assert images[0].isfinite().all()
    assert load_model(tmp_path / "out").scheduler.config["shift"] == shift


def test_a_flow_model_draws_along_the_straight_path(tmp_path: Path) -> None:
    """With a network that always answers noise - x0, the sampler ends at x0."""
    scheduler = load_model(model_with(tmp_path, FLOW)).pipeline().scheduler
    scheduler.set_timesteps(4)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x0 = torch.full_like(noise, 0.25)
    sample = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        sample = scheduler.step(noise - x0, t, scheduler.scale_model_input(sample, t)).prev_sample
    torch.testing.assert_close(sample, x0, rtol=0, atol=2e-3)


def test_options_of_noise_prediction_are_refused_for_a_flow_model(tmp_path: Path) -> None:
    folder = model_with(tmp_path, FLOW)
    with pytest.raises(UsageError, match="prediction_type = epsilon: the model's scheduler is one of flow matching"):
        load_model(folder, prediction_type="epsilon")
    with pytest.raises(UsageError, match="zero_terminal_snr cannot be used with flow matching"):
        load_model(folder, zero_terminal_snr=True)


def test_a_noise_model_stays_one_under_the_loss_of_flow_matching() -> None:
    model = load_model("tiny", prediction_type="flow")
    assert type(model.scheduler) is DDPMScheduler
    assert model.prediction_type == "epsilon"
    assert model.scheduler_changes == {}


def test_ddpm_from_scratch_can_be_a_flow_model(tmp_path: Path) -> None:
    model = load_model("ddpm", resolution=32, prediction_type="flow", flow_shift=2.0)
    assert model.scheduler.config["shift"] == 2.0
    export(model, tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.scheduler, FlowMatchEulerDiscreteScheduler)
    assert loaded(num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0].size == (32, 32)


def test_zero_terminal_snr_is_in_training_and_in_the_pipeline(tmp_path: Path) -> None:
    model = load_model("tiny", prediction_type="v_prediction", zero_terminal_snr=True)
    assert model.scheduler.alphas_cumprod[-1] == 0
    assert model.scheduler_changes == {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    own = model.pipeline().scheduler
    own.set_timesteps(4)
    assert own.timesteps[0] == 999
    export(model, tmp_path)
    again = load_model(tmp_path)
    assert again.scheduler.alphas_cumprod[-1] == 0
    assert again.scheduler_changes == {}
    assert load_model(tmp_path, zero_terminal_snr=False).scheduler.alphas_cumprod[-1] > 1e-4


def test_a_sampler_without_zero_terminal_snr_is_replaced() -> None:
    changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    sampler = make_sampler(Path("model"), PNDM, changes)
    assert type(sampler) is DDIMScheduler
    assert sampler.config["beta_end"] == 0.012
    assert sampler.alphas_cumprod[-1] == 0
    assert type(make_sampler(Path("model"), PNDM | {"_class_name": "EulerDiscreteScheduler"}, changes)) is (
        EulerDiscreteScheduler
    )
    with pytest.raises(ModelError, match="'Nothing' is not a scheduler of diffusers"):
        make_sampler(Path("model"), {"_class_name": "Nothing"}, {})
