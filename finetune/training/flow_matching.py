"""FlowMatching: predict the velocity of a straight path from the image to the noise."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from finetune import seeding
from finetune.errors import UsageError
from finetune.training.loss_function import LossFunction
from finetune.training.noise_sampler import NoiseSampler
from finetune.training.objective import NoisedBatch, predict_noised, weighted_loss
from finetune.training.timestep_sampler import TimestepSampler


class FlowMatching:
    """Rectified flow: x_t = (1 - s) x0 + s noise, the target is noise - x0, and t = T s.

    Liu et al. 2023, "Flow Straight and Fast", eq. 1; Esser et al. 2024, "Scaling Rectified Flow Transformers for
    High-Resolution Image Synthesis", eq. 13 and 23 (the shift).

    Args:
        num_train_timesteps: T, what the UNet gets for pure noise.
        shift: above 1: more noise, s' = shift s / (1 + (shift - 1) s).
        noise_sampler: draws the noise; None: plain noise.
        timestep_sampler: draws T s before the shift; None: uniformly.
        loss_function: of the error; None: its square.

    Raises:
        UsageError: timesteps are beyond T.
    """

    prediction_type = "flow"

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        *,
        shift: float = 1.0,
        noise_sampler: NoiseSampler | None = None,
        timestep_sampler: TimestepSampler | None = None,
        loss_function: LossFunction | None = None,
    ):
        self.num_train_timesteps = num_train_timesteps
        self.shift = shift
        self.noise_sampler = noise_sampler or NoiseSampler()
        self.timestep_sampler = timestep_sampler or TimestepSampler(max_timestep=num_train_timesteps)
        self.loss_function = loss_function or LossFunction()
        if self.timestep_sampler.max_timestep > num_train_timesteps:
            raise UsageError(
                f"max_timestep = {self.timestep_sampler.max_timestep}: the model has {num_train_timesteps} timesteps"
            )

    def sample(self, x0: Tensor, keys: Tensor) -> NoisedBatch:
        """Noise and timestep for each example: x0 (B, C, H, W), keys (B,) on the CPU -> NoisedBatch on x0's device."""
        noise, input_noise = self.noise_sampler.draw(keys, x0)
        return self.add_noise(x0, noise, self.sample_timesteps(keys).to(x0.device), input_noise)

    def sample_timesteps(self, keys: Tensor) -> Tensor:
        """The timesteps at which examples are trained: keys (B,) -> (B,) fp32 on the CPU, in [0, T]."""
        return self.timestep_sampler.continuous(keys, shift=self.shift).float()

    def validation_timesteps(self, keys: Tensor, part: int, parts: int) -> Tensor:
        """Uniform timesteps within one of equal parts of the trained range: keys (B,) -> (B,) fp32 on the CPU."""
        start = self.timestep_sampler.min_timestep
        size = (self.timestep_sampler.max_timestep - start) / parts
        return (start + size * (part + seeding.uniform(keys, "timestep"))).float()

    def probe_timesteps(self, states: int) -> tuple[int, ...]:
        """The upper end of each of `states` equal parts of the schedule, falling."""
        return tuple((state + 1) * self.num_train_timesteps // states for state in reversed(range(states)))

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor, input_noise: Tensor | None = None) -> NoisedBatch:
        """Return the noised batch for given noise (B, C, H, W) and timesteps (B,), fp32.

        `input_noise`, if given, replaces the noise in x_t but not in the target.
        """
        s = self._shares(t, x0)
        x_t = (1 - s) * x0 + s * (noise if input_noise is None else input_noise)
        share = s.flatten()
        huber_c = self.loss_function.thresholds(share, share / (1 - share))
        return NoisedBatch(x_t, t, noise - x0, torch.ones_like(share), huber_c=huber_c)

    def loss(
        self,
        unet: Callable[..., Any],
        noised: NoisedBatch,
        cond: Mapping[str, Any],
        unet_channels: Tensor | None = None,
    ) -> Tensor:
        """Error of each example, mean over its elements: (B,) fp32. The arguments are those of `NoisePrediction`."""
        return weighted_loss(self.loss_function, predict_noised(unet, noised, cond, unet_channels), noised)

    def predict_v(self, predicted: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The velocity noise - x0, which the UNet predicts."""
        return predicted

    def step(self, x_t: Tensor, v: Tensor, t: Tensor, to: Tensor) -> Tensor:
        """Euler's step from timesteps `t` to `to`, (B,) both."""
        return x_t + (self._shares(to, x_t) - self._shares(t, x_t)) * v

    def _shares(self, t: Tensor, like: Tensor) -> Tensor:
        """How much of x_t is noise at timesteps (B,), (B, 1, 1, 1) where `like` is."""
        return (t.to(like.device, like.dtype, non_blocking=True) / self.num_train_timesteps).view(-1, 1, 1, 1)
