"""Import from train.json of EveryDream2, with the optimizer file that it names."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from finetune.commands.foreign.imported_config import ImportedConfig, Renamed, without_nulls
from finetune.commands.foreign.optimizer_arguments import take_arguments
from finetune.data.caption_files import CAPTION_SUFFIXES
from finetune.data.listing import list_files
from finetune.errors import UsageError

DEFAULTS: Mapping[str, Any] = {
    "batch_size": 2, "cond_dropout": 0.04, "max_epochs": 300, "resolution": 512, "resume_ckpt": "sd_v1-5_vae.ckpt",
    "loss_type": "mse_huber", "grad_accum": 1, "gradient_checkpointing": False, "lr_scheduler": "constant",
    "data_root": "input", "sample_steps": 250, "zero_frequency_noise_ratio": 0.02, "seed": 555,
    "optimizer_config": "optimizer.json",
}  # fmt: skip
"""What EveryDream2 takes where a file says nothing (`train.py`, May 2025)."""
_OPTIMIZERS = {"adamw": "adamw", "adamw8bit": "adamw8bit", "lion": "lion", "lion8bit": "lion", "prodigy": "prodigy"}


def is_config(given: Any) -> bool:
    """Whether the contents of a JSON file are a config of EveryDream2."""
    return isinstance(given, dict) and {"resume_ckpt", "data_root"} <= given.keys()


def take(given: Mapping[str, Any], place: Path = Path()) -> ImportedConfig:
    """The settings of a train.json.

    Args:
        given: option -> value.
        place: the folder that files which it names are relative to.
    """
    imported = ImportedConfig("EveryDream2", defaults=_CHANGES_NOTHING, without_effect=_WITHOUT_EFFECT)
    given = {**DEFAULTS, **without_nulls(given)}
    imported.ours |= {
        "method": "full", "validation_fraction": 0.0, "mixed_precision": "no" if given.get("disable_amp") else "fp16",
        "bucket_upscale": True,
    }  # fmt: skip
    if not given.get("disable_textenc_training"):
        imported.notes.append("EveryDream2 trained the text encoder too; here it stays frozen")
    _take_optimizer(imported, given, place)
    _take_captions(imported, given)
    if given.get("max_epochs") and (name := given.get("project_name")):
        imported.ours["output_dir"] = f"{given.get('logdir', 'logs')}/{name}"
    imported.take(given, _RENAMED)
    return imported


def _take_optimizer(imported: ImportedConfig, given: dict[str, Any], place: Path) -> None:
    """The optimizer of the UNet, from a file of its own; the rate of train.json wins over its."""
    file = given.pop("optimizer_config")
    path = next((path for path in (Path(str(file)), place / str(file)) if path.is_file()), None)
    base: dict[str, Any] = {}
    if path is not None:
        try:
            base = dict(json.loads(path.read_text(encoding="utf-8-sig")).get("base") or {})
        except ValueError as error:
            raise UsageError(f"optimizer_config {path} is not valid JSON: {error}") from error
    elif file:
        imported.skip("optimizer_config", file, "no such file here; adamw8bit at the rate of train.json, or at 1e-6")
    name = base.pop("optimizer", "adamw8bit")
    if name not in _OPTIMIZERS:
        imported.skip("optimizer_config.optimizer", name, "there is no such optimizer here; adamw8bit is taken")
    imported.ours["optimizer"] = _OPTIMIZERS.get(name, "adamw8bit")
    rates = given.pop("lr", None), base.pop("lr", None)
    imported.set("learning_rate", next((rate for rate in rates if rate is not None), 1e-6), "lr")
    names = ("lr_scheduler", "lr_warmup_steps", "lr_decay_steps")
    of_run, of_optimizer = ({name: table.pop(name, None) for name in names} for table in (given, base))
    _take_schedule(imported, {name: of_optimizer[name] or of_run[name] for name in names})
    take_arguments(imported, base, section="optimizer_config")


def _take_schedule(imported: ImportedConfig, given: Mapping[str, Any]) -> None:
    """The schedule; its end is after lr_decay_steps there, by default one and a half times the run."""
    name = given["lr_scheduler"] or "constant"
    imported.set("lr_scheduler", name, "lr_scheduler")
    imported.set("lr_warmup_steps", (given["lr_warmup_steps"] or 0) if name != "constant" else 0, "lr_warmup_steps")
    if name != "constant":
        imported.skip("lr_decay_steps", given["lr_decay_steps"], "here the schedule ends with the run")


def _take_captions(imported: ImportedConfig, given: dict[str, Any]) -> None:
    """Caption files, or else the names of the images; tags after the first `keep_tags` are shuffled."""
    root = Path(str(given["data_root"])).expanduser()
    files = list_files(root) if root.is_dir() else []
    beside = any(file.lower().endswith(CAPTION_SUFFIXES) for file in files)
    imported.ours["caption_source"] = "files" if beside else "filename"
    imported.notes.append(f"captions: {'caption files' if beside else 'the names of the images'} (caption_source)")
    keep = given.pop("keep_tags", None)
    if given.pop("shuffle_tags", False):
        imported.ours |= {"shuffle_caption": True, "keep_tokens": keep or 1}
    for name in ("multiply.txt", "global.yaml", "local.yaml", "flip_p.txt", "cond_dropout.txt"):
        if found := [file for file in files if file.rpartition("/")[2] == name]:
            imported.skip(name, found[0], "settings of folders: give them as sources, --data FILE.toml")


def _flips(imported: ImportedConfig, share: Any) -> None:
    if share:
        imported.ours["random_flip"] = True
    if share not in (0, 0.5):
        imported.skip("flip_p", share, "half of the visits are mirrored")


def _loss(imported: ImportedConfig, value: Any) -> None:
    if value == "huber":
        imported.ours |= {"loss_type": "huber", "huber_schedule": "constant", "huber_c": 1.0}
    elif value != "mse":
        imported.skip("loss_type", value, "the losses that can be imported: mse and huber")


def _pyramid(imported: ImportedConfig, discount: Any) -> None:
    if discount:
        imported.ours |= {"multires_noise_iterations": 10, "multires_noise_discount": float(discount)}


def _zero_snr(imported: ImportedConfig, on: Any) -> None:
    if on:
        imported.ours |= {"zero_terminal_snr": True, "prediction_type": "v_prediction"}


def _clip_skip(imported: ImportedConfig, value: Any) -> None:
    if value:
        imported.set("clip_skip", value, "clip_skip")


def _end(imported: ImportedConfig, value: Any) -> None:
    if value != 1000:
        imported.set("max_timestep", value, "timestep_end")


def _ema(imported: ImportedConfig, decay: Any) -> None:
    if decay:
        imported.ours |= {"use_ema": True, "ema_max_decay": float(decay)}


def _seed(imported: ImportedConfig, value: Any) -> None:
    if value != -1:  # which is a random one there
        imported.set("seed", value, "seed")


def _wandb(imported: ImportedConfig, on: Any) -> None:
    if on:
        imported.set("report_to", ["wandb"], "wandb")


def _no_unet(imported: ImportedConfig, on: Any) -> None:
    if on:
        imported.skip("disable_unet_training", on, "here it is the UNet that is trained")


def _prompts(imported: ImportedConfig, file: Any) -> None:
    if str(file).endswith(".txt"):
        imported.set("sample_prompts", [str(file)], "sample_prompts")
    elif file:
        imported.skip("sample_prompts", file, "prompts are read from .txt files, one in a line")


def _clip(imported: ImportedConfig, norm: Any) -> None:
    imported.set("max_grad_norm", norm or 0.0, "clip_grad_norm")


_RENAMED: Renamed = {
    "resume_ckpt": "model", "data_root": "data", "batch_size": "train_batch_size", "max_epochs": "num_train_epochs",
    "grad_accum": "gradient_accumulation_steps", "gradient_checkpointing": "gradient_checkpointing",
    "resolution": "resolution", "cond_dropout": "caption_dropout", "flip_p": _flips, "loss_type": _loss,
    "zero_frequency_noise_ratio": "noise_offset", "pyramid_noise_discount": _pyramid, "min_snr_gamma": "snr_gamma",
    "enable_zero_terminal_snr": _zero_snr, "clip_skip": _clip_skip, "clip_grad_norm": _clip, "seed": _seed,
    "timestep_start": "min_timestep", "timestep_end": _end, "ema_decay_rate": _ema, "sample_steps": "sample_every",
    "sample_prompts": _prompts, "save_every_n_epochs": "save_model_epochs", "wandb": _wandb,
    "ckpt_every_n_minutes": "checkpointing_minutes", "disable_unet_training": _no_unet,
}  # fmt: skip
_WITHOUT_EFFECT = frozenset(
    ("attn_type", "amp", "disable_amp", "disable_textenc_training", "gpuid", "logdir", "log_step", "notebook",
     "project_name", "run_name", "save_ckpt_dir", "save_ckpts_from_n_epochs", "save_optimizer", "write_schedule",
     "no_prepend_last", "no_save_ckpt", "save_full_precision", "load_settings_every_epoch", "ema_update_interval",
     "ema_device", "ema_sample_nonema_model", "ema_sample_ema_model", "rated_dataset_target_dropout_percent", "config",
     "mixed_precision")
)  # fmt: skip
"""Options that change nothing of what is learned here."""
_CHANGES_NOTHING: Mapping[str, Collection[Any]] = {
    "embedding_perturbation": (0.0,), "train_sampler": ("ddpm", "ddim", "pndm"),
    "validation_config": ("validation_default.json",),
}  # fmt: skip
