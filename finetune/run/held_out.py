"""What a run validates on: pictures that are held out, at as many timesteps as a share of its time allows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.config import ResolvedConfig
from finetune.data.pictures import Pictures
from finetune.seeding import fold

SHARE = 0.05
"""Of a run's time that validation may take unless it was asked for."""

DRAWS = (12, 6, 3)
"""Timesteps per picture: the most that `SHARE` allows."""


@dataclass(frozen=True)
class ValidationPlan:
    """What is validated on, each time."""

    examples: tuple[int, ...] = ()
    """Numbers of pictures; none: there is no validation."""
    draws: int = 0
    """Noise and timestep pairs of each."""
    digest: str = ""
    """Of all this; only what has the same can be compared."""


def plan_validation(
    config: ResolvedConfig, pictures: Pictures, earlier: Sequence[Mapping[str, Any]] = ()
) -> ValidationPlan:
    """All pictures that are held out with as many draws as a first and a last validation may take, or some of them.

    The cost is counted in UNet passes over one picture: a training example takes three (forward, and a backward of
    about two), or two where frozen weights need no gradient (LoRA).

    Args:
        config: of the run.
        pictures: its pictures.
        earlier: lines of validation.jsonl. A run that goes on for longer validates on as many as it has begun with.
    """
    held = sorted(pictures.held_out, key=lambda index: fold(config.seed, "validated", pictures.ids[index]))
    if not held:
        return ValidationPlan()
    if earlier:
        losses = earlier[-1]["losses"]
        plan = _plan(config, pictures, held[: len(losses)], len(losses[0]))
        if plan.digest == earlier[-1]["of"]:
            return plan
    passes = SHARE / 2 * (2 if config.method == "lora" else 3) * config.global_batch * config.max_train_steps
    draws = next((draws for draws in DRAWS if draws * len(held) <= passes), DRAWS[-1])
    return _plan(config, pictures, held[: max(2, int(passes / draws))], draws)


def _plan(config: ResolvedConfig, pictures: Pictures, some: Sequence[int], draws: int) -> ValidationPlan:
    some = sorted(some)
    names = [name for index in some for name in (pictures.ids[index], pictures.checked(index).digest)]
    return ValidationPlan(tuple(some), draws, f"{fold(config.seed, draws, *names):016x}")
