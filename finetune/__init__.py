"""Fine-tune the UNet of Stable Diffusion, or train a pixel-space DDPM, on a folder of images.

The names below are imported when they are first used, so that `import finetune` is quick.
"""

import importlib
import importlib.metadata
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.batch import Batch
    from finetune.cache.encode import encode
    from finetune.cache.encoded_dataset import EncodedDataset, as_batch
    from finetune.config import TrainConfig, load_config
    from finetune.data.buckets import Buckets
    from finetune.data.caption_augmentation import CaptionAugmentation
    from finetune.data.datasets import HuggingFaceDataset, open_dataset
    from finetune.data.image_dataset import Example
    from finetune.data.image_folder import ImageFolder
    from finetune.data.loader import batches, training_steps
    from finetune.data.transforms import Preprocess
    from finetune.errors import DataError, FinetuneError, Interrupted, ModelError, RunError, UsageError
    from finetune.models.loading import DiffusionModel, load_model
    from finetune.models.lora import add_lora, load_lora, trainable
    from finetune.recipe import fine_tune
    from finetune.results.export import export
    from finetune.results.sampling import draw_pictures, grid
    from finetune.training.diff2flow import Diff2Flow
    from finetune.training.ema import Ema
    from finetune.training.flow_matching import FlowMatching
    from finetune.training.loss_function import LossFunction
    from finetune.training.metrics import StepMetrics
    from finetune.training.micro_batch import PreparedStep
    from finetune.training.noise_prediction import NoisePrediction
    from finetune.training.noise_sampler import NoiseSampler
    from finetune.training.objective import NoisedBatch
    from finetune.training.timestep_sampler import TimestepSampler
    from finetune.training.trainer import Trainer

_HOMES = {
    "batch": ("Batch",),
    "cache.encode": ("encode",),
    "cache.encoded_dataset": ("EncodedDataset", "as_batch"),
    "config": ("TrainConfig", "load_config"),
    "data.buckets": ("Buckets",),
    "data.caption_augmentation": ("CaptionAugmentation",),
    "data.datasets": ("HuggingFaceDataset", "open_dataset"),
    "data.image_folder": ("ImageFolder",),
    "data.loader": ("batches", "training_steps"),
    "data.image_dataset": ("Example",),
    "data.transforms": ("Preprocess",),
    "errors": ("DataError", "FinetuneError", "Interrupted", "ModelError", "RunError", "UsageError"),
    "models.loading": ("DiffusionModel", "load_model"),
    "models.lora": ("add_lora", "load_lora", "trainable"),
    "recipe": ("fine_tune",),
    "results.export": ("export",),
    "results.sampling": ("draw_pictures", "grid"),
    "training.ema": ("Ema",),
    "training.diff2flow": ("Diff2Flow",),
    "training.flow_matching": ("FlowMatching",),
    "training.loss_function": ("LossFunction",),
    "training.noise_prediction": ("NoisePrediction",),
    "training.noise_sampler": ("NoiseSampler",),
    "training.timestep_sampler": ("TimestepSampler",),
    "training.objective": ("NoisedBatch",),
    "training.metrics": ("StepMetrics",),
    "training.micro_batch": ("PreparedStep",),
    "training.trainer": ("Trainer",),
}
_RENAMED = {
    "CaptionVisits": "CaptionAugmentation",
    "Encoded": "EncodedDataset",
    "Noised": "NoisedBatch",
    "Prepared": "PreparedStep",
}
"""Names of version 0.1 -> names of today."""
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Batch",
    "Buckets",
    "CaptionAugmentation",
    "DataError",
    "Diff2Flow",
    "DiffusionModel",
    "Ema",
    "EncodedDataset",
    "Example",
    "FinetuneError",
    "FlowMatching",
    "HuggingFaceDataset",
    "ImageFolder",
    "Interrupted",
    "LossFunction",
    "ModelError",
    "NoisePrediction",
    "NoiseSampler",
    "NoisedBatch",
    "PreparedStep",
    "Preprocess",
    "RunError",
    "StepMetrics",
    "TimestepSampler",
    "TrainConfig",
    "Trainer",
    "UsageError",
    "add_lora",
    "as_batch",
    "batches",
    "draw_pictures",
    "encode",
    "export",
    "fine_tune",
    "grid",
    "load_config",
    "load_lora",
    "load_model",
    "open_dataset",
    "trainable",
    "training_steps",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("finetune-unet")
    if name in _RENAMED:
        warnings.warn(f"finetune.{name} is now finetune.{_RENAMED[name]}", DeprecationWarning, stacklevel=2)
        name = _RENAMED[name]
    if name not in _HOME_OF:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    return getattr(importlib.import_module(f"finetune.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
