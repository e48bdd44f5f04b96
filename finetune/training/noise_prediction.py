"""NoisePrediction: predict the noise, v or x0 of a noised example.

Notation of Ho et al. 2020 (DDPM): x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise, SNR_t = abar_t / (1 - abar_t).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from finetune.deprecation import Renamed
from finetune.errors import UsageError
from finetune.training.loss_function import LossFunction
from finetune.training.noise_sampler import NoiseSampler
from finetune.training.objective import NoisedBatch, predict_noised, weighted_loss
from finetune.training.timestep_sampler import TimestepSampler

PREDICTIONS = ("epsilon", "v_prediction", "sample")
LARGEST_SNR = 1000.0
"""What an SNR counts at most in `debiased_estimation` and `scale_v_pred_loss_like_noise_pred`, as in sd-scripts."""


class NoisePrediction:
    """Noise-prediction objective over a DDPM schedule.

    The weights of `snr_gamma`, `debiased_estimation` and `scale_v_pred_loss_like_noise_pred` multiply. Where a schedule
    has a timestep of zero SNR (`zero_terminal_snr`), each of them would leave it no weight, or an infinite one, and
    drawing begins there: its weight is 1, as in diffusers' training scripts.

    Args:
        scheduler: the training schedule; its `prediction_type` says what the UNet predicts.
        snr_gamma: Min-SNR weighting (Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting
            Strategy", eq. 8 and its forms for the noise and v parametrizations); None: off.
        debiased_estimation: weighting by 1 / sqrt(SNR) (Yu et al. 2023, "Unmasking Bias in Diffusion Model
            Training"), for v by 1 / (SNR + 1) as in sd-scripts.
        scale_v_pred_loss_like_noise_pred: weighting of v by SNR / (SNR + 1), sd-scripts' approximation of the loss that
            noise prediction has.
        noise_offset: see `NoiseSampler.offset`.
        input_perturbation: see `NoiseSampler.input_perturbation`.
        noise_sampler: draws the noise; None: with the two strengths above.
        timestep_sampler: draws the timesteps; None: uniformly over the schedule.
        loss_function: of the error; None: its square.

    Raises:
        UsageError: the scheduler's `prediction_type` is none of epsilon, v_prediction and sample, its last timestep
            is pure noise (zero terminal SNR; Lin et al. 2023) and could not be learned, an option is for another
            `prediction_type`, or timesteps are beyond the schedule.
    """

    def __init__(
        self,
        scheduler: DDPMScheduler | FlowMatchEulerDiscreteScheduler,
        *,
        snr_gamma: float | None = None,
        debiased_estimation: bool = False,
        scale_v_pred_loss_like_noise_pred: bool = False,
        noise_offset: float = 0.0,
        input_perturbation: float = 0.0,
        noise_sampler: NoiseSampler | None = None,
        timestep_sampler: TimestepSampler | None = None,
        loss_function: LossFunction | None = None,
    ):
        if not isinstance(scheduler, DDPMScheduler):
            raise UsageError("the model's scheduler is one of flow matching: use FlowMatching")
        self.alphas_cumprod: Tensor = scheduler.alphas_cumprod.float()
        self.prediction_type: str = scheduler.config["prediction_type"]
        if self.prediction_type not in PREDICTIONS:
            raise UsageError(f"prediction_type {self.prediction_type!r}: choose one of {', '.join(PREDICTIONS)}")
        pure_noise = self.alphas_cumprod[-1] < 1e-6  # Stable Diffusion's own schedule ends at 5e-3
        if pure_noise and self.prediction_type == "epsilon":
            raise UsageError("prediction_type epsilon: at zero terminal SNR the noise tells nothing; use v_prediction")
        if scale_v_pred_loss_like_noise_pred and self.prediction_type != "v_prediction":
            raise UsageError(
                f"scale_v_pred_loss_like_noise_pred: the model predicts {self.prediction_type}; it is for v_prediction"
            )
        total = len(self.alphas_cumprod)
        self.timestep_sampler = timestep_sampler or TimestepSampler(max_timestep=total)
        if self.timestep_sampler.max_timestep > total:
            raise UsageError(
                f"max_timestep = {self.timestep_sampler.max_timestep}: the model's schedule has {total} timesteps"
            )
        self.noise_sampler = noise_sampler or NoiseSampler(offset=noise_offset, input_perturbation=input_perturbation)
        self.loss_function = loss_function or LossFunction()
        self.snr_gamma = snr_gamma
        self.debiased_estimation = debiased_estimation
        self.scale_v_pred_loss_like_noise_pred = scale_v_pred_loss_like_noise_pred

    def sample(self, x0: Tensor, keys: Tensor) -> NoisedBatch:
        """Noise and timestep for each example: x0 (B, C, H, W), keys (B,) on the CPU -> NoisedBatch on x0's device."""
        noise, input_noise = self.noise_sampler.draw(keys, x0)
        return self.add_noise(x0, noise, self.sample_timesteps(keys).to(x0.device), input_noise)

    def sample_timesteps(self, keys: Tensor) -> Tensor:
        """The timesteps at which examples are trained: keys (B,) -> (B,) int64 on the CPU."""
        return self.timestep_sampler.integers(keys)

    def validation_timesteps(self, keys: Tensor, part: int, parts: int) -> Tensor:
        """Uniform timesteps within one of equal parts of the trained range: keys (B,) -> (B,) int64 on the CPU."""
        return self.timestep_sampler.within(keys, part, parts)

    def probe_timesteps(self, states: int) -> tuple[int, ...]:
        """The upper end of each of `states` equal parts of the schedule, falling."""
        return tuple((state + 1) * len(self.alphas_cumprod) // states - 1 for state in reversed(range(states)))

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor, input_noise: Tensor | None = None) -> NoisedBatch:
        """Return the noised batch for given noise (B, C, H, W) and timesteps (B,): for validation and tests.

        `input_noise`, if given, replaces the noise in x_t but not in the target.
        """
        signal, spread = self._roots(t, x0)
        x_t = signal * x0 + spread * (noise if input_noise is None else input_noise)
        noised = NoisedBatch(x_t, t, self.target(x0, noise, t), self.weight(t.to(x0.device)))
        sigma = (spread / signal).flatten()
        return replace(noised, huber_c=self.loss_function.thresholds(t / len(self.alphas_cumprod), sigma))

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the UNet should answer, (B, C, H, W)."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":  # Salimans & Ho 2022, appendix D
            signal, spread = self._roots(t, x0)
            return signal * noise - spread * x0
        return x0

    def weight(self, t: Tensor) -> Tensor:
        """The weight of an example's error at its timestep, (B,) -> (B,): a product of those that are on, or ones."""
        abar = self.alphas_cumprod.to(t.device, non_blocking=True)[t]
        snr = abar / (1 - abar)
        weight = torch.ones_like(snr)
        if self.snr_gamma is not None:
            weight *= self._min_snr(snr, self.snr_gamma)
        limited = snr.clamp(max=LARGEST_SNR)
        if self.scale_v_pred_loss_like_noise_pred:
            weight *= limited / (limited + 1)
        if self.debiased_estimation:
            weight *= self._debiased(limited)
        return torch.where(snr == 0, 1.0, weight)

    def _min_snr(self, snr: Tensor, gamma: float) -> Tensor:
        if self.prediction_type == "epsilon":
            return (gamma / snr).clamp(max=1)
        clipped = snr.clamp(max=gamma)
        return clipped / (snr + 1) if self.prediction_type == "v_prediction" else clipped

    def _debiased(self, snr: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return snr.rsqrt()
        # The error of x0 is that of the noise divided by sqrt(SNR).
        return 1 / (snr + 1) if self.prediction_type == "v_prediction" else snr.sqrt()

    def loss(
        self,
        unet: Callable[..., Any],
        noised: NoisedBatch,
        cond: Mapping[str, Any],
        unet_channels: Tensor | None = None,
    ) -> Tensor:
        """Weighted error of each example, mean over its elements: (B,) fp32.

        Args:
            unet: called as `unet(x, t, **cond)`, answers an object with `.sample`. What it gets is in its `dtype`,
                where it has one.
            noised: from `sample` or `add_noise`.
            cond: the UNet's keyword arguments.
            unet_channels: channels appended to x_t (inpainting), (B, C', H, W).
        """
        return weighted_loss(self.loss_function, predict_noised(unet, noised, cond, unet_channels), noised)

    def predict_v(self, predicted: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """v = sqrt(abar) noise - sqrt(1 - abar) x0 (Salimans & Ho 2022, appendix D) of what the UNet predicts."""
        signal, spread = self._roots(t, x_t)
        if self.prediction_type == "epsilon":
            return (predicted - spread * x_t) / signal
        return predicted if self.prediction_type == "v_prediction" else (signal * x_t - predicted) / spread

    draw, noised = Renamed("sample"), Renamed("add_noise")
    moved, velocity = Renamed("step"), Renamed("predict_v")

    def step(self, x_t: Tensor, v: Tensor, t: Tensor, to: Tensor) -> Tensor:
        """Step from timesteps `t` to `to`, (B,) both, by DDIM without noise (Song et al. 2021, eq. 12).

        `v` is what `predict_v` returns at `t`.
        """
        (signal, spread), (next_signal, next_spread) = self._roots(t, x_t), self._roots(to, x_t)
        x0, noise = signal * x_t - spread * v, spread * x_t + signal * v
        return next_signal * x0 + next_spread * noise

    def _roots(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar) and sqrt(1 - abar) of timesteps (B,), each (B, 1, 1, 1) where `like` is."""
        abar = self.alphas_cumprod.to(like.device, non_blocking=True)[t]
        return abar.sqrt().view(-1, 1, 1, 1), (1 - abar).sqrt().view(-1, 1, 1, 1)
