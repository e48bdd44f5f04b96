"""How much a run makes its UNet forget: unrelated prompts, probed at intervals and recorded in forgetting.jsonl."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import torch

from finetune import seeding
from finetune.atomic_io import json_lines, write_json_lines
from finetune.batch import moved
from finetune.config import ResolvedConfig
from finetune.data.captions import with_trigger
from finetune.models.image_condition import fully_masked_channels
from finetune.models.loading import DiffusionModel
from finetune.results import tracking
from finetune.run.context import Run
from finetune.run.evaluation import measured_interval
from finetune.training.forgetting import Probe, probe_drift, record_probe
from finetune.training.objective import NoisePrediction

SHARE = 0.02
"""Of a run's time that this may take unless a number of prompts was asked for."""

STATES = 3
"""Timesteps at which each prompt is asked."""

FEWEST_PROMPTS, MOST_PROMPTS = 4, 64
"""Prompts: fewer would tell little, more are not in the package."""


@dataclass(frozen=True)
class ForgettingProbes:
    """What was asked before the run, and how it was answered."""

    plain: Probe
    triggered: Probe | None
    """The same prompts with the trigger word in front; None where there is none."""
    seconds: float
    """That asking has taken."""


def make_probes(config: ResolvedConfig, model: DiffusionModel) -> ForgettingProbes | None:
    """Probe the untrained model; None where it takes no text, or `SHARE` of the run is too short for `FEWEST_PROMPTS`.

    The cost is counted in UNet passes over one picture: a training example takes three (forward, and a backward of
    about two), or two where frozen weights need no gradient (LoRA). Its prompts are asked at the start and in the end.
    """
    number = config.forgetting_prompts
    if number is None:
        passes = SHARE / 2 * (2 if config.method == "lora" else 3) * config.global_batch * config.max_train_steps
        number = min(MOST_PROMPTS, int(passes / (2 * STATES * (2 if config.trigger else 1))))
        number = 0 if number < FEWEST_PROMPTS else number
    if not model.family.latent or not number:
        return None
    clock = time.perf_counter()
    prompts = generic_prompts(model.family.probe_prompts)[:number]
    model.conditioner.to(model.unet.device)
    plain, triggered = _record(config, model, prompts), None
    if config.trigger:
        triggered = _record(config, model, [with_trigger(prompt, config.trigger) for prompt in prompts])
    return ForgettingProbes(plain, triggered, time.perf_counter() - clock)


def generic_prompts(probe_prompts: str) -> list[str]:
    """64 prompts of what a model knows: "everyday" or "tiny"."""
    return (files("finetune") / f"assets/prompts/{probe_prompts}.txt").read_text(encoding="utf-8").splitlines()


def _record(config: ResolvedConfig, model: DiffusionModel, prompts: Sequence[str]) -> Probe:
    side, unet, conditioner = config.resolution, model.unet, model.conditioner
    geometry = torch.tensor([[side, side, 0, 0, side, side]] * len(prompts), device=unet.device)
    cond, empty = (
        conditioner.kwargs(moved(conditioner.encode(texts), unet.device), geometry)
        for texts in (prompts, [""] * len(prompts))
    )
    keys = torch.tensor([seeding.example_key(0, prompt, 0) for prompt in prompts])
    latent = side // model.pipeline().vae_scale_factor  # pyright: ignore[reportAttributeAccessIssue] # of latent ones
    noise = seeding.normal(keys, "forgetting", (unet.config["out_channels"], latent, latent))
    extra = fully_masked_channels(model.encoder.to(unet.device), keys, side) if model.inpainting else None
    objective, size = NoisePrediction(model.scheduler), config.train_batch_size
    return record_probe(unet, objective, cond, empty, noise, states=STATES, batch_size=size, extra=extra)


MOST_PROBES = 10
"""Readings of a run."""


def measure_forgetting(run: Run) -> None:
    """Read the meter, and record and tell what it says; unless that was done already."""
    step, path = run.trainer.steps_done, run.folder / tracking.FORGETTING
    lines = json_lines(path)
    if run.forgetting_probes is None or any(line["step"] == step for line in lines):
        return
    run.events.set_phase("forgetting", step)
    clock = time.perf_counter()
    if step:
        with run.trainer.ema_weights():
            record = {"step": step, "forgetting": _read(run, run.forgetting_probes.plain)}
            if run.forgetting_probes.triggered:
                record["with_trigger"] = _read(run, run.forgetting_probes.triggered)
        seconds = time.perf_counter() - clock
    else:
        record = {"step": 0, "forgetting": 0.0} | ({"with_trigger": 0.0} if run.forgetting_probes.triggered else {})
        seconds = run.forgetting_probes.seconds
    tracking.note_seconds(run.folder, step, "forgetting", seconds)
    write_json_lines(path, [*lines, record])
    run.events.emit("forgetting", **record)
    tracking.track_forgetting(run.accelerator, record)
    if step:
        trigger = f" ({record['with_trigger']:.1%} with the trigger)" if "with_trigger" in record else ""
        print(f"forgetting at step {step}: {record['forgetting']:.1%}{trigger}", flush=True)


def steps_between_readings(run: Run) -> int | None:
    """What the first reading and the first steps leave room for, None while that is not known."""
    if run.forgetting_probes is None:
        return None
    return measured_interval(run.folder, "forgetting", run.config.max_train_steps, share=SHARE, most=MOST_PROBES)


def _read(run: Run, probe: Probe) -> float:
    batch_size = run.trainer.micro_batch_size or run.config.train_batch_size
    return probe_drift(run.model.unet, probe, batch_size=batch_size)
