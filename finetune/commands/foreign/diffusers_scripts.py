"""Import from command lines of the diffusers example scripts, whose option names most of ours have."""

from collections.abc import Collection, Mapping
from typing import Any

from finetune.commands.foreign.imported_config import ImportedConfig, Renamed, dropout, no_resume
from finetune.config import accepted_names

SCRIPTS = (
    "train_text_to_image.py", "train_text_to_image_lora.py", "train_text_to_image_sdxl.py",
    "train_text_to_image_lora_sdxl.py", "train_dreambooth.py", "train_dreambooth_lora.py",
    "train_dreambooth_lora_sdxl.py", "train_unconditional.py",
)  # fmt: skip
"""Those that train what can be trained here; their siblings train other models."""
_SHARED = {"lr_scheduler": "constant", "lr_warmup_steps": 500, "mixed_precision": "no", "caption_dropout": 0.0,
           "aspect_ratio_bucketing": False, "center_crop": False, "gradient_accumulation_steps": 1,
           "validation_fraction": 0.0}  # fmt: skip
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "train_dreambooth": _SHARED
    | {"train_batch_size": 4, "num_train_epochs": 1, "resolution": 512, "learning_rate": 5e-6,
       "caption_source": "prompt"},
    "train_dreambooth_lora": {"learning_rate": 5e-4},
    "train_dreambooth_lora_sdxl": {"learning_rate": 1e-4, "adam_weight_decay": 1e-4},
    "train_text_to_image": _SHARED
    | {"train_batch_size": 16, "num_train_epochs": 100, "resolution": 512, "learning_rate": 1e-4},
    "train_unconditional": {
        "train_batch_size": 16, "num_train_epochs": 100, "resolution": 64, "learning_rate": 1e-4,
        "lr_warmup_steps": 500, "lr_scheduler": "cosine", "mixed_precision": "no", "adam_beta1": 0.95,
        "center_crop": False, "gradient_accumulation_steps": 1, "validation_fraction": 0.0, "use_ema": False,
        "adam_weight_decay": 1e-6, "eval_batch_size": 16,
    },
}  # fmt: skip
"""Beginning of a script's name -> what it takes where nothing is said, and we would not (August 2026); the later win.
DreamBooth's scripts read no caption files."""
_WITHOUT_EFFECT = frozenset(
    ("local_rank", "logging_dir", "allow_tf32", "enable_xformers_memory_efficient_attention", "cache_dir", "hub_token",
     "sample_batch_size", "prior_generation_precision", "variant", "output_kohya_format", "text_encoder_lr",
     "adam_weight_decay_text_encoder", "set_grads_to_none", "validation_scheduler", "overwrite_output_dir",
     "image_interpolation_mode", "ddpm_num_steps", "skip_final_inference", "pre_compute_text_embeddings",
     "offload_ema", "foreach_ema")
)  # fmt: skip
"""Options that change nothing of what is learned here; their cache_dir is the hub's."""
_CHANGES_NOTHING: Mapping[str, Collection[Any]] = {
    "timestep_bias_strategy": ("none",), "timestep_bias_multiplier": (1.0,), "timestep_bias_begin": (0,),
    "timestep_bias_end": (1000,), "timestep_bias_portion": (0.25,), "dream_detail_preservation": (1.0,),
}  # fmt: skip


def _prompt(imported: ImportedConfig, value: Any) -> None:
    imported.set("sample_prompts", [value], "validation_prompt")


def _trackers(imported: ImportedConfig, value: Any) -> None:
    imported.set("report_to", ["tensorboard", "wandb"] if value == "all" else [value], "report_to")


def _optimizer(imported: ImportedConfig, value: Any) -> None:
    name = str(value).lower()
    imported.set("optimizer", name, "optimizer")
    if name == "prodigy":  # as their script makes it
        imported.ours["optimizer_args"] = ("decouple=True", "use_bias_correction=True", "safeguard_warmup=True")


def _text_encoder(imported: ImportedConfig, on: Any) -> None:
    if on:
        imported.notes.append("the script trained the text encoder too; here it stays frozen")


def _schedule(imported: ImportedConfig, value: Any) -> None:
    if value == "piecewise_constant":
        imported.skip("lr_scheduler", value, "there is no such schedule here; constant is taken")
    similar = {"constant_with_warmup": "constant", "piecewise_constant": "constant"}
    imported.set("lr_scheduler", similar.get(value, value), "lr_scheduler")


def _without_idle(given: dict[str, Any], schedule: str) -> None:
    """Drop options of other schedules, which theirs passes over."""
    for name, of in (("lr_num_cycles", "cosine_with_restarts"), ("lr_power", "polynomial")):
        if schedule != of:
            given.pop(name, None)


_OWN: Renamed = {
    "dataset_name": "data", "validation_prompt": _prompt, "num_validation_images": "eval_batch_size",
    "validation_epochs": "save_image_epochs", "report_to": _trackers, "logger": _trackers, "lr_scheduler": _schedule,
    "pretrained_vae_model_name_or_path": "vae", "ddpm_num_inference_steps": "num_inference_steps",
    "optimizer": _optimizer, "train_text_encoder": _text_encoder, "proportion_empty_prompts": "caption_dropout",
    "resume_from_checkpoint": no_resume, "lora_dropout": dropout,
    "use_8bit_adam": lambda imported, value: imported.set("optimizer", "adamw8bit", "use_8bit_adam") if value else None,
    "use_dora": lambda imported, value: imported.set("lora_type", "dora", "use_dora"),
}  # fmt: skip


def take(given: Mapping[str, Any], script: str) -> ImportedConfig:
    """The settings of a run of one of the scripts.

    Args:
        given: option -> value.
        script: its name, such as `train_text_to_image_lora.py`.
    """
    imported = ImportedConfig("diffusers", defaults=_CHANGES_NOTHING, without_effect=_WITHOUT_EFFECT)
    for begin, defaults in _DEFAULTS.items():
        imported.ours |= defaults if script.startswith(begin) else {}
    if script.startswith("train_unconditional"):
        imported.ours |= {"model": "ddpm"}
    else:
        lora = {"method": "lora", "rank": 4, "lora_target_modules": ("to_k", "to_q", "to_v", "to_out.0")}
        imported.ours |= lora if "lora" in script else {"method": "full"}
    if "xl" in script:
        imported.ours.pop("resolution", None)  # theirs and ours are the model's own
    given = dict(given)
    if not given.pop("with_prior_preservation", False):
        for name in ("class_data_dir", "class_prompt", "num_class_images", "prior_loss_weight"):
            given.pop(name, None)  # theirs does not look at them then
    if given.get("caption_column"):
        imported.ours.pop("caption_source", None)
    if str(given.get("optimizer", "")).lower() == "prodigy":
        prodigy = ("prodigy_decouple", "prodigy_use_bias_correction", "prodigy_safeguard_warmup", "prodigy_beta3")
        given = {name: value for name, value in given.items() if name not in prodigy}
    _without_idle(given, str(given.get("lr_scheduler", imported.ours.get("lr_scheduler"))))
    if "max_train_steps" in given:
        imported.ours.pop("num_train_epochs", None)
    ours = {name: option for name, option in accepted_names().items() if name not in _WITHOUT_EFFECT}
    imported.take(given, {**ours, **_OWN})
    if given.get("lr_scheduler", imported.ours.get("lr_scheduler")) == "constant":
        imported.ours["lr_warmup_steps"] = 0  # their constant schedule has no warm-up, whatever is given
    return imported
