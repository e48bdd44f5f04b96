"""What a run has learned, taken from its folder, and written in the forms that the run was asked for."""

import logging
from pathlib import Path
from typing import Literal

import torch

from finetune.atomic_io import flush_to_disk, flush_tree, move_over, remove
from finetune.config import ResolvedConfig
from finetune.errors import ModelError, RunError, UsageError
from finetune.evaluators.early_stopping import best_of_ended
from finetune.models.loading import DiffusionModel
from finetune.models.lora import Adapter
from finetune.models.model_info import locate
from finetune.models.single_file import Checkpoint, inspect
from finetune.results.export import EXPORTS, kohya_file
from finetune.results.export_formats import has_yaml, write_format
from finetune.run.build import load_base
from finetune.training import checkpoint

FILES = ("exports/*.safetensors", "exports/*.yaml", "exports/diffusers", "exports/unet")
"""Patterns of what is written into a run folder here."""

_log = logging.getLogger(__name__)


def load_trained(
    config: ResolvedConfig, folder: Path, step: int | None = None, *, ema: bool = True
) -> tuple[DiffusionModel, dict[str, str]]:
    """The model with the weights of a checkpoint, in fp32, and what the run's own LoRA file says of itself.

    Args:
        config: of the run.
        folder: of the run.
        step: of the checkpoint; None: the newest, or what the run has exported, where that is an earlier step.
        ema: take the averaged weights, where there are any.

    Raises:
        UsageError: there is no such checkpoint.
        RunError: it holds something else than the config says.
    """
    there = dict(checkpoint.checkpoints(folder))
    newest, step = step is None, step if step is not None else max(there, default=None)
    if step not in there:
        existing = ", ".join(map(str, there)) or "none"
        raise UsageError(f"--run {folder}: no checkpoint{'' if step is None else f' {step}'}; there are: {existing}")
    best = best_of_ended(folder) if newest and ema else None
    state = checkpoint.load(there[step]) if best is None else {"ema": best}
    model = load_base(config, locate(config.model), torch.float32)
    weights = state["ema"] if ema and state["ema"] else state["weights"]
    learned = {name: p for name, p in model.unet.named_parameters() if p.requires_grad}
    if weights.keys() != learned.keys():
        raise RunError(f"{there[step]} holds other parameters than its config.toml says")
    with torch.no_grad():
        for name, parameter in learned.items():
            parameter.copy_(weights[name])
    recorded = kohya_file(folder, None if step == config.max_train_steps or best is not None else step)
    return model, Adapter.read_metadata(recorded) if recorded.is_file() else {}


def write_verified(
    model: DiffusionModel,
    to: Path,
    form: Literal["kohya", "peft", "diffusers", "single-file", "unet"],
    precision: Literal["fp32", "fp16", "bf16"],
    metadata: dict[str, str],
    base: Checkpoint | None = None,
) -> None:
    """Write the model in one form, prove it, and only then put it where it belongs.

    It is written in a hidden folder of its own, so a crash leaves nothing at `to`. What does not load back to the same
    model is kept as `<name>.rejected`.
    """
    config_file = to.with_suffix(".yaml")
    if form == "single-file" and has_yaml(model) and config_file.exists():
        raise UsageError(f"{config_file} exists already, and is to say what the checkpoint predicts; give another name")
    scratch = to.with_name(f".{to.name}.export.part")
    remove(scratch)
    scratch.mkdir()
    try:
        difference = write_format(model, scratch / to.name, form, precision=precision, metadata=metadata, base=base)
    except (RunError, ModelError):
        if (scratch / to.name).exists():
            move_over(scratch / to.name, to.with_name(f"{to.name}.rejected"))
        raise
    else:
        flush_tree(scratch)
        for entry in sorted(scratch.iterdir(), key=lambda path: path.name == to.name):  # what lies beside it first
            move_over(entry, to.with_name(entry.name))
        flush_to_disk(to.parent)
    finally:
        remove(scratch)
    _log.info(f"{to}: loaded back and compared (largest difference {difference:.0e})")


def left_out(config: ResolvedConfig, to: Path) -> list[str]:
    """Keys that the run's base, where it is a checkpoint in one file, has more than the one that was written."""
    base = locate(config.model).checkpoint
    return [] if base is None else sorted(base.shapes.keys() - inspect(to).shapes.keys())


def write_exports(config: ResolvedConfig, folder: Path) -> None:
    """Write the forms of `export_formats` that are missing in `exports/` of the folder of an ended run."""
    for left_over in (folder / EXPORTS).glob(".*"):  # of a process that was killed
        remove(left_over)
    for form in config.export_formats:
        to = _place(folder, form)
        if to.exists():
            continue
        to.parent.mkdir(exist_ok=True)
        remove(to.with_suffix(".yaml"))  # of an export that was cut off
        model, metadata = load_trained(config, folder)  # for each: a LoRA is merged for good
        write_verified(model, to, form, precision=config.export_precision, metadata=metadata)


def discard_exports(config: ResolvedConfig, folder: Path) -> None:
    """Delete the forms in `exports/` that a shorter run has left, before its continuation is marked as ended."""
    for form in config.export_formats:
        remove(_place(folder, form))


def _place(folder: Path, form: str) -> Path:
    return folder / EXPORTS / (f"{folder.resolve().name}.safetensors" if form == "single-file" else form)
