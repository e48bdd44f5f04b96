"""What a run will do, decided and checked before any weight is loaded."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.config import TrainConfig, replace
from finetune.data.captions import TRIGGER, with_trigger
from finetune.data.sampler import steps_per_epoch
from finetune.errors import UsageError
from finetune.models.families import default_method, defaults, total_steps, warmup_steps
from finetune.models.locate import Location

SAMPLING_SHARE = 0.05
"""Share of a run's time that sample grids may take unless they were asked for."""

_LATENT_ONLY = ("prompt", "trigger", "caption_dropout", "sample_prompts", "clip_skip", "max_token_length")
_LORA_ONLY = ("rank", "lora_alpha", "lora_dropout", "lora_target_modules")
_EMA_ONLY = ("ema_inv_gamma", "ema_power", "ema_max_decay")
_ADAM_ONLY = ("adam_beta1", "adam_beta2", "adam_epsilon")
_HUB_ONLY = ("hub_model_id", "hub_private_repo")


def resolve(config: TrainConfig, found: Location, *, pictures: int, varied_captions: bool) -> TrainConfig:
    """The config with every family-dependent option filled in; `mixed_precision` aside, which needs the hardware.

    Args:
        config: what the user gave.
        found: the model it names.
        pictures: how many there are to train on.
        varied_captions: True when they do not all share one caption.

    Raises:
        UsageError: an option that this kind of model or method cannot use.
    """
    method = config.method or default_method(found.family)
    _refuse_unusable(config, found, method)
    resolution = config.resolution or found.resolution
    suited = defaults(found.family, method, pictures, resolution, varied_captions)
    known = {"method": method, "resolution": resolution}
    if method == "lora":
        known["lora_alpha"] = config.lora_alpha if config.lora_alpha is not None else float(config.rank)
    config = replace(config, **known)
    wanted_steps = config.max_train_steps is not None or config.num_train_epochs is not None
    missing = {
        name: value
        for name, value in suited.items()
        if getattr(config, name) is None and not (name == "num_train_epochs" and wanted_steps)
    }
    config = replace(config, **missing)
    steps = total_steps(pictures, global_batch(config), config.num_train_epochs, config.max_train_steps)
    warmup = config.lr_warmup_steps
    if warmup is None:
        warmup = warmup_steps(steps, found.family, resolution)
    elif warmup >= steps:
        raise UsageError(f"lr_warmup_steps = {warmup}: the whole run has only {steps} steps; give a smaller one")
    return replace(config, max_train_steps=steps, lr_warmup_steps=warmup)


def global_batch(config: TrainConfig) -> int:
    """Pictures per optimizer step of a resolved config."""
    return (config.train_batch_size or 1) * config.gradient_accumulation_steps


def changed(config: TrainConfig) -> set[str]:
    """Names of the options that are not at their defaults."""
    return {field.name for field in dataclasses.fields(config) if getattr(config, field.name) != field.default}


def _refuse_unusable(config: TrainConfig, found: Location, method: str) -> None:
    given = changed(config)
    if not found.family.latent:
        if method == "lora":
            raise UsageError(f"method = lora: {found.name} is a pixel-space model; allowed is full")
        for name in _LATENT_ONLY:
            if name in given:
                raise UsageError(f"{name} cannot be used with {found.name}: a pixel-space model takes no text")
    if method == "full":
        for name in _LORA_ONLY:
            if name in given:
                raise UsageError(f"{name} cannot be used with method full; give --method lora")
    for name, needed, there in (
        *((name, "use_ema", config.use_ema is not False) for name in _EMA_ONLY),
        *((name, "optimizer adamw or prodigy", config.optimizer in ("adamw", "prodigy")) for name in _ADAM_ONLY),
        *((name, "push_to_hub", config.push_to_hub) for name in _HUB_ONLY),
        ("save_image_epochs", "sample_every left out", config.sample_every is None),
        ("guidance_scale", "a model that takes text", found.family.latent),
    ):
        if name in given and not there:
            raise UsageError(f"{name} cannot be used here: it needs {needed}")


@dataclass(frozen=True)
class SamplePlan:
    """Which sample grids a run draws."""

    prompts: tuple[str, ...] = ()
    """() : no grids. Pixel mode has the one prompt ""."""
    pictures: int = 0
    """Per prompt."""
    every: int | None = None
    """Steps between grids, beside the first and the last."""
    share: float = 0.0
    """Estimated share of the run's time."""


def plan_samples(config: TrainConfig, *, latent: bool, captions: Sequence[str], pictures: int) -> SamplePlan:
    """Grids as asked for, or the largest that `SAMPLING_SHARE` of the run allows.

    The cost is counted in UNet passes over one picture: a sampler step is one (two with guidance), a training
    example three (forward, and a backward of about two), or two where frozen weights need no gradient (LoRA).

    Args:
        config: resolved.
        latent: prompts and guidance, or neither.
        captions: of the training pictures.
        pictures: how many there are to train on.
    """
    if config.num_inference_steps == 0 or config.sample_every == 0:
        return SamplePlan()
    epoch = steps_per_epoch(pictures, global_batch(config))
    every = config.sample_every or (config.save_image_epochs * epoch if config.save_image_epochs else None)
    prompts = config.sample_prompts or (default_prompts(config, captions) if latent else ("",))
    per_picture = (config.num_inference_steps or 1) * (2 if latent and config.guidance_scale > 1 else 1)
    total = config.max_train_steps or 1
    training = (2 if config.method == "lora" else 3) * global_batch(config) * total
    chosen = config.eval_batch_size or 1

    def plan(prompts: tuple[str, ...], pictures: int, every: int | None) -> SamplePlan:
        grids = 2 + ((total - 1) // every if every else 0)
        return SamplePlan(prompts, pictures, every, grids * len(prompts) * pictures * per_picture / training)

    if every or config.sample_prompts:
        return plan(prompts, chosen, every)
    smaller = [(prompts, chosen), (prompts, -(-chosen // 2)), (prompts, -(-chosen // 4)), (prompts[:1], 1)]
    for some, number in smaller:
        grid = plan(some, number, None)
        if grid.share <= SAMPLING_SHARE:
            more = min(10, int(SAMPLING_SHARE / grid.share * 2)) - 1  # grids after the first, the last included
            return plan(some, number, -(-total // more)) if more > 1 else grid
    return SamplePlan()


def default_prompts(config: TrainConfig, captions: Sequence[str]) -> tuple[str, ...]:
    """A training caption, the subject in a new place, and the class without the trigger (which shows leakage)."""
    caption = captions[0]
    subject = with_trigger(config.prompt, config.trigger) if config.prompt else caption
    bare = with_trigger(subject.replace(config.trigger, TRIGGER), None) if config.trigger else "a picture"
    return tuple(dict.fromkeys((caption, f"{subject} in the snow", bare)))


def as_settings(config: TrainConfig) -> dict[str, Any]:
    """Options that differ from their defaults, for people: model cards and trackers."""
    return {f.name: v for f in dataclasses.fields(config) if (v := getattr(config, f.name)) != f.default}
