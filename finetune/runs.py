"""Run folders: which one a command means, whether it may be written, and whether it is finished."""

import itertools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config import TrainConfig, as_dict, config_text, load_config, replace
from finetune.errors import UsageError
from finetune.files import is_inside, remove, write_whole
from finetune.models.locate import LORA_FILE
from finetune.training.checkpoint import checkpoints, latest

_FREE = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "report_to", "dataloader_num_workers")
_FREE += ("push_to_hub", "hub_model_id", "hub_private_repo")
"""Options that do not make it another run."""
_FREE_ON_RESUME = ("sample_prompts", "sample_every", "save_image_epochs", "eval_batch_size", "num_inference_steps")
_FREE_ON_RESUME += ("guidance_scale", "checkpointing_steps", "save_model_epochs", "checkpoints_total_limit")
_LENGTH = ("max_train_steps", "num_train_epochs")
"""Options that an explicit resume may change as well; the length only under a constant learning rate."""

_LEFT_BY_A_RUN = ("metrics.jsonl", "timings.jsonl", "result.json", "samples/step-*.png")
_LEFT_BY_A_RUN += ("samples/before-after.png", ".checkpoint-*.part", LORA_FILE)
_TRACKED = ("logs/**/events.out.tfevents.*", "logs/**/hparams.yml")
_PARTS = ("model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler")
"""What a finished full run leaves as well."""


@dataclass(frozen=True)
class RunFolder:
    """Where a run lives and where it goes on."""

    path: Path
    checkpoint: Path | None = None
    """Resume from here; None: start from the beginning."""
    finished: bool = False
    note: str = ""
    """One line for the user about what was found; may be empty."""
    overwrite: bool = False
    """An earlier run is to be deleted when this one starts."""


def earlier_config(config: TrainConfig) -> TrainConfig | None:
    """The config of the run that `--resume_from_checkpoint` means; None without that option or without such a run."""
    if config.resume_from_checkpoint is None:
        return None
    recorded = _resume_folder(config) / "config.toml"
    return load_config(recorded) if recorded.exists() else None


def inherit(config: TrainConfig, earlier: TrainConfig) -> TrainConfig:
    """A resumed run takes what the user did not give from the earlier part of the run, but for its length."""
    kept = {*config.given, *_FREE, *(_LENGTH if config.given & set(_LENGTH) else ())}
    return replace(config, **{name: value for name, value in as_dict(earlier).items() if name not in kept})


def choose(config: TrainConfig, data: str) -> RunFolder:
    """The folder of this run.

    Args:
        config: resolved.
        data: digest of the pictures' names and captions.

    Raises:
        UsageError: the named folder holds another run, or lies among the pictures, or what is to be resumed differs.
    """
    folder = _choose(config, data)
    starts = folder.checkpoint is None and not folder.finished
    if starts and config.data and is_inside(folder.path, Path(config.data)):
        raise UsageError(
            f"output_dir {folder.path} lies inside --data {config.data}: its pictures would be trained on next time; "
            "give an --output_dir elsewhere"
        )
    return folder


def _choose(config: TrainConfig, data: str) -> RunFolder:
    if config.resume_from_checkpoint is not None:
        if config.overwrite_output_dir:
            raise UsageError("overwrite_output_dir and resume_from_checkpoint exclude each other")
        return _resumed(config, data)
    base = Path(config.output_dir) if config.output_dir is not None else default_folder(config)
    if config.overwrite_output_dir and _is_run(base):
        return RunFolder(base, overwrite=True)
    if found := _state(base, config, data):
        return found
    if config.output_dir is not None:
        raise UsageError(
            f"output_dir {base} holds another run or model: give another --output_dir, "
            "--overwrite_output_dir to delete that run, or --resume_from_checkpoint latest to go on with it"
        )
    numbered = (base.with_name(f"{base.name}-{number}") for number in itertools.count(2))
    return next(found for path in numbered if (found := _state(path, config, data)))


def default_folder(config: TrainConfig) -> Path:
    """runs/<data>-<model>, relative to the working directory."""
    data = Path(config.data).name or "dataset"
    return Path("runs") / f"{data}-{Path(config.model).name}"


def prepare(folder: RunFolder) -> None:
    """Make the folder and show that it can be written, before anything heavy is loaded.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        (folder.path / "samples").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.path):
            pass
    except OSError as error:
        raise UsageError(f"output_dir {folder.path} cannot be written: {error.strerror}") from error


def begin(folder: RunFolder, config: TrainConfig, data: str) -> None:
    """All is loaded and training starts: delete what it replaces, and record the config and the data's digest."""
    cut_off = folder.checkpoint is None and (folder.path / "data.json").exists()  # an earlier start, no checkpoint yet
    if folder.overwrite or cut_off:
        _clear(folder.path)
    (folder.path / "result.json").unlink(missing_ok=True)
    recorded = replace(config, overwrite_output_dir=False, resume_from_checkpoint=None)
    write_whole(folder.path / "config.toml", config_text(recorded))
    write_whole(folder.path / "data.json", json.dumps({"digest": data}) + "\n")


def finish(folder: Path, result: dict[str, Any]) -> None:
    """Mark the run as finished: `result.json`, written last."""
    write_whole(folder / "result.json", json.dumps(result, indent=1) + "\n")


def _is_run(path: Path) -> bool:
    """True where a run of ours has trained at least a step, or has ended."""
    return (path / "config.toml").exists() and (path / "data.json").exists() and _has_trained(path)


def _holds_a_model(path: Path) -> bool:
    return any((path / name).exists() for name in ("result.json", LORA_FILE, *_PARTS))


def _has_trained(path: Path) -> bool:
    return (path / "metrics.jsonl").exists() or (path / "result.json").exists() or latest(path) is not None


def _state(path: Path, config: TrainConfig, data: str) -> RunFolder | None:
    """The folder as a place for this config: fresh, unfinished or finished; None where something else is in it."""
    if not _is_run(path):
        foreign = (path / "config.toml").exists() and not (path / "data.json").exists()
        taken = foreign or _holds_a_model(path) or _has_trained(path)
        return None if taken else RunFolder(path)
    if differences(load_config(path / "config.toml"), config, _FREE) or _digest(path) != data:
        return None
    if (path / "result.json").exists():
        return RunFolder(path, finished=True, note=f"{path}: this run is finished; change an option to start another")
    checkpoint = latest(path)
    note = f"resuming {checkpoint}" if checkpoint else f"{path}: no checkpoint yet, starting from the beginning"
    return RunFolder(path, checkpoint, note=note)


def _digest(path: Path) -> str | None:
    """The digest of the pictures that a run trains on; None where its record is damaged."""
    try:
        return json.loads((path / "data.json").read_text(encoding="utf-8"))["digest"]
    except (ValueError, KeyError, TypeError):
        return None


def _resumed(config: TrainConfig, data: str) -> RunFolder:
    path = _resume_folder(config)
    named = config.resume_from_checkpoint != "latest"
    checkpoint = Path(str(config.resume_from_checkpoint)) if named else latest(path)
    if checkpoint is None and _holds_a_model(path):
        raise UsageError(f"resume_from_checkpoint latest: {path} holds a finished run or a model, but no checkpoint")
    if checkpoint is None:
        return RunFolder(path, note=f"{path}: no checkpoint found, starting from the beginning")
    if not (checkpoint / "state.json").is_file() or not _is_run(path):
        raise UsageError(f"resume_from_checkpoint {checkpoint}: no checkpoint of a run in {path}")
    earlier = load_config(path / "config.toml")
    free = _FREE + _FREE_ON_RESUME + (_LENGTH if config.lr_scheduler == "constant" else ())
    changed = differences(earlier, config, free)
    if _digest(path) != data:
        changed.append("the pictures or their captions")
    if changed:
        raise UsageError(f"{checkpoint} belongs to a run with other options: {'; '.join(changed)}")
    done = int(checkpoint.name.rpartition("-")[2]) if checkpoint.name.rpartition("-")[2].isdigit() else 0
    if (config.max_train_steps or 0) < done:
        raise UsageError(f"max_train_steps = {config.max_train_steps}: {checkpoint} has done {done} already")
    if not named and earlier.max_train_steps == config.max_train_steps and (path / "result.json").exists():
        note = f"{path}: this run is finished; give more --max_train_steps to go on"
        return RunFolder(path, finished=True, note=note)
    return RunFolder(path, checkpoint, note=f"resuming {checkpoint}")


def _resume_folder(config: TrainConfig) -> Path:
    """The run folder that `--resume_from_checkpoint` means."""
    if config.output_dir is not None:
        return Path(config.output_dir)
    if config.resume_from_checkpoint != "latest":
        return Path(str(config.resume_from_checkpoint)).absolute().parent
    base = default_folder(config)
    numbered = [p for p in base.parent.glob(f"{base.name}-*") if p.name.removeprefix(f"{base.name}-").isdigit()]
    return max(numbered, key=lambda p: int(p.name.rsplit("-", 1)[1]), default=base)


def differences(a: TrainConfig, b: TrainConfig, free: tuple[str, ...]) -> list[str]:
    """ "option: old -> new" for each option that differs, `free` ones left out."""
    mine, theirs = as_dict(a), as_dict(b)
    return [f"{n}: {mine[n]} -> {theirs[n]}" for n in mine if n not in free and mine[n] != theirs[n]]


def _clear(path: Path) -> None:
    """Delete what a run writes, by name, and leave all else; last what tells it from a stranger's folder."""
    exported = _PARTS if (path / "model_index.json").exists() else ()
    for pattern in (*_LEFT_BY_A_RUN, *exported, *_TRACKED):
        for entry in path.glob(pattern):
            remove(entry)
    for _, checkpoint in checkpoints(path):
        remove(checkpoint)
    (path / "config.toml").unlink(missing_ok=True)
