"""Validation loss: on held-out examples, with the same noise and timesteps each time.

Two such measurements differ by what was learned between them alone, so their paired difference is known far better than
either of them.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import atan, cos, pi, sin, sqrt, tan
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor, nn

from finetune import seeding
from finetune.data.loader import Examples
from finetune.models.encoders import Encoder
from finetune.out_of_memory import halved_until_it_fits
from finetune.training.objective import DiffusionObjective

BANDS = ("low", "middle", "high")
"""Thirds of the timesteps, by noise."""


@torch.no_grad()
def validation_losses(
    unet: nn.Module,
    encoder: Encoder,
    objective: DiffusionObjective,
    source: Examples,
    examples: Sequence[int],
    *,
    draws: int = 6,
    seed: int = 0,
    batch_size: int = 4,
) -> Tensor:
    """The loss of each example at each of `draws` timesteps, one from each of as many equal slices of the schedule.

    Noise and timestep are functions of seed, example and draw. The UNet is in eval mode meanwhile.

    Args:
        unet: what is measured.
        encoder: turns what the examples store into x0.
        objective: measures the error; noise offset and input perturbation, which are for training, are left out.
        source: where the examples are, as `encode` returns it.
        examples: numbers of those to measure.
        draws: a multiple of 3, so that each of the `BANDS` has as many.
        seed: of the draws.
        batch_size: examples per forward pass; fewer where memory does not suffice.

    Returns:
        (examples, draws) fp32 on the CPU, from low noise to high.
    """
    device = next(unet.parameters()).device
    trained = unet.training

    def measured(size: int) -> Tensor:
        losses = torch.zeros(len(examples), draws)
        for rows in _alike(source, examples, size):
            indices = [examples[row] for row in rows]
            for draw in range(draws):
                names = [f"validation: {source.ids[index]}" for index in indices]
                keys = torch.tensor([seeding.example_key(seed, name, draw) for name in names])
                visits = list(zip(indices, keys.tolist(), strict=True))
                source.ensure_encoded(visits)
                loaded = [source.visits.load(index, key) for index, key in visits]
                batch = source.collate(indices, keys, loaded).to(device)
                x0 = encoder.sample(batch.latent_params, batch.keys)
                t = objective.validation_timesteps(keys, draw, draws)
                noise = seeding.normal(keys, "noise", x0.shape[1:])
                noised = replace(objective.add_noise(x0, noise.to(device), t.to(device)), mask=batch.mask)
                losses[rows, draw] = objective.loss(unet, noised, batch.cond, batch.unet_channels).float().cpu()
        return losses

    unet.eval()
    try:
        return halved_until_it_fits(measured, batch_size)
    finally:
        unet.train(trained)


def _alike(source: Examples, examples: Sequence[int], batch_size: int) -> list[list[int]]:
    """Rows of examples of one shape, at most `batch_size` together."""
    by_shape: dict[int, list[int]] = {}
    for row, index in enumerate(examples):
        by_shape.setdefault(source.shapes[index], []).append(row)
    return [rows[at : at + batch_size] for rows in by_shape.values() for at in range(0, len(rows), batch_size)]


class Difference(NamedTuple):
    """How much the loss has changed, and in which interval that lies with 95 % confidence."""

    mean: float
    low: float
    high: float


def paired(before: Tensor, after: Tensor) -> Difference:
    """The change of the mean loss from one measurement to another of the same examples, (examples, draws) both.

    The interval is Student's, over the examples' own mean changes: it speaks of other pictures of the same kind.

    Raises:
        ValueError: of fewer than two examples, which do not tell how much such changes spread.
    """
    changes = (after.double() - before.double()).mean(dim=1)
    if len(changes) < 2:
        raise ValueError(f"{len(changes)} examples: a difference has an interval from 2 on")
    mean = changes.mean().item()
    half = student_t(len(changes) - 1) * changes.std().item() / sqrt(len(changes))
    return Difference(mean, mean - half, mean + half)


def chance_of_rise(before: Tensor, after: Tensor) -> float:
    """How probable a rise of the mean loss as large as this one is where nothing has changed: Student's paired test,
    one-sided, over the examples' mean changes, (examples, draws) both.
    """
    changes = (after.double() - before.double()).mean(dim=1)
    mean, error = changes.mean().item(), changes.std().item() / sqrt(len(changes))
    if mean <= 0 or not error > 0:
        return 0.0 if mean > 0 and error == 0 else 1.0
    return student_t_tail(mean / error, len(changes) - 1)


def band(losses: Tensor, name: str) -> Tensor:
    """The part of (examples, draws) that is of low, middle or high noise."""
    return losses.chunk(len(BANDS), dim=1)[BANDS.index(name)]


def student_t_tail(t: float, freedom: int) -> float:
    """The probability of Student's t above `t` (0 or more). Exact: Abramowitz & Stegun 1964, 26.7.3 and 26.7.4."""
    angle = atan(t / sqrt(freedom))
    odd = freedom % 2 == 1
    total = term = 0.0 if freedom == 1 else cos(angle) if odd else 1.0
    for power in range(3 if odd else 2, freedom - 1, 2):
        term *= cos(angle) ** 2 * (power - 1) / power
        total += term
    inside = 2 / pi * (angle + sin(angle) * total) if odd else sin(angle) * total
    return (1 - inside) / 2


def student_t(freedom: int, confidence: float = 0.95) -> float:
    """How many standard errors of the mean a two-sided confidence interval reaches.

    Exact for 1 and 2 degrees of freedom, else the series of Abramowitz & Stegun 1964, 26.7.5.
    """
    if freedom == 1:
        return tan(pi * confidence / 2)
    if freedom == 2:
        return confidence * sqrt(2 / (1 - confidence**2))
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))
