"""Memorisation: how many pictures of each grid are near copies of those that are trained on, in copies.jsonl."""

from collections.abc import Iterator, Sequence

from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from finetune.atomic_io import json_lines, write_json_lines
from finetune.cache.image_source import LiveImages
from finetune.config import ResolvedConfig
from finetune.data.image_dataset import ImageDataset
from finetune.results import tracking
from finetune.results.memorization import TrainingFeatures, originals
from finetune.run.context import Run
from finetune.seeding import example_key, fold

MOST = 300
"""Pictures that grids are compared with: what a few seconds suffice to look at."""


def known_pictures(config: ResolvedConfig, pictures: ImageDataset) -> TrainingFeatures | None:
    """What grids are compared with, of the subject's own pictures; None where they do not tell what a near copy is."""
    trained = [index for index in pictures.trained if index < pictures.subjects]
    some = sorted(trained, key=lambda index: fold(config.seed, "compared", pictures.ids[index]))[:MOST]
    return originals(_as_trained(config, pictures, some), mirrored=pictures.flips)


def _as_trained(config: ResolvedConfig, pictures: ImageDataset, some: Sequence[int]) -> Iterator[Image.Image]:
    visits = LiveImages(pictures)
    for index in some:
        pixels, _ = visits.load(index, example_key(config.seed, pictures.ids[index], 0), flip=False)
        yield to_pil_image(pixels)


def count_copies(run: Run, drawn: Sequence[Image.Image]) -> None:
    """Record and tell how many of the pictures drawn at this step are near copies."""
    if run.originals is None:
        return
    step, path = run.trainer.steps_done, run.folder / tracking.COPIES
    record = {"step": step, "pictures": len(drawn), "copies": run.originals.copied(drawn)}
    write_json_lines(path, [*(line for line in json_lines(path) if line["step"] != step), record])
    run.events.emit("copies", **record)
    tracking.track_copies(run.accelerator, record)
    if step and record["copies"]:
        print(f"pictures at step {step}: {record['copies']} of {len(drawn)} are near copies of training pictures")
