"""How far answers have gone from those before."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from finetune.training.forgetting import probe_drift, record_probe
from finetune.training.noise_prediction import NoisePrediction

KINDS = ("epsilon", "v_prediction", "sample")


def objective(kind: str) -> NoisePrediction:
    return NoisePrediction(DDPMScheduler(beta_schedule="scaled_linear", prediction_type=kind))


class Scaling(nn.Module):
    """Answers a multiple of what it sees, and of what it is told; knows what it was asked."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.asked: list[tuple[int, int]] = []

    def forward(self, x: Tensor, t: Tensor, told: Tensor) -> Any:
        assert not self.training
        self.asked += [(len(x), int(t[0]))]
        return SimpleNamespace(sample=self.factor * x * told.view(-1, 1, 1, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_answer_is_the_true_velocity_and_leads_to_the_true_x_t(kind: str) -> None:
    ours, plain = objective(kind), objective("v_prediction")
    x0, noise = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0)).unbind()
    t, to = torch.tensor([999, 500, 1]), torch.tensor([600, 0, 0])
    noised = ours.add_noise(x0, noise, t)
    velocity = ours.predict_v(noised.target, noised.x_t, t)
    torch.testing.assert_close(velocity, plain.add_noise(x0, noise, t).target, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.step(noised.x_t, velocity, t, to), ours.add_noise(x0, noise, to).x_t)


def asked(unet: Scaling, kind: str = "v_prediction", batch_size: int = 2) -> Any:
    noise = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    cond, empty = {"told": torch.tensor([1.0, 2.0, 3.0])}, {"told": torch.zeros(3)}
    return record_probe(unet, objective(kind), cond, empty, noise, batch_size=batch_size)


def test_each_prompt_is_asked_at_falling_noise_on_the_way_that_it_is_drawn() -> None:
    unet = Scaling(0.5)
    probe = asked(unet)
    assert probe.t == (999, 665, 332)
    assert unet.asked == [(size, t) for t in probe.t for size in (2, 1, 2, 1)]
    assert unet.training
    torch.testing.assert_close(probe.effect[:, 1], probe.x_t[:, 1])
    abar = objective("v_prediction").alphas_cumprod
    first, second, _ = (torch.acos(abar[t].sqrt()) for t in probe.t)
    turn = torch.cos(first - second) - 0.5 * torch.sin(first - second)  # DDIM turns x_t, by its velocity
    torch.testing.assert_close(probe.x_t[1, 0], turn * probe.x_t[0, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_has_gone_from_itself_and_an_untrained_head_is_one_away(kind: str) -> None:
    unet = Scaling(0.5)
    probe = asked(unet, kind)
    assert probe_drift(unet, probe, batch_size=2) == 0
    assert probe_drift(Scaling(0.0), probe) == pytest.approx(1)
    assert probe_drift(Scaling(0.6), probe) == pytest.approx(0.04)


class Shifted(Scaling):
    """Answers something else, whatever it is told."""

    def forward(self, x: Tensor, t: Tensor, told: Tensor) -> Any:
        return SimpleNamespace(sample=super().forward(x, t, told).sample - 3 * x)


def test_what_changes_whatever_the_prompt_is_not_forgotten() -> None:
    assert probe_drift(Shifted(0.5), asked(Scaling(0.5))) == pytest.approx(0, abs=1e-6)


def test_fewer_prompts_go_together_where_memory_does_not_suffice() -> None:
    class Scarce(Scaling):
        def forward(self, x: Tensor, t: Tensor, told: Tensor) -> Any:
            if len(x) > 1:
                raise torch.OutOfMemoryError("not enough")
            return super().forward(x, t, told)

    short, plain = Scarce(0.5), Scaling(0.5)
    assert torch.equal(asked(short, batch_size=3).effect, asked(plain, batch_size=1).effect)
    assert short.training
