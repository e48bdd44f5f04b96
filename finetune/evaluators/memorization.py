"""The memorization evaluator: how many images of each grid are near copies of training images (copies.jsonl)."""

from collections.abc import Iterator, Sequence

from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from finetune.cache.image_source import LiveImages
from finetune.config import ResolvedConfig
from finetune.data.image_dataset import ImageDataset
from finetune.evaluators.evaluator import EvaluationLog
from finetune.evaluators.sample_grids import SampleGrids
from finetune.results import metrics_log
from finetune.results.memorization import TrainingFeatures, originals
from finetune.seeding import example_key, fold

MOST = 300
"""Pictures that grids are compared with: what a few seconds suffice to look at."""


def known_pictures(config: ResolvedConfig, pictures: ImageDataset) -> TrainingFeatures | None:
    """What grids are compared with, of the subject's own pictures; None where they do not tell what a near copy is."""
    trained = [index for index in pictures.trained if index < pictures.num_subject_images]
    some = sorted(trained, key=lambda index: fold(config.seed, "compared", pictures.ids[index]))[:MOST]
    return originals(_as_trained(config, pictures, some), mirrored=pictures.flips)


def _as_trained(config: ResolvedConfig, pictures: ImageDataset, some: Sequence[int]) -> Iterator[Image.Image]:
    visits = LiveImages(pictures)
    for index in some:
        pixels = visits.load(index, example_key(config.seed, pictures.ids[index], 0), flip=False).latent_params
        yield to_pil_image(pixels)


class Memorization:
    """The evaluator of how many pictures of each grid are near copies of training pictures, in copies.jsonl.

    Args:
        training_features: of the training pictures.
        grids: draws the pictures.
        log: of the run.
    """

    def __init__(self, training_features: TrainingFeatures, grids: SampleGrids, log: EvaluationLog):
        self._training_features, self._grids, self._log = training_features, grids, log

    def should_run(self, step: int) -> bool:
        """Whether a grid is drawn after this step."""
        return self._grids.should_run(step)

    def run(self, step: int) -> None:
        """Count the near copies in the grid of this step, and record them."""
        counted = any(line["step"] == step for line in self._log.lines(metrics_log.COPIES))
        if counted and step not in self._grids.drawn:
            return
        pictures = self._grids.pictures(step)
        if not pictures:
            return
        copies = self._training_features.copied(pictures)
        found = f"{copies} of {len(pictures)} samples are near copies of training images"
        self._log.write(
            "copies",
            {"step": step, "pictures": len(pictures), "copies": copies},
            file=metrics_log.COPIES,
            tracked={"samples/copies": copies / len(pictures)},
            message=f"step {step}: {found}" if step and copies else "",
        )


def make_memorization(
    config: ResolvedConfig, pictures: ImageDataset, grids: SampleGrids, log: EvaluationLog
) -> Memorization | None:
    """The evaluator of a run; None where grids cannot be compared with training pictures.

    What a model draws from a training picture, as one that inpaints does, holds most of it.
    """
    if not grids.plan.prompts or grids.image_condition is not None:
        return None
    training_features = known_pictures(config, pictures)
    return Memorization(training_features, grids, log) if training_features else None
