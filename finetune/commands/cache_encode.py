"""finetune-unet cache encode: encode what training with the same options needs, without training."""

from dataclasses import dataclass

from finetune.config import TrainConfig
from finetune.data.data_source import check_sources
from finetune.errors import UsageError

WITH_TRAINING_OPTIONS = True


@dataclass(frozen=True, kw_only=True)
class Options:
    """Encode everything that training with the same options needs. It takes the options of training."""


def run(options: Options, config: TrainConfig) -> None:
    """Encode every picture and caption that the options name, and print how many were new.

    Raises:
        UsageError: the options ask for encodings that are not kept.
        FinetuneError: as training with them does.
    """
    import torch

    from finetune.cache.encode import encode
    from finetune.models.loading import check_resolution, load_frozen
    from finetune.models.model_info import locate
    from finetune.run.build_dataset import open_pictures
    from finetune.run.resolve_config import frozen_options, with_absolute_paths
    from finetune.run.summary import encodings
    from finetune.training.backend import gpu_algorithms

    if config.live_encoding or config.cache_dir == "none":
        why = "live_encoding" if config.live_encoding else "cache_dir none"
        raise UsageError(f"{why} cannot be used here: nothing would be kept")
    check_sources(config.data)
    config = with_absolute_paths(config)
    model_info = locate(config.model)
    check_resolution(model_info, config.resolution or model_info.resolution)
    chunks = open_pictures(config, model_info, None)
    frozen = load_frozen(model_info, **frozen_options(config))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for number in range(len(chunks)):
        pictures = chunks.at(number)
        frozen.encoder.to(device)
        frozen.conditioner.to(device)
        with gpu_algorithms(deterministic=config.deterministic, tuned=False):  # as training does
            encoded = encode(
                pictures,
                frozen,
                seed=config.seed,
                cache_dir=config.cache_dir,
                precision=config.cache_precision,
                any_environment=config.cache_any_environment,
            )
        summary = encodings(encoded, config.cache_dir)
        print(summary if len(chunks) == 1 else f"{summary} (volume {number + 1} of {len(chunks)})", flush=True)
        for line in pictures.notes():
            print(f"note: {line}")
