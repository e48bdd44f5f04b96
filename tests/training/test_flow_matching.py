from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from finetune.errors import UsageError
from finetune.training.flow_matching import FlowMatching
from finetune.training.forgetting import record_probe
from finetune.training.loss_function import LossFunction
from finetune.training.objective import DiffusionObjective
from finetune.training.timestep_sampler import TimestepSampler
from tests.training.test_noise_prediction import small_unet, tensors


def test_the_path_and_target_are_those_of_diffusers_scheduler() -> None:
    objective: DiffusionObjective = FlowMatching()
    x0, noise, _ = tensors()
    scheduler = FlowMatchEulerDiscreteScheduler()
    t = torch.tensor([1000.0, 900.0, 500.0, 100.0, 1.0])
    noised = objective.add_noise(x0, noise, t)
    torch.testing.assert_close(noised.x_t, scheduler.scale_noise(x0, t, noise))
    assert torch.equal(noised.target, noise - x0)
    unet = small_unet()
    losses = objective.loss(unet, noised, {}, None)
    torch.testing.assert_close(losses, (unet(noised.x_t, t).sample - (noise - x0)).square().mean(dim=(1, 2, 3)))


def test_timesteps_are_real_shifted_and_in_the_range() -> None:
    keys = torch.arange(500)
    plain, shifted = (FlowMatching(shift=shift).sample_timesteps(keys) / 1000 for shift in (1.0, 3.0))
    assert plain.dtype == torch.float32
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))
    assert plain.unique().numel() > 490
    narrow = FlowMatching(shift=3.0, timestep_sampler=TimestepSampler(min_timestep=100, max_timestep=200))
    t = narrow.sample_timesteps(keys)
    assert t.min() >= 100
    assert t.max() <= 200
    parts = [narrow.validation_timesteps(keys, part, 2) for part in range(2)]
    assert 100 <= parts[0].min() < parts[0].max() <= 150 <= parts[1].min() < parts[1].max() <= 200
    with pytest.raises(UsageError, match="max_timestep = 1001: the model has 1000 timesteps"):
        FlowMatching(timestep_sampler=TimestepSampler(max_timestep=1001))


def test_steps_along_the_true_velocity_lead_from_noise_to_the_image() -> None:
    objective = FlowMatching()
    x0, noise, _ = tensors()
    x_t, velocity = noise, noise - x0
    times = torch.tensor([1000, 600, 150, 0])
    for now, then in pairwise(times):
        x_t = objective.step(x_t, objective.predict_v(velocity, x_t, now), now.expand(5), then.expand(5))
    torch.testing.assert_close(x_t, x0, rtol=1e-4, atol=1e-5)


def test_noise_is_that_of_the_key_and_a_huber_loss_has_its_threshold() -> None:
    x0, keys = torch.zeros(3, 4, 8, 8), torch.tensor([1, 2, 3])
    noised = FlowMatching(loss_function=LossFunction("huber")).sample(x0, keys)
    assert torch.equal(noised.target[1:], FlowMatching().sample(x0[1:], keys[1:]).target)
    s = noised.t / 1000
    assert noised.huber_c is not None
    torch.testing.assert_close(noised.huber_c, 0.9 / (1 + s / (1 - s)) ** 2 + 0.1)


def test_a_probe_begins_at_pure_noise() -> None:
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    class Conditioned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = small_unet()

        def forward(self, x: torch.Tensor, t: torch.Tensor, shift: torch.Tensor) -> object:
            return self.unet(x + shift.view(-1, 1, 1, 1), t)

    prompts, empty = {"shift": torch.ones(2)}, {"shift": torch.zeros(2)}
    probe = record_probe(Conditioned(), FlowMatching(), prompts, empty, noise, states=2)
    assert probe.t == (1000, 500)
    assert torch.equal(probe.x_t[0], noise)
