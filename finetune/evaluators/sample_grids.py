"""The sample grid evaluator: which grids are drawn, when, and of which prompts."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from finetune.cache.image_source import condition_pixels
from finetune.config import ResolvedConfig, TrainConfig
from finetune.data.captions import TRIGGER, with_trigger
from finetune.data.image_dataset import ImageDataset
from finetune.data.sampler import steps_per_epoch
from finetune.evaluators.evaluator import EvaluationLog, EvaluationPeriod, training_passes
from finetune.evaluators.sample_prompts import SamplePrompt, sample_prompts
from finetune.models.image_condition import ConditionImages, ImageCondition
from finetune.models.loading import DiffusionModel
from finetune.results.sampling import (
    already_shows,
    draw_pictures,
    first_picture,
    grid,
    grid_pictures,
    save_picture,
    side_by_side,
)
from finetune.seeding import example_key, fold
from finetune.training.trainer import Trainer

FILES = ("samples/step-*.png", "samples/before-after.png")
"""Patterns of what is written into a run folder here."""

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
    picture: a sampler step is one, or two with guidance; for training see `training_passes`.

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
    total, training = config.max_train_steps, training_passes(config)
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


class SampleGrids:
    """The evaluator that draws the same prompts with the same seeds each time, as samples/step-N.png.

    Args:
        plan: what is drawn; without prompts nothing is.
        model: draws it.
        pictures: the first of them is what an inpainting model paints into.
        trainer: of the run.
        log: of the run.
        config: of the run.
        release: called when the pictures are drawn, and the frozen networks may leave the device again.
    """

    def __init__(
        self,
        *,
        plan: SamplePlan,
        model: DiffusionModel,
        pictures: ImageDataset,
        trainer: Trainer,
        log: EvaluationLog,
        config: ResolvedConfig,
        release: Callable[[], None],
    ):
        self.plan, self._model, self._pictures, self._trainer = plan, model, pictures, trainer
        self._log, self._config, self._release = log, config, release
        self._period = EvaluationPeriod(
            log.folder, "grid", config.max_train_steps, every=plan.every, share=SAMPLING_SHARE, most=MOST_GRIDS
        )
        self.drawn = set[int]()
        """Steps whose grids were drawn by this object, rather than found."""

    @property
    def image_condition(self) -> ImageCondition | None:
        """What the model is shown, of the first training picture; None: grids are drawn from prompts alone."""
        return self._model.image_condition

    def should_run(self, step: int) -> bool:
        """Whether the run draws a grid after this step."""
        return bool(self.plan.prompts) and self._period.includes(step)

    def run(self, step: int) -> None:
        """Draw the grid of this step, unless it is there."""
        path, settings = self.path(step), self._settings()
        if not self.plan.prompts or already_shows(path, settings):
            return
        self._log.set_phase("sampling", step)
        with self._log.timed("grid", step):
            with self._trainer.ema_weights():
                rows = self._draw()
            self._release()
            labels = [prompt.text for prompt in self.plan.prompts]
            save_picture(grid(rows, labels, title=f"step {step}"), path, shows=settings)
        self.drawn.add(step)
        self._log.add_picture(step, path)

    def _draw(self) -> list[list[Image.Image]]:
        """A row of pictures for each prompt."""
        config, condition = self._config, self._condition()
        return [
            draw_pictures(
                self._model,
                [prompt.text],
                range(prompt.seed, prompt.seed + self.plan.pictures),
                resolution=config.resolution,
                num_inference_steps=prompt.num_inference_steps or config.num_inference_steps,
                guidance_scale=config.guidance_scale if prompt.guidance_scale is None else prompt.guidance_scale,
                negative_prompt=prompt.negative,
                batch_size=AT_ONCE,
                condition=condition,
            )[0]
            for prompt in self.plan.prompts
        ]

    def _condition(self) -> ConditionImages | None:
        """The first training picture and its image condition, of which nothing is random."""
        if self.image_condition is None:
            return None
        pictures, index = self._pictures, self._pictures.trained[0]
        sample = pictures.sample(index)
        crop = sample.crop(example_key(self._config.seed, sample.id, 0))
        shown = condition_pixels(self.image_condition, sample, crop=crop, flip=False, key=None)
        return ConditionImages(to_pil_image(crop.pixels(sample.open())), to_pil_image(shown))

    def delete_stale(self, step: int) -> None:
        """Delete grids of steps after this one, which the run may not come to, and, if it draws any, those of other
        settings.
        """
        for path in self.path(0).parent.iterdir():
            match = _NAME.fullmatch(path.name)
            others = self.plan.prompts and not already_shows(path, self._settings())
            if match and (others or int(match[1]) > step):
                path.unlink()

    def write_before_after(self, step: int) -> None:
        """Write samples/before-after.png from the first grid and that of this step, the last."""
        if self.plan.prompts:
            side_by_side(self.path(0), self.path(step), self.path(0).with_name("before-after.png"))

    def pictures(self, step: int) -> list[Image.Image]:
        """Return the pictures of the grid of this step, one prompt after the other; none where there is no grid."""
        number = len(self.plan.prompts) * self.plan.pictures
        return grid_pictures(self.path(step), number, self._config.resolution) if number else []

    def first_picture(self, step: int) -> Image.Image | None:
        """The first picture of the grid of this step, as large as it is there; None where none was drawn."""
        return first_picture(self.path(step)) if self.plan.prompts else None

    def path(self, step: int) -> Path:
        """The file of the grid of a step."""
        return self._log.folder / f"samples/step-{step}.png"

    def _settings(self) -> str:
        """A digest of everything but the weights that decides what a grid shows."""
        config, plan = self._config, self.plan
        settings = (plan.pictures, config.resolution, config.num_inference_steps, config.guidance_scale)
        if self.image_condition is not None:
            settings += (self._pictures.image_info(self._pictures.trained[0]).digest,)
        return f"{fold(*map(_drawn_of, plan.prompts), *map(str, settings)):016x}"


def _drawn_of(prompt: SamplePrompt) -> str:
    """What a row of a grid is drawn of, spelt out: grids are known by it, also those of earlier versions."""
    names = ("text", "negative", "num_inference_steps", "guidance_scale", "seed", "other_size")
    return f"SamplePrompt({', '.join(f'{name}={getattr(prompt, name)!r}' for name in names)})"
