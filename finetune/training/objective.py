"""Objectives: what a trainer and a whole run ask of them, and what they share.

`NoisePrediction` is in `noise_prediction.py`, `FlowMatching` in `flow_matching.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from finetune.batch import as_input
from finetune.training.loss_function import LossFunction


@dataclass(frozen=True)
class NoisedBatch:
    """One draw of the forward process, ready for the UNet."""

    x_t: Tensor
    """(B, C, H, W) what the UNet sees."""
    t: Tensor
    """(B,) timesteps in [0, T): int64, or of flow matching fp32."""
    target: Tensor
    """(B, C, H, W) what the UNet should answer."""
    snr_weight: Tensor
    """(B,) weight of each example's error at its timestep; ones unless the objective weighs them."""
    mask: Tensor | None = None
    """(B, 1, H, W) weight of the error at each place; None: ones."""
    huber_c: Tensor | None = None
    """(B,) thresholds of a Huber loss, see `LossFunction`; None: another loss."""


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


def predict_noised(
    unet: Callable[..., Any], noised: NoisedBatch, cond: Mapping[str, Any], unet_channels: Tensor | None
) -> Tensor:
    """What the UNet answers to a noised batch, (B, C, H, W) fp32; `unet_channels` (B, C', H, W) follow x_t."""
    x = noised.x_t if unet_channels is None else torch.cat([noised.x_t, unet_channels], dim=1)
    return prediction(unet, x, noised.t, cond)


def weighted_loss(loss_function: LossFunction, predicted: Tensor, noised: NoisedBatch) -> Tensor:
    """The loss of each example, (B,) fp32: the mean over its elements, of what `predicted` (B, C, H, W) misses."""
    error = loss_function(predicted, noised.target.float(), noised.huber_c)
    if noised.mask is not None:
        error = noised.mask * error
    return noised.snr_weight * error.mean(dim=(1, 2, 3))
