"""Import from JSON files of OneTrainer: presets and complete configs."""

import json
from collections.abc import Collection, Mapping
from fractions import Fraction
from math import lcm
from pathlib import Path
from typing import Any

from finetune.commands.foreign.imported_config import ImportedConfig, Renamed, dropout, square
from finetune.commands.foreign.optimizer_arguments import take_arguments
from finetune.commands.foreign.sd_scripts_network import TRANSFORMERS
from finetune.commands.foreign.sources import ForeignSource, take_sources
from finetune.errors import UsageError

DEFAULTS: Mapping[str, Any] = {
    "learning_rate": 3e-6, "epochs": 100, "batch_size": 1, "learning_rate_warmup_steps": 200, "resolution": "512",
    "learning_rate_scheduler": "CONSTANT", "train_dtype": "FLOAT_16",
    "aspect_ratio_bucketing": True, "gradient_accumulation_steps": 1,
}  # fmt: skip
"""What OneTrainer takes where a file says nothing."""
_MODELS = {"STABLE_DIFFUSION_15", "STABLE_DIFFUSION_20", "STABLE_DIFFUSION_20_BASE", "STABLE_DIFFUSION_21",
           "STABLE_DIFFUSION_21_BASE", "STABLE_DIFFUSION_XL_10_BASE", "STABLE_DIFFUSION_15_INPAINTING",
           "STABLE_DIFFUSION_20_INPAINTING", "STABLE_DIFFUSION_XL_10_BASE_INPAINTING"}  # fmt: skip
_DTYPES = {"FLOAT_32": "no", "TFLOAT_32": "no", "FLOAT_16": "fp16", "BFLOAT_16": "bf16"}
_OPTIMIZERS = {
    "ADAMW": "adamw", "ADAMW_8BIT": "adamw8bit", "ADAFACTOR": "adafactor", "PRODIGY": "prodigy", "SGD": "sgd",
    "LION": "lion", "CAME": "came", "ADOPT": "adopt", "MUON": "muon", "AdEMAMix": "ademamix",
    "SCHEDULE_FREE_ADAMW": "schedulefree_adamw", "SCHEDULE_FREE_SGD": "schedulefree_sgd",
    "PRODIGY_PLUS_SCHEDULE_FREE": "prodigy_schedulefree",
}  # fmt: skip
_FLAT = {
    "unet_learning_rate": ("unet", "learning_rate"), "weight_decay": ("optimizer", "weight_decay"),
    "min_snr_gamma": ("loss_weight_strength", ""), "vae_model_name": ("vae", "model_name"),
}  # fmt: skip
"""What older presets say at the top -> where it is said now."""

_CHANGES_NOTHING: Mapping[str, Collection[Any]] = {
    "tensorboard": (True,), "tensorboard_port": (6006,), "debug_dir": ("debug",), "validate_after": (1,),
    "validate_after_unit": ("EPOCH",), "include_train_config": ("NONE",), "latent_caching": (True,),
    "clear_cache_before_training": (True,), "ema_decay": (0.999,), "frames": (25,),
    "ema_update_step_interval": (5,), "dataloader_threads": (1, 2), "train_device": ("cuda",), "temp_device": ("cpu",),
    "fallback_train_dtype": tuple(_DTYPES), "enable_autocast_cache": (True,), "mse_strength": (1,),
    "vb_loss_strength": (1,), "loss_scaler": ("NONE",), "learning_rate_scaler": ("NONE",), "timestep_shift": (1,),
    "embedding_weight_dtype": tuple(_DTYPES), "lora_weight_dtype": tuple(_DTYPES),
    "lora_decompose_norm_epsilon": (True,), "bundle_additional_embeddings": (True,), "weight_dtype": tuple(_DTYPES),
    "output_dtype": tuple(_DTYPES), "unet_weight_dtype": ("NONE", *_DTYPES), "vae_weight_dtype": ("NONE", *_DTYPES),
    "attention_mechanism": ("XFORMERS", "SDP"),
    "train_unet": (True,), "enable_async_offloading": (True,), "enable_activation_offloading": (True,),
    "samples_to_tensorboard": (True,), "non_ema_sampling": (True,), "backup_before_save": (True,),
    "rolling_backup_count": (3,), "sample_image_format": ("JPG", "PNG"), "save_filename_prefix": ("",),
    "layer_filter_preset": ("attn-mlp", "full", "attentions"), "lora_layer_preset": ("attn-mlp", "full", "attentions"),
}  # fmt: skip
"""Options without a like here -> values that are their defaults, or change nothing of what is learned."""
_OF_THE_PROGRAM = ("sample_", "backup_", "save_", "cache_", "__", "output_model_destination", "secrets")
"""Beginnings of options that say how the program goes on, and not what is learned."""
_EVERY_LAYER = ("conv1", "conv2", "conv_shortcut", "conv_in", "conv_out", "downsamplers.0.conv", "upsamplers.0.conv",
                "time_emb_proj", "linear_1", "linear_2")  # fmt: skip
"""Those that OneTrainer adapts beside those of transformers, unless it is told which."""
_KINDS = {"LORA": "lora", "LOHA": "loha"}


def _optimizer(imported: ImportedConfig, value: Any) -> None:
    given = {"optimizer": value} if isinstance(value, str) else dict(value)
    name = given.pop("optimizer", None)
    if name is not None and name not in _OPTIMIZERS:
        imported.skip("optimizer.optimizer", name, f"the optimizers here: {', '.join(_OPTIMIZERS.values())}")
    elif name is not None:
        imported.ours["optimizer"] = _OPTIMIZERS[name]
    take_arguments(imported, given, section="optimizer")


_METHODS = {"LORA": "lora", "FINE_TUNE": "full"}


def _refuse_others(given: Mapping[str, Any]) -> None:
    """Raise UsageError for another kind of model or training than there is here."""
    method, model = given.get("training_method", "FINE_TUNE"), given.get("model_type", "STABLE_DIFFUSION_15")
    if method not in _METHODS:
        raise UsageError(f"training_method {method}: expected {' or '.join(_METHODS)}")
    if model not in _MODELS:
        raise UsageError(f"model_type {model}: Stable Diffusion 1, 2 and XL can be trained here")


def _format(imported: ImportedConfig, value: Any) -> None:
    if value == "ORIGINAL_SINGLE_FILE":
        imported.ours["export_formats"] = ("single-file",)


def _chosen(name: str, theirs: str, table: Mapping[str, Any]) -> Any:
    return lambda imported, value: imported.set(name, table.get(value, value), theirs)


def _text_encoder(imported: ImportedConfig, value: Any) -> None:
    if isinstance(value, dict) and (share := value.get("dropout_probability")):
        imported.set("caption_dropout", share, "text_encoder.dropout_probability")
    note = "OneTrainer trained the text encoder too, unless told otherwise; here it stays frozen"
    if (not isinstance(value, dict) or value.get("train", True)) and note not in imported.notes:
        imported.notes.append(note)


def _unet(imported: ImportedConfig, value: Any) -> None:
    given = dict(value) if isinstance(value, dict) else {}
    if rate := given.pop("learning_rate", None):
        imported.set("learning_rate", rate, "unet.learning_rate")
    if given.pop("gradient_checkpointing", False):
        imported.ours["gradient_checkpointing"] = True
    _leave_rest(imported, "unet", given)


def _vae(imported: ImportedConfig, value: Any) -> None:
    given = dict(value) if isinstance(value, dict) else {}
    if name := given.pop("model_name", None):
        imported.set("vae", name, "vae.model_name")
    _leave_rest(imported, "vae", given)


_OF_A_PART = ("train", "include", "stop_training_after", "train_embedding", "__version")


def _leave_rest(imported: ImportedConfig, part: str, given: Mapping[str, Any]) -> None:
    """What is told of a part of the model, but for what is so here anyway."""
    for name, value in given.items():
        if name not in _OF_A_PART and value not in (None, False, "", 0, "NEVER", 1.0, *_DTYPES):
            imported.skip(f"{part}.{name}", value)


def _loss_weight(imported: ImportedConfig, value: Any) -> None:
    if value == "DEBIASED_ESTIMATION":
        imported.ours["debiased_estimation"] = True
    elif value not in ("CONSTANT", "MIN_SNR_GAMMA"):
        imported.skip("loss_weight_fn", value, "the weightings here are Min-SNR and debiased estimation")


def _take_timesteps(imported: ImportedConfig, given: dict[str, Any]) -> None:
    """Their distribution of timesteps, with the parameters that it has there (`_get_timestep_discrete`)."""
    kind, weight, bias = (given.pop(name, None) for name in ("timestep_distribution", "noising_weight", "noising_bias"))
    weight, bias = weight or 0.0, bias or 0.0
    if kind == "LOGIT_NORMAL":
        imported.ours |= {"timestep_sampling": "logit_normal", "logit_mean": bias, "logit_std": 1.0 + weight}
    elif kind == "BETA":
        limits = max(1e-4, weight), max(1e-4, bias)
        imported.ours |= {"timestep_sampling": "beta", "beta_alpha": limits[0], "beta_beta": limits[1]}
    elif kind not in (None, "UNIFORM"):
        imported.skip("timestep_distribution", kind, "the distributions here: uniform, logit_normal, beta")
    for theirs, ours in (("min_noising_strength", "min_timestep"), ("max_noising_strength", "max_timestep")):
        share = given.pop(theirs, None)
        if share is not None and share != {"min_timestep": 0, "max_timestep": 1}[ours]:
            imported.set(ours, int(1000 * share), theirs)


def _take_losses(imported: ImportedConfig, given: dict[str, Any]) -> None:
    """The mean absolute error, where it is the only one; a sum of several losses is none of ours."""
    names = ("mse_strength", "mae_strength", "log_cosh_strength", "huber_strength")
    strengths = {name: strength for name in names if (strength := given.get(name))}
    if strengths == {"mae_strength": 1}:
        imported.ours["loss_type"] = "l1"
        for name in names:
            given.pop(name, None)


def _concepts(imported: ImportedConfig, value: Any) -> None:
    everything = [concept for concept in value or [] if concept.get("enabled", True) and concept.get("path")]
    for kind, ours in {"PRIOR_PREDICTION": "class_data", "VALIDATION": "validation_data"}.items():
        paths = [concept["path"] for concept in everything if _kind_of(concept) == kind]
        if paths:
            imported.set(ours, paths[0], "concepts.path")
        for more in paths[1:]:
            imported.skip("concepts.path", more, f"one folder is taken for {ours}")
    if "class_data" in imported.ours:
        imported.ours["prior_prediction"] = True
    if "validation_data" in imported.ours:
        del imported.ours["validation_fraction"]  # which is of the images that are trained on
    concepts = [concept for concept in everything if _kind_of(concept) == "STANDARD"]
    if not concepts:
        return
    balance = [Fraction(concept.get("balancing", concept.get("repeats", 1.0))) for concept in concepts]
    sampled = [concept.get("balancing_strategy", "REPEATS") == "SAMPLES" for concept in concepts]
    repeats = [Fraction(1) if in_turns else times for times, in_turns in zip(balance, sampled, strict=True)]
    epochs = lcm(*(times.limit_denominator(20).denominator for times in repeats))
    if epochs > 1:  # of OneTrainer in one of ours, so that each concept comes a whole number of times
        imported.notes.append(f"an epoch here has the visits of {epochs} of OneTrainer's")
        _divide_epochs(imported, epochs)
    sources = [
        ForeignSource(
            concept["path"],
            1 if in_turns else max(1, round(times * epochs)),
            _settings_of(imported, concept) | ({"samples": max(1, round(times * epochs))} if in_turns else {}),
        )
        for concept, times, in_turns in zip(concepts, balance, sampled, strict=True)
    ]
    take_sources(imported, sources, theirs="concepts.path")


def _divide_epochs(imported: ImportedConfig, by: int) -> None:
    length = imported.ours.get("num_train_epochs", DEFAULTS["epochs"])
    if length % by:
        imported.skip("epochs", length, f"{by} of them are one epoch here, of which there is a whole number")
    imported.ours["num_train_epochs"] = max(1, round(length / by))


def _kind_of(concept: Mapping[str, Any]) -> str:
    """What a concept is for; older files say of one that it is for validation."""
    return "VALIDATION" if concept.get("validation_concept") else concept.get("type", "STANDARD")


_HARMLESS = ("enable_crop_jitter",)
"""Switches of a concept that are on by default, and whose like here is an option of another name."""


def _settings_of(imported: ImportedConfig, concept: Mapping[str, Any]) -> dict[str, Any]:
    """The options of one concept; its other switches are listed."""
    image, text = dict(concept.get("image") or {}), dict(concept.get("text") or {})
    weight = float(concept.get("loss_weight", 1.0))
    settings: dict[str, Any] = {} if weight == 1 else {"loss_weight": weight}
    if image.pop("enable_random_flip", False):
        settings["random_flip"] = True
    side = str(image.pop("resolution_override", ""))
    if image.pop("enable_resolution_override", False):
        if side.isdigit():
            settings["resolution"] = int(side)
        else:
            imported.skip(f"{concept['path']}.resolution_override", side, "one number of pixels is taken")
    if text.pop("enable_tag_shuffling", False):
        settings |= {"shuffle_caption": True, "keep_tokens": int(text.get("keep_tags_count", 1))}
        if (delimiter := text.get("tag_delimiter", ",")) != ",":
            settings["caption_separator"] = delimiter
    _take_tag_dropout(imported, settings, text, concept["path"])
    if (captions := text.pop("prompt_source", "sample")) in ("sample", "filename"):
        settings |= {"caption_source": "filename"} if captions == "filename" else {}
    else:
        imported.skip(f"{concept['path']}.prompt_source", captions, "captions are in files, or the names of images")
    for name, value in (image | text).items():
        switch = name.startswith("enable_") or name.endswith("_enable")
        if switch and value and name not in _HARMLESS:
            imported.skip(f"{concept['path']}.{name}", value)
    if concept.get("include_subdirectories") is False:
        imported.skip(f"{concept['path']}.include_subdirectories", False, "folders are read at any depth here")
    return settings


_TAG_DROPOUT = {"FULL": "all", "RANDOM": "each", "RANDOM WEIGHTED": "rising"}


def _take_tag_dropout(imported: ImportedConfig, settings: dict[str, Any], text: dict[str, Any], concept: str) -> None:
    """Tags that are left out, but not lists of those that never are, or alone are."""
    mode, share = text.pop("tag_dropout_mode", "FULL"), text.pop("tag_dropout_probability", 0.0)
    if not text.pop("tag_dropout_enable", False) or not share:
        return
    if (special := text.get("tag_dropout_special_tags_mode", "NONE")) != "NONE":
        imported.skip(f"{concept}.tag_dropout_special_tags_mode", special, "all tags are treated alike")
    settings |= {"caption_tag_dropout": float(share), "caption_tag_dropout_mode": _TAG_DROPOUT.get(mode, "each")}
    settings["keep_tokens"] = int(text.get("keep_tags_count", 1))


def _concept_file(imported: ImportedConfig, value: Any) -> None:
    path = Path(value)
    if path.is_file():
        _concepts(imported, json.loads(path.read_text(encoding="utf-8")))
    else:
        imported.skip("concept_file_name", value, "no such file here; give --data")


def _take_masks(imported: ImportedConfig, given: dict[str, Any]) -> None:
    """Masks, and how much counts outside of them."""
    names = ("masked_training", "unmasked_weight", "unmasked_probability", "normalize_masked_area_loss")
    masked, weight, share, normalized = (given.pop(name, None) for name in names)
    if masked is False:  # masks that lie there are heeded here
        imported.ours["masked_loss"] = False
    if not masked:
        return
    imported.set("unmasked_weight", 0.1 if weight is None else weight, "unmasked_weight")
    if normalized:
        imported.ours["normalize_masked_area_loss"] = True
    imported.set("unmasked_probability", 0.1 if share is None else share, "unmasked_probability")


def _warmup(imported: ImportedConfig, value: Any) -> None:
    if not isinstance(value, int | float):
        imported.skip("learning_rate_warmup_steps", value)
    else:
        imported.set("lr_warmup_steps", value, "learning_rate_warmup_steps")


_SCHEDULES = {
    "CONSTANT": "constant", "LINEAR": "linear", "COSINE": "cosine", "COSINE_WITH_HARD_RESTARTS": "cosine_with_restarts",
}  # fmt: skip
_NEAR = {"COSINE_WITH_RESTARTS": "cosine_with_restarts", "REX": "rex"}
"""Schedules of another formula -> what comes near: restarts without a jump, and REX with d = 0.9 instead of 0.5."""


def _take_schedule(imported: ImportedConfig, given: dict[str, Any]) -> None:
    value, cycles = given.pop("learning_rate_scheduler", None), given.pop("learning_rate_cycles", None)
    factor = given.pop("learning_rate_min_factor", None)
    name = _SCHEDULES.get(str(value))
    if name is None:
        name = _NEAR.get(str(value), "constant")
        imported.skip("learning_rate_scheduler", value, f"there is no such schedule here; {name} is taken")
    imported.ours["lr_scheduler"] = name
    if name == "cosine_with_restarts" and cycles:
        imported.set("lr_num_cycles", int(cycles), "learning_rate_cycles")
    if factor and name not in ("constant", "inverse_sqrt") and "learning_rate" in given:
        imported.set("lr_end", factor * given["learning_rate"], "learning_rate_min_factor")


def _buckets(imported: ImportedConfig, value: Any) -> None:
    imported.set("aspect_ratio_bucketing", value, "aspect_ratio_bucketing")
    if value:  # it enlarges small pictures
        imported.ours["bucket_upscale"] = True


def _checkpointing(imported: ImportedConfig, value: Any) -> None:
    imported.ours["gradient_checkpointing"] = value not in ("OFF", False)


def _zero_snr(imported: ImportedConfig, value: Any) -> None:
    if value:
        imported.ours |= {"zero_terminal_snr": True, "prediction_type": "v_prediction"}  # so it is there, too


_RENAMED: Renamed = {
    "base_model_name": "model", "learning_rate": "learning_rate", "epochs": "num_train_epochs",
    "batch_size": "train_batch_size", "gradient_accumulation_steps": "gradient_accumulation_steps",
    "lora_rank": "rank", "lora_alpha": "lora_alpha",
    "dropout_probability": dropout, "offset_noise_weight": "noise_offset", "clip_grad_norm": "max_grad_norm",
    "lora_model_name": "init_lora", "workspace_dir": "output_dir",
    "training_method": _chosen("method", "training_method", _METHODS), "output_model_format": _format,
    "optimizer": _optimizer, "text_encoder": _text_encoder,
    "text_encoder_2": _text_encoder, "unet": _unet, "vae": _vae,
    "loss_weight_fn": _loss_weight, "concepts": _concepts, "concept_file_name": _concept_file, "resolution": square,
    "aspect_ratio_bucketing": _buckets, "gradient_checkpointing": _checkpointing,
    "train_dtype": _chosen("mixed_precision", "train_dtype", _DTYPES),
    "peft_type": _chosen("lora_type", "peft_type", _KINDS),
    "learning_rate_warmup_steps": _warmup,
    "lora_decompose": lambda imported, value: imported.set("lora_type", "dora", "lora_decompose") if value else None,
    "ema": lambda imported, value: imported.set("use_ema", value != "OFF", "ema"),
    "rescale_noise_scheduler_to_zero_terminal_snr": _zero_snr,
    "force_v_prediction": lambda imported, on: imported.set("prediction_type", "v_prediction", "") if on else None,
    "force_epsilon_prediction": lambda imported, on: imported.set("prediction_type", "epsilon", "") if on else None,
}  # fmt: skip


def _as_it_is_said_now(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an older preset under their newer names, without those of the program."""
    settings = {name: value for name, value in given.items() if not name.startswith(_OF_THE_PROGRAM)}
    for name, (part, entry) in _FLAT.items():
        value = settings.pop(name, None)
        if value in (None, "", 0):
            continue
        if not entry:
            settings |= {part: value, "loss_weight_fn": "MIN_SNR_GAMMA"}
        elif isinstance(settings.get(part), dict) or part not in settings:
            settings[part] = {entry: value} | (settings.get(part) or {})
        else:  # the optimizer's name alone
            settings[part] = {part: settings[part], entry: value}
    if settings.pop("train_text_encoder", None) is False:
        settings["text_encoder"] = {"train": False}
        settings.pop("text_encoder_learning_rate", None)
    return settings


def take(given: Mapping[str, Any]) -> ImportedConfig:
    """The settings of a config or preset.

    Raises:
        UsageError: another kind of model or training.
    """
    _refuse_others(given)
    imported = ImportedConfig("OneTrainer", defaults=_CHANGES_NOTHING)
    given = _as_it_is_said_now({**DEFAULTS, **given})
    imported.ours["validation_fraction"] = 0.0
    lora = given.get("training_method") == "LORA"
    if lora:
        given = {"lora_rank": 16, "lora_alpha": 1.0} | given
        imported.notes.append(
            f"alpha is {given['lora_alpha']:g} (OneTrainer's default is 1, here it would be the rank)"
        )
        layers = str(given.get("layer_filter_preset") or given.get("lora_layer_preset") or "full")
        some = layers in ("attn-mlp", "attentions") or given.get("lora_layers") in ("attentions",)
        imported.ours["lora_target_modules"] = TRANSFORMERS if some else (*TRANSFORMERS, *_EVERY_LAYER)
    else:
        for name in [name for name in given if name.startswith("lora_") or name == "peft_type"]:
            if value := given.pop(name):
                imported.skip(name, value, "a full fine-tune has no LoRA")
        given.pop("dropout_probability", None)
    gamma, weighted = given.pop("loss_weight_strength", 5.0), given.get("loss_weight_fn") == "MIN_SNR_GAMMA"
    if weighted:
        imported.set("snr_gamma", gamma, "loss_weight_strength")
    if str(given.get("model_type")).endswith("_INPAINTING") and given.pop("masked_training", False):
        imported.skip("masked_training", True, "masks say where an inpainting model paints, and all errors count")
    if given.get("concepts"):
        given.pop("concept_file_name", None)
    _take_schedule(imported, given)
    _take_timesteps(imported, given)
    _take_losses(imported, given)
    _take_masks(imported, given)
    given.pop("model_type", None)
    concepts = {name: given.pop(name, None) for name in ("concepts", "concept_file_name")}
    imported.take({name: value for name, value in given.items() if value != {}}, _RENAMED)
    imported.take({name: value for name, value in concepts.items() if value}, _RENAMED)
    return imported
