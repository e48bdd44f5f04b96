"""Class images: the model draws those that are missing.

Ruiz et al. 2022, "DreamBooth", section 3.2: the model's own pictures of "a dog" beside those of one dog.
"""

import logging
from pathlib import Path

import torch

from finetune.config import TrainConfig
from finetune.data.listing import is_picture, list_files
from finetune.errors import UsageError
from finetune.models.loading import load_model
from finetune.models.model_info import ModelInfo
from finetune.results.sampling import draw_pictures, save_picture
from finetune.run.resolve_config import frozen_options
from finetune.text import pluralize
from finetune.training.backend import DTYPES, resolve_precision

_log = logging.getLogger(__name__)

DRAWN = 100
"""Pictures that are drawn where there are none, as in diffusers' script."""

_STEPS = 50
_AT_ONCE = 4


def draw_missing(config: TrainConfig, model_info: ModelInfo, device: torch.device) -> None:
    """Let the model, untrained, draw the class pictures that are wanted and not there.

    Raises:
        UsageError: it has to, and there is no `class_prompt`.
    """
    if config.class_data is None or not model_info.family.latent:  # which cannot use it, as will be told
        return
    folder = Path(config.class_data).expanduser()
    there = sum(map(is_picture, list_files(folder))) if folder.is_dir() else 0
    number = config.num_class_images or (there or DRAWN)
    if there >= number:
        return
    if not config.class_prompt:
        found_there = f"{there} of {pluralize(number, 'image')}"
        raise UsageError(f"class_data {folder}: {found_there}; give --class_prompt, and the model draws the others")
    if (checkpoint := model_info.checkpoint) and not checkpoint.prediction_stated and not config.prediction_type:
        raise UsageError(
            f"class_data {folder}: the model is to draw images, and {checkpoint.path.name} does not say what it "
            "predicts; give --prediction_type"
        )
    folder.mkdir(parents=True, exist_ok=True)
    drawn = f"{number - there} of {config.class_prompt!r}, drawn by {config.model}"
    _log.info("class images: %s to %s", drawn, folder)
    half = DTYPES[
        resolve_precision(config.mixed_precision, device, small=model_info.family.is_small(model_info.resolution))
    ]
    model = load_model(
        model_info,
        dtype=half or torch.float32,
        # What the base is, not what it is trained to become.
        prediction_type=config.prediction_type if _is_what_it_says(config, model_info) else None,
        flow_shift=config.flow_shift if config.prediction_type == "flow" else None,
        **frozen_options(config),
    ).to(device)
    names = (folder / f"drawn-{seed:05d}.png" for seed in range(2 * number))
    missing = [path for path in names if not path.exists()][: number - there]
    for start in range(0, len(missing), _AT_ONCE):
        some = missing[start : start + _AT_ONCE]
        (row,) = draw_pictures(
            model,
            [config.class_prompt],
            [int(path.stem.removeprefix("drawn-")) for path in some],
            resolution=config.resolution or model_info.resolution,
            num_inference_steps=config.num_inference_steps or _STEPS,
            guidance_scale=model_info.family.guidance_scale,
            batch_size=_AT_ONCE,
        )
        for path, picture in zip(some, row, strict=True):
            save_picture(picture, path)


def _is_what_it_says(config: TrainConfig, model_info: ModelInfo) -> bool:
    """Whether the option names what the base predicts already: a flow model, or a checkpoint that does not say it."""
    unmarked = model_info.checkpoint is not None and not model_info.checkpoint.prediction_stated
    return config.prediction_type == "flow" or unmarked
