"""Objectives: predict the noise (or v, or x0) of a noised example, with the mean squared error.

Notation of Ho et al. 2020 (DDPM): x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise, SNR_t = abar_t / (1 - abar_t).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from finetune import seeding
from finetune.batch import as_input
from finetune.deprecation import Renamed
from finetune.errors import UsageError


@dataclass(frozen=True)
class NoisedBatch:
    """One draw of the forward process, ready for the UNet."""

    x_t: Tensor
    """(B, C, H, W) what the UNet sees."""
    t: Tensor
    """(B,) int64 timesteps in [0, T)."""
    target: Tensor
    """(B, C, H, W) what the UNet should answer."""
    snr_weight: Tensor
    """(B,) weight of each example's error at its timestep; ones unless `snr_gamma` is set."""
    mask: Tensor | None = None
    """(B, 1, H, W) weight of the error at each place; None: ones."""


def prediction(unet: Callable[..., Any], x: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Tensor:
    """What the UNet answers, in its own `dtype` where it has one, as fp32: x (B, C, H, W), t (B,) -> (B, C', H, W)."""
    dtype = getattr(unet, "dtype", x.dtype)
    return unet(x.to(dtype), t, **as_input(cond, dtype)).sample.float()


class Objective(Protocol):
    """What the trainer asks of an objective: `NoisePrediction`, or one of your own."""

    def sample(self, x0: Tensor, keys: Tensor) -> Any:
        """Everything random of a visit: x0 (B, C, H, W), keys (B,) on the CPU; a tensor, or a dataclass of them."""
        ...

    def loss(self, network: Any, noised: Any, cond: Mapping[str, Any], unet_channels: Tensor | None, /) -> Tensor:
        """The loss of each example, (B,) fp32, from what `sample` returned. The network's inputs are in its dtype."""
        ...


class DiffusionObjective(Objective, Protocol):
    """What a whole run asks of an objective: the trainer, the evaluators, the records of faults and the exports."""

    prediction_type: str
    """What the UNet predicts, as diffusers' schedulers name it."""

    def sample_timesteps(self, keys: Tensor) -> Tensor:
        """The timesteps at which examples are trained: keys (B,) -> (B,) on the CPU."""
        ...

    def validation_timesteps(self, keys: Tensor, part: int, parts: int) -> Tensor:
        """Timesteps within one of equal parts of the schedule, from low noise to high: keys (B,) -> (B,)."""
        ...

    def probe_timesteps(self, states: int) -> tuple[int, ...]:
        """The upper end of each of `states` equal parts of the schedule, from high noise to low."""
        ...

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> NoisedBatch:
        """Return the noised batch for given noise (B, C, H, W) and timesteps (B,)."""
        ...

    def predict_v(self, predicted: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """What `step` takes, of what the UNet predicts: (B, C, H, W) all, t (B,)."""
        ...

    def step(self, x_t: Tensor, v: Tensor, t: Tensor, to: Tensor) -> Tensor:
        """Step from timesteps `t` to `to`, (B,) both, without noise."""
        ...


class NoisePrediction:
    """Noise-prediction objective over a DDPM schedule.

    Args:
        scheduler: the training schedule; its `prediction_type` says what the UNet predicts.
        snr_gamma: Min-SNR weighting (Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting
            Strategy", eq. 8 and its forms for the noise and v parametrizations); None: off.
        noise_offset: strength of a constant per channel added to the noise.
        input_perturbation: strength of extra noise in x_t but not in the target (Ning et al. 2023, alg. 1).

    Raises:
        UsageError: the scheduler's `prediction_type` is none of epsilon, v_prediction and sample, or its last timestep
            is pure noise (zero terminal SNR; Lin et al. 2023) and could not be learned.
    """

    def __init__(
        self,
        scheduler: DDPMScheduler,
        *,
        snr_gamma: float | None = None,
        noise_offset: float = 0.0,
        input_perturbation: float = 0.0,
    ):
        self.alphas_cumprod: Tensor = scheduler.alphas_cumprod.float()
        self.prediction_type: str = scheduler.config["prediction_type"]
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise UsageError(f"prediction_type {self.prediction_type!r}: choose one of epsilon, v_prediction, sample")
        pure_noise = self.alphas_cumprod[-1] < 1e-6  # Stable Diffusion's own schedule ends at 5e-3
        if pure_noise and self.prediction_type == "epsilon":
            raise UsageError("prediction_type epsilon: at zero terminal SNR the noise tells nothing; use v_prediction")
        if pure_noise and snr_gamma is not None:
            raise UsageError("snr_gamma would give the last timestep of a zero-terminal-SNR schedule no weight at all")
        self.snr_gamma = snr_gamma
        self.noise_offset = noise_offset
        self.input_perturbation = input_perturbation

    def sample(self, x0: Tensor, keys: Tensor) -> NoisedBatch:
        """Noise and timestep for each example: x0 (B, C, H, W), keys (B,) on the CPU -> NoisedBatch on x0's device."""
        noise = seeding.normal(keys, "noise", x0.shape[1:])
        t = self.sample_timesteps(keys)
        if self.noise_offset:
            noise += self.noise_offset * seeding.normal(keys, "noise offset", (x0.shape[1], 1, 1))
        input_noise = None
        if self.input_perturbation:
            more = seeding.normal(keys, "input perturbation", x0.shape[1:])
            input_noise = (noise + self.input_perturbation * more).to(x0.device)
        return self.add_noise(x0, noise.to(x0.device), t.to(x0.device), input_noise)

    def sample_timesteps(self, keys: Tensor) -> Tensor:
        """Timesteps that are uniform over the schedule: keys (B,) -> (B,) int64 on the CPU."""
        return seeding.integers(keys, "timestep", len(self.alphas_cumprod))

    def validation_timesteps(self, keys: Tensor, part: int, parts: int) -> Tensor:
        """Timesteps that are uniform over one of equal parts of the schedule: keys (B,) -> (B,) int64 on the CPU."""
        total = len(self.alphas_cumprod)
        first, end = part * total // parts, (part + 1) * total // parts
        return first + seeding.integers(keys, "timestep", end - first)

    def probe_timesteps(self, states: int) -> tuple[int, ...]:
        """The upper end of each of `states` equal parts of the schedule, falling."""
        return tuple((state + 1) * len(self.alphas_cumprod) // states - 1 for state in reversed(range(states)))

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor, input_noise: Tensor | None = None) -> NoisedBatch:
        """Return the noised batch for given noise (B, C, H, W) and timesteps (B,): for validation and tests.

        `input_noise`, if given, replaces the noise in x_t but not in the target.
        """
        signal, spread = self._roots(t, x0)
        x_t = signal * x0 + spread * (noise if input_noise is None else input_noise)
        return NoisedBatch(x_t, t, self.target(x0, noise, t), self.weight(t.to(x0.device)))

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the UNet should answer, (B, C, H, W)."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":  # Salimans & Ho 2022, appendix D
            signal, spread = self._roots(t, x0)
            return signal * noise - spread * x0
        return x0

    def weight(self, t: Tensor) -> Tensor:
        """The weight of an example's error at its timestep, (B,) -> (B,): Min-SNR, or ones."""
        abar = self.alphas_cumprod.to(t.device, non_blocking=True)[t]
        snr = abar / (1 - abar)
        if self.snr_gamma is None:
            return torch.ones_like(snr)
        if self.prediction_type == "epsilon":
            return (self.snr_gamma / snr).clamp(max=1)  # min(SNR, gamma) / SNR, defined at SNR = 0 too
        clipped = snr.clamp(max=self.snr_gamma)
        return clipped / (snr + 1) if self.prediction_type == "v_prediction" else clipped

    def loss(
        self,
        unet: Callable[..., Any],
        noised: NoisedBatch,
        cond: Mapping[str, Any],
        unet_channels: Tensor | None = None,
    ) -> Tensor:
        """Weighted squared error of each example, mean over its elements: (B,) fp32.

        Args:
            unet: called as `unet(x, t, **cond)`, answers an object with `.sample`. What it gets is in its `dtype`,
                where it has one.
            noised: from `sample` or `add_noise`.
            cond: the UNet's keyword arguments.
            extra: channels appended to x_t (inpainting), (B, C', H, W).
        """
        x = noised.x_t if unet_channels is None else torch.cat([noised.x_t, unet_channels], dim=1)
        error = (prediction(unet, x, noised.t, cond) - noised.target.float()).square()
        if noised.mask is not None:
            error = noised.mask * error
        return noised.snr_weight * error.mean(dim=(1, 2, 3))

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
