"""What a UNet predicts, by its errors: for a checkpoint that does not say so."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from finetune.training.flow_matching import FlowMatching
from finetune.training.noise_prediction import NoisePrediction
from finetune.training.objective import predict_noised

TIMESTEPS = (300, 600, 900)
CLEAR = 0.7
"""The least error must be below this share of the next one."""


@torch.no_grad()
def prediction_errors(
    unet: Callable[..., Any],
    x0: Tensor,
    noise: Tensor,
    cond: Mapping[str, Any],
    unet_channels: Tensor | None = None,
    *,
    scheduler: DDPMScheduler,
    timesteps: Sequence[int] = TIMESTEPS,
) -> dict[str, float]:
    """The error of what `unet` predicts, taken for each prediction type: 0 for a perfect one, 1 for one of zeros.

    The mean over timesteps of the squared error relative to the mean square of the target. A UNet of noise answers x_t
    of the noise schedule, one of flow matching that of the straight path.

    Args:
        unet: in eval mode.
        x0: (B, C, H, W) scaled latents.
        noise: (B, C, H, W).
        cond: UNet keyword arguments, see `Batch.cond`.
        unet_channels: see `Batch.unet_channels`.
        scheduler: has the noise schedule; its `prediction_type` is not used.
        timesteps: in [0, 1000).

    Returns:
        prediction type ("epsilon", "v_prediction", "flow") -> error.
    """
    objectives: dict[str, NoisePrediction | FlowMatching] = {"flow": FlowMatching()}
    for name in ("epsilon", "v_prediction"):
        of_name: Any = DDPMScheduler.from_config(scheduler.config, prediction_type=name, rescale_betas_zero_snr=False)
        objectives[name] = NoisePrediction(of_name)
    errors = dict.fromkeys(objectives, 0.0)
    for timestep in timesteps:
        t = torch.full((len(x0),), timestep, device=x0.device)
        for name, objective in objectives.items():
            noised = objective.add_noise(x0, noise, t)
            predicted = predict_noised(unet, noised, cond, unet_channels)
            error = (predicted - noised.target).square().mean() / noised.target.square().mean()
            errors[name] += error.item() / len(timesteps)
    return errors


def clear_prediction_type(errors: Mapping[str, float]) -> str | None:
    """The prediction type of the least error; None: another one is near."""
    least, second, *_ = sorted(errors, key=errors.__getitem__)
    return least if errors[least] < CLEAR * errors[second] else None
