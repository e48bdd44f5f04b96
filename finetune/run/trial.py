"""A few steps of a run that are timed and thrown away."""

import time
from contextlib import closing

import torch

from finetune.config import ResolvedConfig, replace
from finetune.data.chunks import Chunks
from finetune.models.model_info import ModelInfo
from finetune.run.backend import gpu_algorithms
from finetune.run.build import assembled
from finetune.run.train_loader import TrainDataLoader


def seconds_per_step(
    config: ResolvedConfig, model_info: ModelInfo, chunks: Chunks, device: torch.device, *, steps: int = 2
) -> float:
    """Train `steps` steps after a first one that warms up, and return the mean seconds of each.

    A run of fewer steps is tried to its end; of one step, that step is timed. Blocks are not compiled, which would take
    minutes for a tenth of a step. The pictures of these steps are encoded into the cache, where the run finds them.
    Nothing else is written.

    Raises:
        FinetuneError: as training would.
        torch.OutOfMemoryError, RuntimeError: memory does not suffice for one example.
    """
    config, total = replace(config, compile=False), min(1 + steps, config.max_train_steps)
    with gpu_algorithms(deterministic=config.deterministic, tuned=False):
        steps_there = chunks.local_steps(0, range(total), config.global_batch)
        model, encoded, trainer = assembled(config, model_info, chunks.first, device, steps=steps_there)
        with closing(
            TrainDataLoader(config=config, model=model, chunks=chunks, first=encoded, trainer=trainer)
        ) as train_loader:
            clock = time.perf_counter()
            for number, batches in zip(range(total), train_loader.steps(0), strict=False):
                trainer.step(*batches).as_dict()  # waits for the device
                if number == 0 and total > 1:
                    clock = time.perf_counter()
            seconds = time.perf_counter() - clock  # closing writes encodings
    return seconds / max(1, total - 1)
