"""Which sample grids a run draws: those asked for, or as many as a small share of the run allows."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from finetune.config import ResolvedConfig, TrainConfig
from finetune.data.captions import TRIGGER, with_trigger
from finetune.data.sampler import steps_per_epoch
from finetune.run.prompts import SamplePrompt, sample_prompts

MOST_GRIDS = 10
SAMPLING_SHARE = 0.05
"""Share of a run's time that sample grids may take unless they were asked for."""


@dataclass(frozen=True)
class SamplePlan:
    """Which sample grids a run draws."""

    prompts: tuple[SamplePrompt, ...] = ()
    """() : no grids. Pixel mode has the one prompt ""."""
    pictures: int = 0
    """Per prompt."""
    every: int | Fraction | None = None
    """Steps between grids, beside the first and the last, where the user has said so."""
    share: float = 0.0
    """Estimated share of the run's time, without those that are drawn if time allows."""


def plan_samples(config: ResolvedConfig, *, latent: bool, captions: Sequence[str], visits: int) -> SamplePlan:
    """Grids as asked for, or a first and a last of the largest size that `SAMPLING_SHARE` of the run allows.

    At least one picture is drawn before and after, unless none is wanted. How many grids fit between them is said by
    `pace.interval`, when the run knows how long it takes. Beforehand the cost is counted in UNet passes over one
    picture: a sampler step is one (two with guidance), a training example three (forward, and a backward of about two),
    or two where frozen weights need no gradient (LoRA).

    Args:
        config: resolved.
        latent: prompts and guidance, or neither.
        captions: of the training pictures.
        visits: of an epoch.
    """
    if config.num_inference_steps == 0 or config.sample_every == 0:
        return SamplePlan()
    epoch = steps_per_epoch(visits, config.global_batch)
    every = config.sample_every or (config.save_image_epochs * epoch if config.save_image_epochs else None)
    prompts = sample_prompts(config.sample_prompts or (default_prompts(config, captions) if latent else ("",)))
    per_picture = config.num_inference_steps * (2 if latent and config.guidance_scale > 1 else 1)
    total = config.max_train_steps
    training = (2 if config.method == "lora" else 3) * config.global_batch * total
    chosen = config.eval_batch_size

    def plan(prompts: tuple[SamplePrompt, ...], pictures: int, every: int | Fraction | None) -> SamplePlan:
        grids = 2 + ((total - 1) // every if every else 0)
        return SamplePlan(prompts, pictures, every, grids * len(prompts) * pictures * per_picture / training)

    if every or config.sample_prompts:
        return plan(prompts, chosen, every)
    smaller = [(prompts, chosen), (prompts, -(-chosen // 2)), (prompts, -(-chosen // 4)), (prompts[:1], 1)]
    plans = [plan(some, number, None) for some, number in smaller]
    return next((grid for grid in plans if grid.share <= SAMPLING_SHARE), plans[-1])


def default_prompts(config: TrainConfig, captions: Sequence[str]) -> tuple[str, ...]:
    """A training caption, the subject in a new place, and the class without the trigger (which shows leakage)."""
    caption = captions[0]
    subject = with_trigger(config.prompt, config.trigger) if config.prompt else caption
    bare = with_trigger(subject.replace(config.trigger, TRIGGER), None) if config.trigger else "a picture"
    return tuple(dict.fromkeys((caption, f"{subject} in the snow", bare)))
