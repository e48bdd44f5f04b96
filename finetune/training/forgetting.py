"""Forgetting probes: how far the effect of unrelated prompts has changed during training.

What a prompt does to a picture is how the UNet's answer with it differs from that without. The questions come from the
model itself: each prompt is drawn in a few steps from fixed noise, and what was asked on the way (x_t, t), and what the
prompt did to the answer, is kept. Later the same is asked again.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune.batch import map_tensors
from finetune.out_of_memory import halved_until_it_fits
from finetune.training.objective import DiffusionObjective, prediction


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What the UNet was asked of N prompts at S timesteps, and how it answered."""

    cond: Mapping[str, Any]
    """UNet keyword arguments of the prompts, tensors of first size N."""
    empty: Mapping[str, Any]
    """Those of N empty prompts."""
    t: tuple[int, ...]
    """The timesteps, falling."""
    x_t: Tensor
    """(S, N, C, H, W) fp32 on the CPU."""
    effect: Tensor
    """(S, N, C, H, W) fp32 on the CPU: what each prompt did to the answer."""
    unet_channels: Tensor | None = None
    """(N, C', H, W) on the CPU: what is shown to the UNet beside x_t (inpainting)."""


@torch.no_grad()
def record_probe(
    unet: nn.Module,
    objective: DiffusionObjective,
    cond: Mapping[str, Any],
    empty: Mapping[str, Any],
    noise: Tensor,
    *,
    states: int = 3,
    batch_size: int = 4,
    unet_channels: Tensor | None = None,
) -> Probe:
    """Draw each prompt in `states` steps of DDIM (Song et al. 2021, eq. 12 with sigma 0), without guidance.

    Args:
        unet: what is asked; in eval mode meanwhile.
        objective: says what the UNet predicts, on which schedule.
        cond, empty: of N prompts and of N empty ones, on the UNet's device.
        noise: (N, C, H, W) on the CPU, where the drawing begins.
        states: steps, each from the upper end of one of as many equal parts of the schedule.
        batch_size: prompts per forward pass; fewer where memory does not suffice.
        extra: channels appended to x_t (inpainting), (N, C', H, W) on the CPU.
    """
    times = objective.probe_timesteps(states)
    inputs, effects = [], []
    x_t = noise.float()
    for t, following in zip(times, (*times[1:], None), strict=True):
        unet_input = x_t if unet_channels is None else torch.cat([x_t, unet_channels], dim=1)
        answer, without = (_answers(unet, unet_input, t, conditions, batch_size) for conditions in (cond, empty))
        inputs.append(x_t)
        effects.append(answer - without)
        if following is not None:
            now, then = torch.tensor([t]), torch.tensor([following])
            x_t = objective.step(x_t, objective.predict_v(answer, x_t, now), now, then)
    return Probe(
        cond=cond,
        empty=empty,
        t=times,
        x_t=torch.stack(inputs),
        effect=torch.stack(effects),
        unet_channels=unet_channels,
    )


@torch.no_grad()
def probe_drift(unet: nn.Module, probe: Probe, *, batch_size: int = 4) -> float:
    """Squared distance of what the prompts do today from what they did, relative to it; the mean over the timesteps.

    0: as before. 1: as far as an untrained head, to which all prompts are the same.
    """
    shares = []
    for t, x_t, before in zip(probe.t, probe.x_t, probe.effect, strict=True):
        unet_input = x_t if probe.unet_channels is None else torch.cat([x_t, probe.unet_channels], dim=1)
        answer, without = (
            _answers(unet, unet_input, t, conditions, batch_size) for conditions in (probe.cond, probe.empty)
        )
        shares.append((answer - without - before).square().sum() / before.square().sum())
    return torch.stack(shares).mean().item()


def _answers(unet: nn.Module, x_t: Tensor, t: int, cond: Mapping[str, Any], batch_size: int) -> Tensor:
    """What the UNet predicts, (N, C, H, W) fp32 on the CPU."""
    device = next(unet.parameters()).device

    def answers(size: int) -> Tensor:
        outputs = []
        for start in range(0, len(x_t), size):
            part = slice(start, start + size)
            x, some = x_t[part].to(device), map_tensors(lambda tensor, part=part: tensor[part], cond)
            times = torch.full((len(x),), t, device=device)
            outputs.append(prediction(unet, x, times, some).cpu())
        return torch.cat(outputs)

    with _evaluated(unet):
        return halved_until_it_fits(answers, batch_size)


@contextmanager
def _evaluated(unet: nn.Module) -> Iterator[None]:
    """Put the UNet in eval mode for a while."""
    trained = unet.training
    unet.eval()
    try:
        yield
    finally:
        unet.train(trained)
