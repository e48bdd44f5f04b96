"""What a checkpoint without a mark predicts: measured on the first images of the run, and remembered."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from statistics import mean

import torch
from diffusers import DDPMScheduler

from finetune import seeding
from finetune.atomic_io import write_whole
from finetune.cache.encode import encode
from finetune.cache.folder import cache_folder
from finetune.config import TrainConfig, replace
from finetune.data.image_dataset import ImageDataset
from finetune.data.image_index import FileStamp
from finetune.errors import UsageError
from finetune.log_handlers import labelled
from finetune.models.loading import load_model
from finetune.models.model_info import ModelInfo
from finetune.run.resolve_config import frozen_options
from finetune.training.backend import DTYPES, resolve_precision
from finetune.training.prediction_type import clear_prediction_type, prediction_errors

_log = logging.getLogger(__name__)

_IMAGES = 3
_FILE = "predictions.json"
"""In the cache folder: path, size and time of a checkpoint, and its VAE -> its errors."""


def with_measured_prediction(
    config: TrainConfig, model_info: ModelInfo, pictures: ImageDataset, device: torch.device
) -> TrainConfig:
    """The config with the prediction type of a checkpoint that does not say what it predicts; any other as it is.

    Raises:
        UsageError: the errors of two prediction types are near each other, so that the user has to say which it is.
    """
    checkpoint = model_info.checkpoint
    if checkpoint is None or checkpoint.prediction_stated or config.prediction_type is not None:
        return config
    folder = cache_folder(config.cache_dir)
    memory = folder / _FILE if folder else None
    vae = (config.vae, config.vae_scale, config.vae_shift, config.vae_reflection_padding)
    key = json.dumps([str(checkpoint.path), *FileStamp.read(checkpoint.path), *vae])
    remembered = _read(memory)
    errors = remembered.get(key)
    if errors is None:
        errors = _measured(config, model_info, pictures, device)
        if memory is not None:
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_whole(memory, json.dumps({**remembered, key: errors}, indent=1))
    figures = ", ".join(f"{name} {error:.2f}" for name, error in sorted(errors.items(), key=lambda item: item[1]))
    prediction_type = clear_prediction_type(errors)
    if prediction_type is None:
        raise UsageError(
            f"{checkpoint.path.name} does not say what it predicts, and its errors do not tell it ({figures}): "
            "give --prediction_type"
        )
    says = f"{prediction_type}, by the errors of a checkpoint that does not say it ({figures})"
    _log.info(says, extra=labelled("Predicts"))
    return replace(config, prediction_type=prediction_type)


def _read(memory: Path | None) -> dict[str, Mapping[str, float]]:
    try:
        return json.loads(memory.read_text(encoding="utf-8")) if memory else {}
    except (OSError, ValueError):  # there is none yet, or not a whole one: it is measured again
        return {}


def _measured(
    config: TrainConfig, model_info: ModelInfo, pictures: ImageDataset, device: torch.device
) -> dict[str, float]:
    """The mean errors on the first images, with noise of a seed of its own."""
    small = model_info.family.is_small(config.resolution or model_info.resolution)
    half = DTYPES[resolve_precision(config.mixed_precision, device, small=small)]
    model = load_model(
        model_info,
        dtype=half or torch.float32,
        **frozen_options(config),
    ).to(device)
    scheduler = model.scheduler
    assert isinstance(scheduler, DDPMScheduler)
    model.unet.eval()
    indices = pictures.trained[:_IMAGES]
    keys = [seeding.example_key(0, f"prediction: {pictures.ids[index]}", 0) for index in indices]
    encoded = encode(
        pictures,
        model,
        cache_dir=config.cache_dir,
        precision=config.cache_precision,
        any_environment=config.cache_any_environment,
        visited=list(zip(indices, keys, strict=True)),
        seed=config.seed,
    )
    errors = []
    for index, key in zip(indices, keys, strict=True):
        encoded.ensure_encoded([(index, key)])
        row = torch.tensor([key])
        batch = encoded.collate([index], row, [encoded.visits.load(index, key)]).to(device)
        x0 = model.encoder.sample(batch.latent_params, batch.keys)
        noise = seeding.normal(row, "noise", x0.shape[1:]).to(device)
        errors.append(prediction_errors(model.unet, x0, noise, batch.cond, batch.unet_channels, scheduler=scheduler))
    encoded.close()
    return {name: mean(each[name] for each in errors) for name in errors[0]}
