from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch.nn import functional

from finetune.errors import UsageError
from finetune.training.loss_function import LossFunction
from finetune.training.noise_prediction import NoisePrediction
from finetune.training.timestep_sampler import TimestepSampler

TYPES = ("epsilon", "v_prediction", "sample")


def small_unet() -> UNet2DModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(16, 16),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )


def tensors(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    x0 = torch.randn(5, 4, 8, 8, generator=source)
    noise = torch.randn(5, 4, 8, 8, generator=source)
    return x0, noise, torch.tensor([0, 10, 400, 998, 999])


def gradient(unet: UNet2DModel) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in unet.parameters() if p.grad is not None])


@pytest.mark.parametrize("prediction_type", TYPES)
def test_loss_and_gradient_equal_those_of_diffusers_own_calls(prediction_type: str) -> None:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type)
    x0, noise, t = tensors()
    unet = small_unet()
    noised = NoisePrediction(scheduler).add_noise(x0, noise, t)
    loss = NoisePrediction(scheduler).loss(unet, noised, {}).mean()
    loss.backward()
    ours = gradient(unet)

    unet.zero_grad()
    target = {"epsilon": noise, "v_prediction": scheduler.get_velocity(x0, noise, t), "sample": x0}[prediction_type]
    theirs = functional.mse_loss(unet(scheduler.add_noise(x0, noise, t), t).sample, target)
    theirs.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert (ours - gradient(unet)).norm() <= 1e-6 * ours.norm()


@pytest.mark.parametrize("prediction_type", TYPES)
def test_snr_weights_equal_the_papers_formula(prediction_type: str) -> None:
    """Hang et al. 2023: the weight on the x0 loss is min(SNR, gamma); noise and v losses divide by SNR and SNR + 1."""
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type)
    x0, noise, t = tensors()
    alpha, sigma = scheduler.alphas_cumprod[t] ** 0.5, (1 - scheduler.alphas_cumprod[t]) ** 0.5
    snr = (alpha / sigma) ** 2
    expected = torch.minimum(snr, torch.full_like(snr, 5.0))
    expected = expected / {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones(())}[prediction_type]
    noised = NoisePrediction(scheduler, snr_gamma=5.0).add_noise(x0, noise, t)
    torch.testing.assert_close(noised.snr_weight, expected, rtol=1e-5, atol=1e-7)
    weighted = NoisePrediction(scheduler, snr_gamma=5.0).loss(small_unet(), noised, {})
    plain = NoisePrediction(scheduler).loss(small_unet(), NoisePrediction(scheduler).add_noise(x0, noise, t), {})
    torch.testing.assert_close(weighted, plain * expected)


def test_draws_are_functions_of_the_key_and_offset_is_constant_per_channel() -> None:
    scheduler = DDPMScheduler()
    x0 = torch.zeros(3, 4, 8, 8)
    keys = torch.tensor([11, 12, 13])
    plain = NoisePrediction(scheduler).sample(x0, keys)
    again = NoisePrediction(scheduler).sample(x0[1:], keys[1:])
    assert torch.equal(plain.target[1:], again.target)
    assert torch.equal(plain.t[1:], again.t)
    offset = NoisePrediction(scheduler, noise_offset=0.5).sample(x0, keys).target - plain.target
    assert offset.std(dim=(2, 3)).max() < 1e-6
    assert offset.abs().max() > 0.01


def test_input_perturbation_changes_what_the_unet_sees_and_not_its_target() -> None:
    scheduler = DDPMScheduler()
    x0, keys = torch.zeros(2, 4, 8, 8), torch.tensor([1, 2])
    plain = NoisePrediction(scheduler).sample(x0, keys)
    perturbed = NoisePrediction(scheduler, input_perturbation=0.1).sample(x0, keys)
    assert torch.equal(plain.target, perturbed.target)
    assert not torch.equal(plain.x_t, perturbed.x_t)


def test_extra_channels_reach_the_unet() -> None:
    seen = []

    class Answer:
        sample = torch.zeros(2, 4, 8, 8)

    def unet(x: torch.Tensor, t: torch.Tensor) -> Answer:
        seen.append(x.shape)
        return Answer()

    objective = NoisePrediction(DDPMScheduler())
    noised = objective.sample(torch.zeros(2, 4, 8, 8), torch.tensor([1, 2]))
    objective.loss(unet, noised, {}, unet_channels=torch.zeros(2, 5, 8, 8))
    assert seen == [(2, 9, 8, 8)]


def test_what_cannot_be_learned_at_zero_terminal_snr_is_refused() -> None:
    scheduler = zero_snr_scheduler("epsilon")
    with pytest.raises(UsageError, match="prediction_type epsilon: at zero terminal SNR"):
        NoisePrediction(scheduler)


def zero_snr_scheduler(prediction_type: str) -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type, rescale_betas_zero_snr=True)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("weighting", [{"snr_gamma": 5.0}, {"debiased_estimation": True}])
def test_a_timestep_of_zero_snr_keeps_a_weight_of_1(prediction_type: str, weighting: dict[str, Any]) -> None:
    scheduler = zero_snr_scheduler(prediction_type)
    assert scheduler.alphas_cumprod[-1] == 0
    weights = NoisePrediction(scheduler, **weighting).weight(torch.tensor([500, 998, 999]))
    assert weights[2] == 1
    assert weights.isfinite().all()
    assert weights[1] > 0


def test_sd_scripts_weights_on_the_same_timesteps() -> None:
    """`apply_debiased_estimation` and `scale_v_prediction_loss_like_noise_prediction` of its custom_train_functions."""
    t = torch.tensor([0, 1, 300, 999])
    for prediction_type in ("epsilon", "v_prediction"):
        scheduler = DDPMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction_type
        )
        alpha, sigma = scheduler.alphas_cumprod[t] ** 0.5, (1 - scheduler.alphas_cumprod[t]) ** 0.5
        snr = torch.minimum((alpha / sigma) ** 2, torch.tensor(1000.0))
        assert snr[0] == 1000  # what they limit
        velocity = prediction_type == "v_prediction"
        debiased = 1 / (snr + 1) if velocity else 1 / torch.sqrt(snr)
        torch.testing.assert_close(NoisePrediction(scheduler, debiased_estimation=True).weight(t), debiased)
        if velocity:
            scaled = NoisePrediction(scheduler, scale_v_pred_loss_like_noise_pred=True)
            torch.testing.assert_close(scaled.weight(t), snr / (snr + 1))
            both = NoisePrediction(scheduler, scale_v_pred_loss_like_noise_pred=True, debiased_estimation=True)
            torch.testing.assert_close(both.weight(t), snr / (snr + 1) * debiased)
        else:
            with pytest.raises(UsageError, match="the model predicts epsilon; it is for v_prediction"):
                NoisePrediction(scheduler, scale_v_pred_loss_like_noise_pred=True)


def test_a_huber_loss_has_its_threshold_by_the_timestep() -> None:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    x0, noise, t = tensors()
    unet = small_unet()
    noised = NoisePrediction(scheduler, loss_function=LossFunction("huber")).add_noise(x0, noise, t)
    abar = scheduler.alphas_cumprod[t]
    sigma = ((1.0 - abar) / abar) ** 0.5
    c = (1 - 0.1) / (1 + sigma) ** 2 + 0.1  # sd-scripts, get_huber_threshold_if_needed, schedule snr
    c = c.view(-1, 1, 1, 1)
    error = unet(noised.x_t, t).sample - noise
    expected = (2 * c * (torch.sqrt(error**2 + c**2) - c)).mean(dim=(1, 2, 3))
    losses = NoisePrediction(scheduler, loss_function=LossFunction("huber")).loss(unet, noised, {})
    torch.testing.assert_close(losses, expected)
    masked = NoisePrediction(scheduler, loss_function=LossFunction("huber")).loss(
        unet, replace(noised, mask=torch.zeros(5, 1, 8, 8)), {}
    )
    assert masked.abs().max() == 0


def test_timesteps_and_validation_stay_in_the_range() -> None:
    objective = NoisePrediction(DDPMScheduler(), timestep_sampler=TimestepSampler(min_timestep=600, max_timestep=700))
    keys = torch.arange(200)
    t = objective.sample_timesteps(keys)
    assert 600 <= t.min() <= 605
    assert 694 <= t.max() < 700
    thirds = [objective.validation_timesteps(keys, part, 3) for part in range(3)]
    assert [third.min().item() // 10 for third in thirds] == [60, 63, 66]
    assert thirds[2].max() < 700
    with pytest.raises(UsageError, match="max_timestep = 1001: the model's schedule has 1000 timesteps"):
        NoisePrediction(DDPMScheduler(), timestep_sampler=TimestepSampler(max_timestep=1001))


def test_a_scheduler_of_flow_matching_is_refused() -> None:
    with pytest.raises(UsageError, match="one of flow matching: use FlowMatching"):
        NoisePrediction(FlowMatchEulerDiscreteScheduler())
