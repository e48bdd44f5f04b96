"""Validation in the course of a run: on which pictures, when, and what validation.jsonl records of it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, inf
from typing import Any

import torch
from torch import Tensor

from finetune.atomic_io import json_lines
from finetune.config import ResolvedConfig
from finetune.data.image_dataset import ImageDataset
from finetune.results import tracking
from finetune.run.context import Run
from finetune.run.evaluation import measured_interval
from finetune.seeding import fold
from finetune.training.objective import NoisePrediction
from finetune.training.validation import BANDS, band, paired, validation_losses

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
    config: ResolvedConfig, pictures: ImageDataset, earlier: Sequence[Mapping[str, Any]] = ()
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


def _plan(config: ResolvedConfig, pictures: ImageDataset, some: Sequence[int], draws: int) -> ValidationPlan:
    some = sorted(some)
    names = [name for index in some for name in (pictures.ids[index], pictures.image_info(index).digest)]
    return ValidationPlan(tuple(some), draws, f"{fold(config.seed, draws, *names):016x}")


MOST_VALIDATIONS = 20
"""Validations of a run, unless more were asked for."""


def validate(run: Run) -> None:
    """Measure the loss on what is held out, and record and tell how it has changed; unless that was done already."""
    plan, step = run.validation, run.trainer.steps_done
    before = measured(run)
    if not plan.examples or step in before:
        return
    objective = run.trainer.objective
    assert isinstance(objective, NoisePrediction)
    run.events.set_phase("validating", step)
    clock = time.perf_counter()
    with run.trainer.ema_weights():
        losses = validation_losses(
            run.model.unet,
            run.model.encoder,
            objective,
            run.encoded,
            plan.examples,
            draws=plan.draws,
            seed=run.config.seed,
            batch_size=run.trainer.micro_batch_size or run.config.train_batch_size,
        )
    tracking.note_seconds(run.folder, step, "validation", time.perf_counter() - clock)
    record = _record(step, losses, before.get(0)) | {"of": plan.digest, "losses": losses.tolist()}
    tracking.append_line(run.folder / tracking.VALIDATION, record)
    run.events.emit("validation", **{name: value for name, value in record.items() if name not in ("of", "losses")})
    tracking.track_validation(run.accelerator, record)
    print(f"validation at step {step}: {_as_line(record)}", flush=True)


def _record(step: int, losses: Tensor, first: Tensor | None) -> dict[str, Any]:
    """The loss in all and by band of noise, and its change since step 0: the mean, and where it is with 95 %."""
    record: dict[str, Any] = {"step": step, "loss": losses.mean().item()}
    record |= {f"loss_{name}": band(losses, name).mean().item() for name in BANDS}
    if first is not None:
        record["change"] = list(paired(first, losses))
        record |= {f"change_{name}": list(paired(band(first, name), band(losses, name))) for name in BANDS}
    return record


def _as_line(record: dict[str, Any]) -> str:
    line = f"loss {record['loss']:.4f}"
    if "change" in record:
        mean, low, high = record["change"]
        line += f", {mean:+.4f} since the start (95 %: {low:+.4f} to {high:+.4f})"
    return line


def measured(run: Run) -> dict[int, Tensor]:
    """Step -> the losses that were measured there, (examples, draws), of what this run validates on."""
    return {line["step"]: torch.tensor(line["losses"]) for line in _lines(run)}


def best_step(run: Run) -> int | None:
    """The step after the start with the least loss on what is held out; None where there was no validation yet."""
    means = {step: losses.mean().nan_to_num(nan=inf).item() for step, losses in measured(run).items() if step}
    return min(means, key=means.__getitem__, default=None)


def least_step(run: Run) -> int | None:
    """The step with the least loss on what is held out, the untrained model's among them."""
    means = {step: losses.mean().nan_to_num(nan=inf).item() for step, losses in measured(run).items()}
    return min(means, key=means.__getitem__, default=None)


def steps_between_validations(run: Run) -> int | Fraction | None:
    """As asked for; else what the first validation and the first steps leave room for, None while that is not known."""
    config, total = run.config, run.config.max_train_steps
    if config.validate_every or not run.validation.examples:
        return config.validate_every
    if config.early_stop:  # a function of the config, so that where a run ends is one, too
        return ceil(total / MOST_VALIDATIONS)
    return measured_interval(run.folder, "validation", total, share=SHARE, most=MOST_VALIDATIONS)


def _lines(run: Run) -> list[dict[str, Any]]:
    """Return the lines of validation.jsonl of what this run validates on."""
    return [line for line in json_lines(run.folder / tracking.VALIDATION) if line["of"] == run.validation.digest]
