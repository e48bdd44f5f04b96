"""OneTrainer: its JSON files, presets and whole configs alike."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.commands.foreign.taken import Renamed, Taken, dropout, square

DEFAULTS: Mapping[str, Any] = {
    "learning_rate": 3e-6, "epochs": 100, "batch_size": 1, "learning_rate_warmup_steps": 200, "resolution": "512",
    "learning_rate_scheduler": "CONSTANT", "train_dtype": "FLOAT_16",
    "aspect_ratio_bucketing": True,
}  # fmt: skip
"""What OneTrainer takes where a file says nothing."""
_MODELS = {"STABLE_DIFFUSION_15", "STABLE_DIFFUSION_20", "STABLE_DIFFUSION_20_BASE", "STABLE_DIFFUSION_21",
           "STABLE_DIFFUSION_21_BASE", "STABLE_DIFFUSION_XL_10_BASE", "STABLE_DIFFUSION_15_INPAINTING",
           "STABLE_DIFFUSION_20_INPAINTING", "STABLE_DIFFUSION_XL_10_BASE_INPAINTING"}  # fmt: skip
_DTYPES = {"FLOAT_32": "no", "TFLOAT_32": "no", "FLOAT_16": "fp16", "BFLOAT_16": "bf16"}
_OPTIMIZERS = {
    "ADAMW": "adamw", "ADAMW_8BIT": "adamw8bit", "ADAFACTOR": "adafactor", "PRODIGY": "prodigy", "SGD": "sgd",
}  # fmt: skip
_ARGUMENTS = {"weight_decay": "adam_weight_decay", "beta1": "adam_beta1", "beta2": "adam_beta2", "eps": "adam_epsilon"}
_KINDS = {"LORA": "lora", "LOHA": "loha"}


def _optimizer(taken: Taken, value: Any) -> None:
    given = {"optimizer": value} if isinstance(value, str) else dict(value)
    name = given.pop("optimizer", None)
    if name is not None and name not in _OPTIMIZERS:
        taken.leave("optimizer.optimizer", name, f"the optimizers here: {', '.join(_OPTIMIZERS.values())}")
    elif name is not None:
        taken.ours["optimizer"] = _OPTIMIZERS[name]
    for argument, number in given.items():
        if argument in _ARGUMENTS and number is not None:
            taken.put(_ARGUMENTS[argument], number, f"optimizer.{argument}")
        elif number not in (None, False):
            taken.leave(f"optimizer.{argument}", number)


def _method(taken: Taken, value: Any) -> None:
    methods = {"LORA": "lora", "FINE_TUNE": "full"}
    taken.put("method", methods.get(value, value), "training_method")


def _model_type(taken: Taken, value: Any) -> None:
    if value not in _MODELS:
        taken.leave("model_type", value, "Stable Diffusion 1, 2 and XL can be trained here")


def _chosen(name: str, theirs: str, table: Mapping[str, Any]) -> Any:
    return lambda taken, value: taken.put(name, table.get(value, value), theirs)


def _text_encoder(taken: Taken, value: Any) -> None:
    note = "OneTrainer trained the text encoder too, unless told otherwise; here it stays frozen"
    if (not isinstance(value, dict) or value.get("train", True)) and note not in taken.notes:
        taken.notes.append(note)


def _unet(taken: Taken, value: Any) -> None:
    given = dict(value) if isinstance(value, dict) else {}
    if rate := given.pop("learning_rate", None):
        taken.put("learning_rate", rate, "unet.learning_rate")
    if given.pop("gradient_checkpointing", False):
        taken.ours["gradient_checkpointing"] = True
    _leave_rest(taken, "unet", given)


def _vae(taken: Taken, value: Any) -> None:
    given = dict(value) if isinstance(value, dict) else {}
    if name := given.pop("model_name", None):
        taken.put("vae", name, "vae.model_name")
    _leave_rest(taken, "vae", given)


def _leave_rest(taken: Taken, part: str, given: Mapping[str, Any]) -> None:
    """What is told of a part of the model, but for what is so here anyway."""
    for name, value in given.items():
        if name not in ("train", "include") and value not in (None, False, "", 0):
            taken.leave(f"{part}.{name}", value)


def _loss_weight(taken: Taken, value: Any) -> None:
    if value not in ("CONSTANT", "MIN_SNR_GAMMA"):
        taken.leave("loss_weight_fn", value, "Min-SNR is the one weighting here")


def _concepts(taken: Taken, value: Any) -> None:
    everything = [concept for concept in value or [] if concept.get("enabled", True) and concept.get("path")]
    for kind, ours in {"PRIOR_PREDICTION": "class_data", "VALIDATION": "validation_data"}.items():
        paths = [concept["path"] for concept in everything if concept.get("type") == kind]
        if paths:
            taken.put(ours, paths[0], "concepts.path")
        for more in paths[1:]:
            taken.leave("concepts.path", more, f"one folder is taken for {ours}")
    if "class_data" in taken.ours:
        taken.ours["prior_prediction"] = True
    concepts = [concept for concept in everything if concept.get("type", "STANDARD") == "STANDARD"]
    if not concepts:
        return
    taken.put("data", [concept["path"] for concept in concepts], "concepts.path")
    repeats = [concept.get("balancing", 1.0) for concept in concepts]
    strange = [times for times in repeats if times < 1 or times != int(times)]
    if strange or any(concept.get("balancing_strategy", "REPEATS") != "REPEATS" for concept in concepts):
        taken.leave("concepts.balancing", repeats, "whole numbers of repeats are taken")
    elif set(repeats) != {1}:
        taken.put("repeats", [int(times) for times in repeats], "concepts.balancing")


def _concept_file(taken: Taken, value: Any) -> None:
    path = Path(value)
    if path.is_file():
        _concepts(taken, json.loads(path.read_text(encoding="utf-8")))
    else:
        taken.leave("concept_file_name", value, "no such file here; give --data")


def _masked(taken: Taken, value: Any) -> None:
    if not value:  # masks that lie there are heeded here
        taken.ours["masked_loss"] = False


def _warmup(taken: Taken, value: Any) -> None:
    taken.put("lr_warmup_steps", int(value) if isinstance(value, float) else value, "learning_rate_warmup_steps")


def _schedule(taken: Taken, value: Any) -> None:
    taken.put("lr_scheduler", str(value).lower(), "learning_rate_scheduler")


def _buckets(taken: Taken, value: Any) -> None:
    taken.put("aspect_ratio_bucketing", value, "aspect_ratio_bucketing")
    if value:  # it enlarges small pictures
        taken.ours["bucket_upscale"] = True


def _checkpointing(taken: Taken, value: Any) -> None:
    taken.ours["gradient_checkpointing"] = value not in ("OFF", False)


_RENAMED: Renamed = {
    "base_model_name": "model", "learning_rate": "learning_rate", "epochs": "num_train_epochs",
    "batch_size": "train_batch_size", "gradient_accumulation_steps": "gradient_accumulation_steps",
    "lora_rank": "rank", "lora_alpha": "lora_alpha",
    "dropout_probability": dropout, "offset_noise_weight": "noise_offset", "clip_grad_norm": "max_grad_norm",
    "lora_model_name": "init_lora", "workspace_dir": "output_dir",
    "training_method": _method, "model_type": _model_type, "optimizer": _optimizer, "text_encoder": _text_encoder,
    "text_encoder_2": _text_encoder, "unet": _unet, "vae": _vae,
    "loss_weight_fn": _loss_weight, "concepts": _concepts, "concept_file_name": _concept_file, "resolution": square,
    "aspect_ratio_bucketing": _buckets, "gradient_checkpointing": _checkpointing,
    "train_dtype": _chosen("mixed_precision", "train_dtype", _DTYPES),
    "peft_type": _chosen("lora_type", "peft_type", _KINDS),
    "masked_training": _masked, "learning_rate_warmup_steps": _warmup, "learning_rate_scheduler": _schedule,
    "lora_decompose": lambda taken, value: taken.put("lora_type", "dora", "lora_decompose") if value else None,
    "ema": lambda taken, value: taken.put("use_ema", value != "OFF", "ema"),
}  # fmt: skip


def take(given: Mapping[str, Any]) -> Taken:
    """The settings of a config or preset."""
    taken = Taken("OneTrainer")
    given = {**DEFAULTS, **given}
    lora = given.get("training_method") == "LORA"
    if lora:
        given = {"lora_rank": 16, "lora_alpha": 1.0} | given
        taken.notes.append(f"alpha is {given['lora_alpha']:g} (OneTrainer's default is 1, here it would be the rank)")
    else:
        for name in [name for name in given if name.startswith("lora_") or name == "peft_type"]:
            if value := given.pop(name):
                taken.leave(name, value, "a full fine-tune has no LoRA")
        given.pop("dropout_probability", None)
    gamma, weighted = given.pop("loss_weight_strength", 5.0), given.get("loss_weight_fn") == "MIN_SNR_GAMMA"
    if weighted:
        taken.put("snr_gamma", gamma, "loss_weight_strength")
    if str(given.get("model_type")).endswith("_INPAINTING") and given.pop("masked_training", False):
        taken.leave("masked_training", True, "masks say where an inpainting model paints, and all errors count")
    if given.get("concepts"):
        given.pop("concept_file_name", None)
    taken.take({name: value for name, value in given.items() if value != {}}, _RENAMED)
    return taken
