"""finetune-unet plan: what training with the same options would do, take and decide, before it is started."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from finetune.config import ResolvedConfig, TrainConfig, as_dict, load_resolved
from finetune.data.source import check_sources
from finetune.errors import UsageError

if TYPE_CHECKING:
    from finetune.data.volumes import Volumes

WITH_TRAINING_OPTIONS = True

_FIRST_STEPS = 3
"""Of a run, slower than the others."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Tell what training with the same options would do: nothing is loaded, encoded or written."""

    runs: str = "runs"
    """Folder of earlier runs, by which the time is estimated."""


def run(options: Options, config: TrainConfig) -> None:
    """Print what would be trained on, what it would take, and every option that is left open, as it would be decided.

    Raises:
        FinetuneError: as training would.
    """

    import torch

    from finetune.models.loading import check_resolution
    from finetune.models.locate import locate
    from finetune.run.memory import check_memory
    from finetune.run.resolve import resolve_for, with_absolute_paths
    from finetune.run.sources import open_pictures

    config = with_absolute_paths(config)
    check_sources(config.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = locate(config.model)
    check_resolution(found, config.resolution or found.resolution)
    volumes = open_pictures(config, found, None)
    resolved = resolve_for(config, found, volumes, device)
    rows = {
        "model": f"{resolved.model}, {resolved.method}",
        **_pictures(volumes),
        "steps": f"{resolved.max_train_steps} of {resolved.global_batch}, learning rate {resolved.learning_rate:g}",
        "memory": check_memory(resolved, found, device),
        "time": _time(Path(options.runs), resolved),
        "check": _check(resolved, volumes),
        "disk": f"{_free_bytes(Path(config.output_dir or '.')) / 1e9:.0f} GB free",
    }
    open_ones = {name: value for name, value in as_dict(resolved).items() if name not in config.given}
    useless = "lora_" if resolved.method == "full" else " "
    decided = {
        name: value
        for name, value in open_ones.items()
        if name in ResolvedConfig.__annotations__ and not name.startswith(useless)
    }
    rows["decided"] = ", ".join(f"{name} {_said(value)}" for name, value in decided.items())
    for name, text in rows.items():
        if text:
            print(f"{name:>11}  {text}")
    for line in volumes.first.notes():
        print(f"{'note':>11}  {line}")


def _check(config: ResolvedConfig, volumes: "Volumes") -> str:
    """What it costs to compare half precision with fp32."""
    from finetune.training.half_precision import check_share
    from finetune.wording import counted

    if config.mixed_precision == "no":
        return ""
    sizes = len(set(volumes.first.shapes()))
    share = check_share(sizes=sizes, steps=config.max_train_steps, batch_size=config.global_batch)
    where = f"on {counted(sizes, 'size')} before its first step"
    return f"each layer in {config.mixed_precision} against fp32, {where}: about {100 * share:.1g} % of the run"


def _free_bytes(folder: Path) -> int:
    """On the disk where a folder is, or would be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def _pictures(volumes: "Volumes") -> dict[str, str]:
    from finetune.run.summary import sizes, volumes_row

    pictures = volumes.first
    told = pictures.ledger()
    several = {"volumes": f"{sum(volumes.counts)} pictures in {volumes_row(volumes)}"} if len(volumes) > 1 else {}
    return several | {
        "pictures": f"{told.trained} to train on, {told.held_out} held out, {told.quarantined} quarantined, "
        f"{told.captions} caption files; {sizes(pictures)}",
        "captions": ", ".join(f"{count} from {source}" for source, count in pictures.sources.items()),
    }


def _time(runs: Path, config: ResolvedConfig) -> str:
    """By the speed of the newest run of the same model, method, size and batch; its first steps do not count."""
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
            minutes = median(took) * config.max_train_steps / 60
            return f"about {minutes:.3g} minutes of steps, as fast as {folder.parent}"
    return f"not known: no run like this one in {runs} yet"


def _said(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
