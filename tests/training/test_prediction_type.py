"""What a UNet predicts, told from its errors."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from finetune.models.loading import load_model
from finetune.training.prediction_type import CLEAR, TIMESTEPS, clear_prediction_type, prediction_errors

SOURCE = torch.Generator().manual_seed(0)
X0 = torch.randn(2, 4, 8, 8, generator=SOURCE) * 0.8
NOISE = torch.randn(2, 4, 8, 8, generator=SOURCE)
SCHEDULER = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def perfect(prediction_type: str) -> Any:
    """A UNet that knows image and noise, and answers what it is trained to predict."""

    def unet(x: Tensor, t: Tensor, **_: Any) -> SimpleNamespace:
        velocity: Any = SCHEDULER.get_velocity(X0, NOISE, t.long())  # pyright: ignore[reportArgumentType]
        return SimpleNamespace(sample={"epsilon": NOISE, "v_prediction": velocity, "flow": NOISE - X0}[prediction_type])

    return unet


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
def test_the_right_prediction_type_has_no_error_and_is_clear(prediction_type: str) -> None:
    errors = prediction_errors(perfect(prediction_type), X0, NOISE, {}, scheduler=SCHEDULER)
    assert errors.pop(prediction_type) == pytest.approx(0, abs=1e-6)
    assert all(error > 0.2 for error in errors.values())
    assert clear_prediction_type({**errors, prediction_type: 0.0}) == prediction_type


def test_an_answer_of_zeros_has_the_error_1_of_every_type_and_tells_nothing() -> None:
    def unet(x: Tensor, t: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(sample=torch.zeros_like(x))

    errors = prediction_errors(unet, X0, NOISE, {}, scheduler=SCHEDULER)
    assert errors == {name: pytest.approx(1) for name in ("flow", "epsilon", "v_prediction")}
    assert clear_prediction_type(errors) is None


def test_near_errors_are_not_clear() -> None:
    assert clear_prediction_type({"epsilon": CLEAR - 0.01, "v_prediction": 1.0, "flow": 2.0}) == "epsilon"
    assert clear_prediction_type({"epsilon": CLEAR, "v_prediction": 1.0, "flow": 2.0}) is None


def test_the_embedded_model_predicts_noise_by_its_errors(global_generator_untouched: None) -> None:
    model = load_model("tiny")
    pixels = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    x0 = model.encoder.sample(model.encoder.encode(pixels), torch.tensor([0]))
    cond = model.conditioner.kwargs(
        model.conditioner.encode(["a grey picture"]), torch.tensor([[64, 64, 0, 0, 64, 64]])
    )
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    scheduler: Any = model.scheduler
    errors = prediction_errors(model.unet.eval(), x0, noise, cond, scheduler=scheduler)
    assert len(TIMESTEPS) == 3
    assert clear_prediction_type(errors) == "epsilon"
