from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor

from finetune.training.diff2flow import Diff2Flow
from finetune.training.objective import DiffusionObjective
from tests.training.test_noise_prediction import small_unet, tensors

TYPES = ("epsilon", "v_prediction", "sample")


def stable_diffusions(prediction_type: str) -> DDPMScheduler:
    return DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction_type
    )


def velocity_of(unet: UNet2DModel, scheduler: DDPMScheduler, x_s: Tensor, s: Tensor) -> Tensor:
    """The velocity that a diffusion model has at points of the straight path, worked out example by example."""
    abar = scheduler.alphas_cumprod.double()
    shares = (1 - abar).sqrt() / (abar.sqrt() + (1 - abar).sqrt())
    velocities = []
    for x, share in zip(x_s.double(), s.double(), strict=True):
        above = int((shares < share).sum().clamp(1, 999))
        t = above - 1 + (share - shares[above - 1]) / (shares[above] - shares[above - 1])
        scale = ((1 - share) ** 2 + share**2).sqrt()
        alpha, sigma, x_t = (1 - share) / scale, share / scale, x / scale
        answer = unet(x_t.float()[None], t.float()[None]).sample[0].double()
        if scheduler.config["prediction_type"] == "epsilon":
            x0, noise = (x_t - sigma * answer) / alpha, answer
        elif scheduler.config["prediction_type"] == "v_prediction":
            x0, noise = alpha * x_t - sigma * answer, sigma * x_t + alpha * answer
        else:
            x0, noise = answer, (x_t - alpha * answer) / sigma
        velocities.append(noise - x0)
    return torch.stack(velocities)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_loss_at_step_0_is_that_of_the_velocity_which_the_base_has(prediction_type: str) -> None:
    scheduler, unet = stable_diffusions(prediction_type), small_unet()
    objective: DiffusionObjective = Diff2Flow(scheduler)
    x0, noise, _ = tensors()
    s = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    t = Diff2Flow(scheduler)._timesteps(1000 * s)
    losses = objective.loss(unet, objective.add_noise(x0, noise, t), {}, None)
    share = s.view(-1, 1, 1, 1)
    velocity = velocity_of(unet, scheduler, (1 - share) * x0 + share * noise, s)
    expected = (velocity - (noise - x0)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses.double(), expected, rtol=2e-4, atol=0)


def test_timesteps_have_the_share_of_noise_that_the_flow_drew() -> None:
    objective = Diff2Flow(stable_diffusions("epsilon"), shift=2.0)
    keys = torch.arange(300)
    s = objective.flow.sample_timesteps(keys) / 1000
    inside = (s > objective.shares[0]) & (s < objective.shares[-1])
    assert 200 < inside.sum() < 300  # with this shift some lie beyond the schedule
    alpha, sigma = objective._roots(objective.sample_timesteps(keys), torch.zeros(300, 1, 1, 1))
    torch.testing.assert_close((sigma / (alpha + sigma)).flatten()[inside], s[inside], rtol=0, atol=2e-6)
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones_like(alpha))
    t = objective.sample_timesteps(keys)
    assert t.max() == 999
    assert t.min() >= 0


@pytest.mark.parametrize("prediction_type", TYPES)
def test_a_perfect_prediction_has_no_loss_and_is_learned(prediction_type: str) -> None:
    objective = Diff2Flow(stable_diffusions(prediction_type))
    x0, keys = torch.full((3, 4, 8, 8), 0.5), torch.tensor([1, 2, 3])
    noised = objective.sample(x0, keys)

    def perfect(x: Tensor, t: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=noised.target)

    assert objective.loss(perfect, noised, {}).max() == 0
    assert objective.prediction_type == prediction_type


def test_a_step_of_ddim_is_eulers_step_of_the_flow() -> None:
    objective = Diff2Flow(stable_diffusions("v_prediction"))
    x0, noise, _ = tensors()
    t, to = torch.full((5,), 800), torch.full((5,), 300)
    alpha, sigma = objective._roots(t, x0)
    next_alpha, next_sigma = objective._roots(to, x0)
    stepped = objective.step(alpha * x0 + sigma * noise, alpha * noise - sigma * x0, t, to)
    s, next_s = sigma / (alpha + sigma), next_sigma / (next_alpha + next_sigma)
    euler = (1 - s) * x0 + s * noise + (next_s - s) * (noise - x0)
    torch.testing.assert_close(stepped / (next_alpha + next_sigma), euler, rtol=1e-4, atol=1e-5)
