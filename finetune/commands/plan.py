"""finetune-unet plan: show what training with the same options would do and need."""

import json
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from finetune.config import ResolvedConfig, TrainConfig, as_dict, load_resolved, replace
from finetune.data.data_source import check_sources
from finetune.errors import UsageError
from finetune.log_handlers import row
from finetune.option_info import NOT_NEGATIVE, POSITIVE, option
from finetune.text import duration, pluralize

if TYPE_CHECKING:
    import torch

    from finetune.data.chunks import Chunks
    from finetune.models.model_info import ModelInfo

WITH_TRAINING_OPTIONS = True

_FIRST_STEPS = 3
"""Of a run, slower than the others."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Show what training with the same options would do, need and write. Only encodings of the timed steps are
    written."""

    runs: str = "runs"
    """Folder of earlier runs, from which the time is estimated."""
    timed_steps: int = option(2, NOT_NEGATIVE)
    """Train and time this many steps if no earlier run is similar; 0: none."""
    memory: float | None = option(None, POSITIVE)
    """Plan for another GPU, with this many GB of memory (2020 or later)."""


def run(options: Options, config: TrainConfig) -> None:
    """Print what would be trained on, what it would take, and every option that is left open, as it would be decided.

    Raises:
        FinetuneError: as training would.
    """

    import torch

    from finetune.models.loading import check_resolution
    from finetune.models.model_info import locate
    from finetune.run.build_dataset import open_pictures
    from finetune.run.resolve_config import resolve_for, with_absolute_paths
    from finetune.run.resource_estimate import check_memory, disk_line, disk_use

    config = with_absolute_paths(config)
    check_sources(config.data)
    absent = None if options.memory is None else 1e9 * options.memory
    device = torch.device("cuda" if torch.cuda.is_available() or absent else "cpu")
    model_info = locate(config.model)
    check_resolution(model_info, config.resolution or model_info.resolution)
    chunks = open_pictures(config, model_info, None)
    resolved = resolve_for(config, model_info, chunks, device)
    rows = {
        "Model": f"{resolved.model}, {resolved.method}",
        **_pictures(chunks),
        "Steps": f"{resolved.max_train_steps} of batch size {resolved.global_batch}, "
        f"learning rate {resolved.learning_rate:g}",
        "Memory": check_memory(resolved, model_info, device, absent),
        "Check": _check(resolved, chunks),
        "Disk": disk_line(resolved, disk_use(resolved, model_info, chunks), Path(config.output_dir or ".")),
    }
    open_ones = {name: value for name, value in as_dict(resolved).items() if name not in config.given}
    useless = "lora_" if resolved.method == "full" else " "
    decided = {
        name: value
        for name, value in open_ones.items()
        if name in ResolvedConfig.__annotations__ and not name.startswith(useless)
    }
    rows["Decided"] = ", ".join(f"{name} {_formatted(value)}" for name, value in decided.items())
    for name, text in rows.items():
        if text:
            print(row(name, text))
    for line in chunks.first.notes():
        print(row("note", line))
    time = _time_of_earlier(Path(options.runs), resolved)
    if not time:
        steps = 0 if absent else options.timed_steps
        time = (
            _time_of_trial(resolved, model_info, chunks, device, steps) if steps else "not known: no run like this one"
        )
    print(row("Time", time), flush=True)


def _check(config: ResolvedConfig, chunks: "Chunks") -> str:
    """What it costs to compare half precision with fp32."""
    from finetune.training.half_precision import check_share

    if config.mixed_precision == "no":
        return ""
    sizes = len(set(chunks.first.shapes()))
    share = check_share(sizes=sizes, steps=config.max_train_steps, batch_size=config.global_batch)
    where = f"on {pluralize(sizes, 'size')} before its first step"
    return f"each layer in {config.mixed_precision} against fp32, {where}: about {100 * share:.1g} % of the run"


def _pictures(chunks: "Chunks") -> dict[str, str]:
    from finetune.run.summary import chunks_row, sizes

    pictures = chunks.first
    ledger = pictures.ledger()
    several = {"Volumes": f"{sum(chunks.counts)} images in {chunks_row(chunks)}"} if len(chunks) > 1 else {}
    return several | {
        "Images": f"{ledger.trained} to train on, {ledger.held_out} held out, {ledger.quarantined} quarantined, "
        f"{ledger.captions} caption files; {sizes(pictures)}",
        "Captions": ", ".join(f"{count} from {source}" for source, count in pictures.sources.items()),
    }


def _time_of_earlier(runs: Path, config: ResolvedConfig) -> str:
    """By the speed of the newest run of the same model, method, size and batch, its first steps left out; "": none."""
    like = ("model", "method", "resolution", "global_batch", "mixed_precision", "gradient_checkpointing")
    like += ("full_bf16", "fused_backward_pass")
    for folder in sorted(runs.glob("*/config.toml"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            earlier = load_resolved(folder)
            lines = (folder.parent / "timings.jsonl").read_text(encoding="utf-8").splitlines()
            records = [json.loads(line) for line in lines]
        except (UsageError, OSError, ValueError):  # half deleted, or written to meanwhile
            continue
        took = [record["seconds"] for record in records if "seconds" in record][_FIRST_STEPS:]
        if took and all(getattr(earlier, name) == getattr(config, name) for name in like):
            return f"about {duration(median(took) * config.max_train_steps)} of steps, at the speed of {folder.parent}"
    return ""


def _time_of_trial(
    config: ResolvedConfig, model_info: "ModelInfo", chunks: "Chunks", device: "torch.device", steps: int
) -> str:
    """Estimate the time from a few steps that are trained and thrown away."""
    from finetune.out_of_memory import means_out_of_memory
    from finetune.run.resource_estimate import out_of_memory

    try:
        seconds = _seconds_per_step(config, model_info, chunks, device, steps=steps)
    except (RuntimeError, MemoryError) as error:
        if not means_out_of_memory(error):
            raise
        return f"not known: {out_of_memory(config, model_info, device)}"
    tried = pluralize(max(1, min(steps, config.max_train_steps - 1)), "step")
    return f"about {duration(seconds * config.max_train_steps)} of steps, at the speed of {tried} tried here"


def _formatted(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _seconds_per_step(
    config: ResolvedConfig, model_info: "ModelInfo", chunks: "Chunks", device: "torch.device", *, steps: int
) -> float:
    """Train `steps` steps after a first one that warms up, and return the mean seconds of each.

    A run of fewer steps is tried to its end; of one step, that step is timed. Blocks are not compiled, which would take
    minutes for a tenth of a step. The pictures of these steps are encoded into the cache, where the run finds them.
    Nothing else is written.

    Raises:
        FinetuneError: as training would.
        torch.OutOfMemoryError, RuntimeError: memory does not suffice for one example.
    """

    from finetune.run.build import assembled
    from finetune.run.train_loader import TrainDataLoader
    from finetune.training.backend import gpu_algorithms

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
