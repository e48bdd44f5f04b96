"""The sample grids of a run: which are drawn, when, and what they show."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from finetune.cache.image_source import LiveImages
from finetune.config import ResolvedConfig, TrainConfig
from finetune.data.captions import TRIGGER, with_trigger
from finetune.data.inpainting import middle_mask
from finetune.data.sampler import steps_per_epoch
from finetune.results import tracking
from finetune.results.sampling import (
    Hole,
    already_shows,
    draw_pictures,
    first_picture,
    grid,
    save_picture,
    side_by_side,
)
from finetune.run.context import Run
from finetune.run.evaluation import measured_interval
from finetune.run.memorization import count_copies
from finetune.run.sample_prompts import SamplePrompt, sample_prompts
from finetune.seeding import example_key, fold

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
    `eval_interval`, when the run knows how long it takes. Beforehand the cost is counted in UNet passes over one
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


AT_ONCE = 4
"""Pictures of one prompt that are drawn as one batch: what fits where a step of training fits."""

_NAME = re.compile(r"step-(\d+)\.png")


def draw_grid(run: Run) -> None:
    """A grid with the same prompts and seeds each time, as samples/step-N.png, unless it is there already."""
    config, model, samples, step = run.config, run.model, run.samples, run.trainer.steps_done
    path = _path(run, step)
    if not samples.prompts or already_shows(path, _settings(run)):
        return
    run.events.set_phase("sampling", step)
    clock, hole = time.perf_counter(), _hole(run)
    with run.trainer.ema_weights():
        rows = [
            draw_pictures(
                model,
                [prompt.text],
                range(prompt.seed, prompt.seed + samples.pictures),
                resolution=config.resolution,
                num_inference_steps=prompt.num_inference_steps or config.num_inference_steps,
                guidance_scale=config.guidance_scale if prompt.guidance_scale is None else prompt.guidance_scale,
                negative_prompt=prompt.negative,
                at_once=AT_ONCE,
                hole=hole,
            )[0]
            for prompt in samples.prompts
        ]
    run.release()
    count_copies(run, [picture for row in rows for picture in row])
    labels = [prompt.text for prompt in samples.prompts]
    save_picture(grid(rows, labels, title=f"step {step}"), path, shows=_settings(run))
    tracking.note_seconds(run.folder, step, "grid", time.perf_counter() - clock)
    run.events.emit("picture", step=step, path=path.relative_to(run.folder).as_posix())
    tracking.track_pictures(run.accelerator, step, path)


def _hole(run: Run) -> Hole | None:
    """What an inpainting model paints: the first training picture, as its mask says, or the middle of it."""
    if not run.model.inpainting:
        return None
    pictures, index = run.pictures, run.pictures.trained[0]
    pixels, _ = LiveImages(pictures, inpainting=True).load(
        index, example_key(run.config.seed, pictures.ids[index], 0), False
    )
    drawn = pictures.mask_digest(index) is None
    mask = middle_mask(pixels.shape[1], pixels.shape[2]) if drawn else pixels[3:]
    return Hole(to_pil_image(pixels[:3]), to_pil_image(mask))


def steps_between(run: Run) -> int | Fraction | None:
    """As asked for; else what the first grid and the first steps leave room for, and None while that is not known."""
    if run.samples.every or not run.samples.prompts:
        return run.samples.every
    return measured_interval(run.folder, "grid", run.config.max_train_steps, share=SAMPLING_SHARE, most=MOST_GRIDS)


def delete_stale_grids(run: Run) -> None:
    """Delete grids of later steps, which this run may not come to, and, if it draws any, those of other settings."""
    for path in (run.folder / "samples").iterdir():
        match = _NAME.fullmatch(path.name)
        others = run.samples.prompts and not already_shows(path, _settings(run))
        if match and (others or int(match[1]) > run.trainer.steps_done):
            path.unlink()


def write_before_after(run: Run) -> None:
    """samples/before-after.png from the first grid and the last."""
    if run.samples.prompts:
        last = _path(run, run.trainer.steps_done)
        side_by_side(_path(run, 0), last, run.folder / "samples/before-after.png")


def last_picture(run: Run) -> Image.Image | None:
    """The first picture of the grid of the last step; None where none was drawn."""
    return first_picture(_path(run, run.trainer.steps_done)) if run.samples.prompts else None


def _path(run: Run, step: int) -> Path:
    return run.folder / f"samples/step-{step}.png"


def _settings(run: Run) -> str:
    """A digest of everything but the weights that decides what a grid shows."""
    config, samples = run.config, run.samples
    settings = (samples.pictures, config.resolution, config.num_inference_steps, config.guidance_scale)
    if run.model.inpainting:
        settings += (run.pictures.image_info(run.pictures.trained[0]).digest,)
    return f"{fold(*map(repr, samples.prompts), *map(str, settings)):016x}"
