"""Diff2Flow: train a UNet that predicts noise or v with the loss of flow matching.

Schusterbauer et al. 2025, "Diff2Flow: Training Flow Matching Models via Diffusion Model Alignment" (CVPR). A point
x_s = (1 - s) x0 + s noise of the straight path is a point of the diffusion process after a change of scale:

    x_s / sqrt((1 - s)^2 + s^2) = alpha_t x0 + sigma_t noise,   where sigma_t / (alpha_t + sigma_t) = s.

So the UNet is called with the x_t and t that it knows, and the velocity noise - x0 follows from what it predicts. All
that it knew holds at step 0. The UNet still predicts what it did before, so that every program draws with it: a step of
DDIM between two timesteps is Euler's step of the flow between the same shares of noise.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from finetune.training.flow_matching import FlowMatching
from finetune.training.loss_function import LossFunction
from finetune.training.noise_prediction import NoisePrediction
from finetune.training.noise_sampler import NoiseSampler
from finetune.training.objective import NoisedBatch, predict_noised, weighted_loss
from finetune.training.timestep_sampler import TimestepSampler


class Diff2Flow:
    """Flow matching over the schedule of a model that predicts noise, v or x0.

    Shares of noise s that the schedule does not reach are moved to its ends; Stable Diffusion's ends at 0.936.

    Args:
        scheduler: the training schedule of the model.
        shift: above 1: more noise, see `FlowMatching`.
        noise_sampler: draws the noise; None: plain noise.
        timestep_sampler: draws T s before the shift, for the T timesteps of the schedule; None: uniformly.

    Raises:
        UsageError: as `NoisePrediction` and `FlowMatching`.
    """

    def __init__(
        self,
        scheduler: DDPMScheduler,
        *,
        shift: float = 1.0,
        noise_sampler: NoiseSampler | None = None,
        timestep_sampler: TimestepSampler | None = None,
    ):
        self.diffusion = NoisePrediction(scheduler)
        self.prediction_type = self.diffusion.prediction_type
        abar = self.diffusion.alphas_cumprod
        self.shares: Tensor = (1 - abar).sqrt() / (abar.sqrt() + (1 - abar).sqrt())
        """(T,) the share of noise s of each timestep."""
        self.flow = FlowMatching(len(abar), shift=shift, noise_sampler=noise_sampler, timestep_sampler=timestep_sampler)

    def sample(self, x0: Tensor, keys: Tensor) -> NoisedBatch:
        """Noise and timestep for each example: x0 (B, C, H, W), keys (B,) on the CPU -> NoisedBatch on x0's device."""
        noise, input_noise = self.flow.noise_sampler.draw(keys, x0)
        return self.add_noise(x0, noise, self.sample_timesteps(keys).to(x0.device), input_noise)

    def sample_timesteps(self, keys: Tensor) -> Tensor:
        """The timesteps at which examples are trained: keys (B,) -> (B,) fp32 on the CPU, in [0, T - 1]."""
        return self._timesteps(self.flow.sample_timesteps(keys))

    def validation_timesteps(self, keys: Tensor, part: int, parts: int) -> Tensor:
        """Timesteps whose s is uniform in one of equal parts of the trained range: keys (B,) -> (B,) fp32."""
        return self._timesteps(self.flow.validation_timesteps(keys, part, parts))

    def probe_timesteps(self, states: int) -> tuple[int, ...]:
        """The upper end of each of `states` equal parts of the schedule, falling."""
        return self.diffusion.probe_timesteps(states)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor, input_noise: Tensor | None = None) -> NoisedBatch:
        """Return the noised batch for given noise (B, C, H, W) and real timesteps (B,) of the schedule.

        The error of the velocity is that of the prediction times a factor, whose square is the weight: for noise
        (alpha + sigma) / alpha, for v alpha + sigma, for x0 (alpha + sigma) / sigma.

        `input_noise`, if given, replaces the noise in x_t but not in the target.
        """
        alpha, sigma = self._roots(t, x0)
        x_t = alpha * x0 + sigma * (noise if input_noise is None else input_noise)
        target, factor = {
            "epsilon": (noise, (alpha + sigma) / alpha),
            "v_prediction": (alpha * noise - sigma * x0, alpha + sigma),
            "sample": (x0, (alpha + sigma) / sigma),
        }[self.prediction_type]
        return NoisedBatch(x_t, t, target, factor.flatten().square())

    def loss(
        self,
        unet: Callable[..., Any],
        noised: NoisedBatch,
        cond: Mapping[str, Any],
        unet_channels: Tensor | None = None,
    ) -> Tensor:
        """Squared error of the velocity, mean over its elements: (B,) fp32. Arguments: as of `NoisePrediction`."""
        return weighted_loss(LossFunction(), predict_noised(unet, noised, cond, unet_channels), noised)

    def predict_v(self, predicted: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """What `step` takes, at timesteps of the schedule, int64."""
        return self.diffusion.predict_v(predicted, x_t, t)

    def step(self, x_t: Tensor, v: Tensor, t: Tensor, to: Tensor) -> Tensor:
        """A step of DDIM from timesteps `t` to `to`, (B,) int64 both."""
        return self.diffusion.step(x_t, v, t, to)

    def _timesteps(self, flow_timesteps: Tensor) -> Tensor:
        """Real timesteps of the schedule with the same shares of noise as those of the flow, (B,) on the CPU."""
        s = flow_timesteps.double() / len(self.shares)
        t = np.interp(s.numpy(), self.shares.double().numpy(), np.arange(len(self.shares)))
        return torch.from_numpy(t).float()

    def _roots(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at real timesteps (B,), (B, 1, 1, 1) both where `like` is."""
        shares = self.shares.to(like.device, non_blocking=True)
        below = t.to(like.device).long().clamp(max=len(shares) - 2)
        s = torch.lerp(shares[below], shares[below + 1], t.to(like.device).float() - below).view(-1, 1, 1, 1)
        norm = ((1 - s).square() + s.square()).sqrt()
        return (1 - s) / norm, s / norm
