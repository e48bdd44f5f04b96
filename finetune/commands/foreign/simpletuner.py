"""Import from config.json of SimpleTuner, with the files of data backends and of LyCORIS that it names."""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from finetune.commands.foreign.imported_config import ImportedConfig, Renamed, without_nulls, word_value
from finetune.commands.foreign.optimizer_arguments import take_arguments
from finetune.commands.foreign.sd_scripts_network import take_lycoris
from finetune.commands.foreign.sources import ForeignSource, take_sources
from finetune.errors import UsageError

DEFAULTS: Mapping[str, Any] = {
    "model_type": "full", "train_batch_size": 4, "learning_rate": 4e-7, "optimizer": "adamw_bf16",
    "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 0, "lr_end": 4e-7, "lr_power": 0.8,
    "gradient_accumulation_steps": 1, "mixed_precision": "bf16", "gradient_checkpointing": True,
    "caption_dropout_probability": 0.1, "resolution": 1024, "checkpoints_total_limit": 5,
    "checkpoint_step_interval": 500, "lora_rank": 16, "lora_dropout": 0.1, "max_grad_norm": 2.0,
    "grad_clip_method": "value", "noise_offset": 0.1, "noise_offset_probability": 0.25, "huber_schedule": "snr",
    "huber_c": 0.1, "ema_decay": 0.995,
}  # fmt: skip
"""What SimpleTuner takes where a file says nothing (its field registry, August 2026)."""
_FAMILIES = {"sd1x": "sd15", "sd2x": "sd21", "sdxl": "sdxl", "legacy": "sd21"}
"""Their families of models -> the model that is taken where none is named."""
_OPTIMIZERS = {
    "adamw_bf16": ("adamw", {"eps": 1e-6}), "ao-adamw8bit": ("adamw8bit", {"eps": 1e-6}),
    "bnb-adamw8bit": ("adamw8bit", {"eps": 1e-6}), "bnb-adamw8bit-paged": ("adamw8bit", {"eps": 1e-6}),
    "bnb-adamw": ("adamw", {"eps": 1e-6}), "bnb-adamw-paged": ("adamw", {"eps": 1e-6}), "torch-adamw": ("adamw", {}),
    "torch-adam": ("torch.optim:Adam", {}), "torch-sgd": ("sgd", {}), "torch-adafactor": ("adafactor", {}),
    "optimi-adamw": ("adamw", {"betas": [0.9, 0.99], "eps": 1e-6, "weight_decay": 0.0}),
    "optimi-stableadamw": ("stableadamw", {"betas": [0.9, 0.99]}), "optimi-lion": ("lion", {"betas": [0.9, 0.99]}),
    "bnb-lion": ("lion", {}), "bnb-lion8bit": ("lion", {}), "bnb-ademamix": ("ademamix", {}),
    "adamw_schedulefree": ("schedulefree_adamw", {}), "adamw_schedulefree+aggressive": ("schedulefree_adamw", {}),
    "prodigy": ("prodigy_schedulefree", {}), "soap": ("soap", {}), "muon": ("muon", {}),
}  # fmt: skip
"""Theirs -> ours, and their arguments of it where they are not those of the class."""


def is_config(given: Any) -> bool:
    """Whether the contents of a JSON file are a config of SimpleTuner."""
    names = {name.lstrip("-") for name in given} if isinstance(given, dict) else set()
    return "model_family" in names or "data_backend_config" in names


def take(given: Mapping[str, Any], place: Path = Path()) -> ImportedConfig:
    """The settings of a config.

    Args:
        given: option, with or without dashes -> value.
        place: the folder that files which it names are relative to, or its parents.

    Raises:
        UsageError: another kind of model than Stable Diffusion.
    """
    given = {name.lstrip("-"): word_value(value) for name, value in given.items()}
    given = {name: value for name, value in given.items() if value not in (None, "")}
    family = str(given.pop("model_family", None) or "sdxl")
    if family not in _FAMILIES:
        raise UsageError(f"model_family {family}: Stable Diffusion 1, 2 and XL (sd1x, sd2x, sdxl) can be trained here")
    folder, backends = (given.pop(name, None) for name in ("instance_data_dir", "data_backend_config"))
    of_pictures = {name for name in given if name.startswith("validation_") and name not in _RENAMED}
    without_effect = _WITHOUT_EFFECT | of_pictures
    imported = ImportedConfig("SimpleTuner", defaults=_CHANGES_NOTHING, without_effect=without_effect)
    given = {**DEFAULTS, **given}
    imported.ours |= {"validation_fraction": 0.0, "model": _FAMILIES[family]}
    _take_method(imported, given, place)
    _take_optimizer(imported, given)
    _take_schedule(imported, given)
    _take_objective(imported, given)
    _take_length(imported, given)
    shared = {name: given.pop(name) for name in _OF_BACKENDS if name in given}
    imported.take(given, _RENAMED)
    if backends:
        _take_backends(imported, backends, shared, place)
    elif folder:
        take_sources(
            imported, [ForeignSource(str(folder), 1, _settings_of(imported, shared))], theirs="instance_data_dir"
        )
    return imported


_OF_BACKENDS = ("resolution", "resolution_type", "caption_strategy", "instance_prompt", "prepend_instance_prompt",
                "only_instance_prompt", "disable_multiline_split", "crop", "aspect_bucket_alignment")  # fmt: skip
"""Options of the run that a backend may have otherwise."""


def _take_method(imported: ImportedConfig, given: dict[str, Any], place: Path) -> None:
    """A LoRA of peft or LyCORIS, or all weights."""
    kind, lora_type = given.pop("model_type"), given.pop("lora_type", None) or "standard"
    lora = {name: given.pop(name) for name in ("lora_rank", "lora_alpha", "lora_dropout", "use_dora") if name in given}
    file, targets = given.pop("lycoris_config", None), given.pop("peft_lora_target_modules", None)
    imported.ours["method"] = "full" if kind == "full" else "lora"
    if kind not in ("full", "lora"):
        imported.skip("model_type", kind, "the kinds here: lora and full")
    if kind == "full":
        return
    targets = [targets] if isinstance(targets, str) else targets
    imported.ours["lora_target_modules"] = tuple(targets or ("to_k", "to_q", "to_v", "to_out.0"))
    if lora_type == "standard":
        imported.set("rank", lora["lora_rank"], "lora_rank")
        if lora.get("lora_alpha"):
            imported.set("lora_alpha", lora["lora_alpha"], "lora_alpha")
        imported.set("lora_dropout", lora["lora_dropout"], "lora_dropout")
        if lora.get("use_dora"):
            imported.ours["lora_type"] = "dora"
    elif (settings := _read(imported, file or "config/lycoris_config.json", "lycoris_config", place)) is not None:
        if not isinstance(settings, dict):
            raise UsageError(f"lycoris_config {file}: expected a table of arguments")
        take_lycoris(imported, without_nulls(settings))


def _take_optimizer(imported: ImportedConfig, given: dict[str, Any]) -> None:
    name, extra = str(given.pop("optimizer")), given.pop("optimizer_config", None)
    ours, arguments = _OPTIMIZERS.get(name, ("adamw", {}))
    if name not in _OPTIMIZERS:
        imported.skip("optimizer", name, f"there is no such optimizer here; {ours} is taken")
    imported.ours["optimizer"] = ours
    imported.set("learning_rate", given.pop("learning_rate"), "learning_rate")
    if ours == "prodigy_schedulefree":
        imported.ours["learning_rate"] = 1.0
    for theirs in ("adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon"):
        if theirs in given and ours in ("adamw", "adamw8bit"):
            arguments = {**arguments, {"adam_epsilon": "eps"}.get(theirs, theirs.removeprefix("adam_")): given[theirs]}
        given.pop(theirs, None)
    pairs = [part.partition("=") for part in str(extra or "").split(",") if "=" in part]
    take_arguments(imported, {**arguments, **{key: value for key, _, value in pairs}}, section="optimizer_config")
    norm, method = given.pop("max_grad_norm"), given.pop("grad_clip_method")
    if method == "norm":
        imported.set("max_grad_norm", norm, "max_grad_norm")
    else:
        imported.ours["max_grad_norm"] = 0.0
        imported.notes.append(f"SimpleTuner clips single values of the gradient at {norm:g}; here nothing is clipped")


def _take_schedule(imported: ImportedConfig, given: dict[str, Any]) -> None:
    """The schedule; cosine and sine go up and down with a period of the warm-up there."""
    name, end, power = given.pop("lr_scheduler"), given.pop("lr_end"), given.pop("lr_power")
    cycles = given.pop("lr_num_cycles", None)
    if "schedulefree" in imported.ours["optimizer"]:
        imported.ours["lr_scheduler"] = "constant"
        return
    ours = {"constant_with_warmup": "constant", "constant": "constant", "linear": "linear",
            "polynomial": "polynomial"}.get(name)  # fmt: skip
    if ours is None:
        ours = {"cosine_with_restarts": "cosine_with_restarts"}.get(name, "cosine")
        imported.skip("lr_scheduler", name, f"one that rises and falls again each lr_warmup_steps; {ours} is taken")
        given["lr_warmup_steps"] = 0
    if name == "constant":
        given["lr_warmup_steps"] = 0
    imported.ours["lr_scheduler"] = ours
    if ours == "polynomial":
        imported.set("lr_power", power, "lr_power")
    if ours in ("polynomial", "cosine", "cosine_with_restarts"):
        imported.set("lr_end", end, "lr_end")
    if ours == "cosine_with_restarts" and cycles:
        imported.set("lr_num_cycles", cycles, "lr_num_cycles")


def _take_objective(imported: ImportedConfig, given: dict[str, Any]) -> None:
    """Losses and noises, which have parameters that do nothing by themselves."""
    huber = {name: given.pop(name) for name in ("huber_schedule", "huber_c")}
    if given.get("loss_type") in ("huber", "smooth_l1"):
        for name, value in huber.items():
            imported.set(name, value, name)
    strength, share = given.pop("noise_offset"), given.pop("noise_offset_probability")
    if given.pop("offset_noise", False):
        imported.set("noise_offset", strength, "noise_offset")
        if share != 1:
            imported.skip("noise_offset_probability", share, "here every visit has the offset")
    if given.pop("diff2flow_enabled", False):
        imported.ours["prediction_type"] = "flow"
    ema = given.pop("ema_decay")
    if given.get("use_ema"):
        imported.set("ema_max_decay", ema, "ema_decay")


def _take_length(imported: ImportedConfig, given: dict[str, Any]) -> None:
    """Steps or epochs; 0 stands for the other one."""
    steps, epochs = given.pop("max_train_steps", None), given.pop("num_train_epochs", None)
    if steps:
        imported.set("max_train_steps", steps, "max_train_steps")
    else:
        imported.set("num_train_epochs", epochs or 1, "num_train_epochs")


def _take_backends(imported: ImportedConfig, file: Any, shared: Mapping[str, Any], place: Path) -> None:
    """The folders of the data backends that hold images."""
    sources = []
    backends = without_nulls(_read(imported, file, "data_backend_config", place) if isinstance(file, str) else file)
    if not isinstance(backends or [], list) or not all(isinstance(backend, dict) for backend in backends or []):
        raise UsageError(f"data_backend_config {file}: expected a list of data backends")
    for backend in backends or []:
        if backend.get("dataset_type", "image") != "image" or backend.get("disabled"):
            if backend.get("dataset_type") in ("conditioning", "video", "eval"):
                imported.skip(f"{backend.get('id')}.dataset_type", backend["dataset_type"], "images alone are trained")
            continue
        data = backend.get("instance_data_dir") or backend.get("dataset_name")
        if backend.get("type", "local") not in ("local", "huggingface", "parquet") or not data:
            imported.skip(f"{backend.get('id')}.type", backend.get("type"), "folders and datasets are trained on")
            continue
        settings = _settings_of(imported, {**shared, **backend})
        sources.append(ForeignSource(str(data), 1 + int(backend.get("repeats") or 0), settings))
    take_sources(imported, sources, theirs="instance_data_dir")


def _settings_of(imported: ImportedConfig, backend: Mapping[str, Any]) -> dict[str, Any]:
    """The options of one backend; its other entries are listed."""
    name = str(backend.get("id") or "data_backend")
    settings: dict[str, Any] = {}
    strategy = backend.get("caption_strategy", "filename")
    sources = {"filename": "filename", "instanceprompt": "prompt", "textfile": "files", "parquet": "files",
               "huggingface": "files"}  # fmt: skip
    if strategy in sources:
        settings["caption_source"] = "prompt" if backend.get("only_instance_prompt") else sources[strategy]
    else:
        imported.skip(f"{name}.caption_strategy", strategy, f"those here: {', '.join(sources)}")
    if strategy == "textfile" and not backend.get("disable_multiline_split"):
        settings["caption_lines"] = "chosen"
    if prompt := backend.get("instance_prompt"):
        alone = settings.get("caption_source") == "prompt"
        if alone or backend.get("prepend_instance_prompt"):
            settings["prompt" if alone else "caption_prefix"] = str(prompt)
    _take_size(imported, settings, backend, name)
    if backend.get("is_regularisation_data") or backend.get("is_regularization_data"):
        settings["class_images"] = imported.ours["prior_prediction"] = True
    neutral = {"probability": 1.0, "minimum_image_size": 0, "crop_aspect": "square", "metadata_backend": "discovery"}
    for entry, value in backend.items():
        if entry in _OF_A_BACKEND or value in (None, False, "", 0, neutral.get(entry)):
            continue
        imported.skip(f"{name}.{entry}", value)
    return settings


_OF_A_BACKEND = (
    *_OF_BACKENDS, "id", "type", "instance_data_dir", "dataset_type", "repeats", "crop_style", "crop_aspect",
    "cache_dir_vae", "cache_dir", "text_embeds", "image_embeds", "vae_cache_clear_each_epoch", "default",
    "dataset_name", "preserve_data_backend_cache", "skip_file_discovery", "metadata_backend", "hash_filenames",
    "disabled", "is_regularisation_data", "is_regularization_data", "maximum_image_size", "target_downsample_size",
    "write_batch_size", "ignore_epochs",
)  # fmt: skip
"""Entries of a backend that are taken, or say where something is kept; large images are scaled down here anyway."""


def _take_size(imported: ImportedConfig, settings: dict[str, Any], backend: Mapping[str, Any], name: str) -> None:
    """The resolution and how images are cut to it: to squares, or near their own aspect."""
    kind, size = backend.get("resolution_type", "pixel_area"), word_value(backend.get("resolution", 1024))
    cropped = bool(backend.get("crop")) and backend.get("crop_aspect", "square") == "square"
    if isinstance(size, int | float):
        settings["resolution"] = round((size * 1_000_000) ** 0.5 / 64) * 64 if kind == "area" else int(size)
    if kind == "pixel" and not cropped:
        imported.skip(
            f"{name}.resolution_type", kind, "the area of the square of this side is taken, not the short side"
        )
    if cropped:
        imported.ours["aspect_ratio_bucketing"] = False
    elif alignment := backend.get("aspect_bucket_alignment"):
        imported.set("bucket_reso_steps", alignment, f"{name}.aspect_bucket_alignment")
    if backend.get("crop") and backend.get("crop_style") == "random":
        settings["center_crop"] = False


def _read(imported: ImportedConfig, file: Any, option: str, place: Path) -> Any:
    """The contents of a JSON file that the config names, relative to where it was started."""
    for folder in (Path(), place, *place.resolve().parents):
        if (path := folder / str(file)).is_file():
            try:
                return json.loads(path.read_text(encoding="utf-8-sig"))
            except ValueError as error:
                raise UsageError(f"{option} {path} is not valid JSON: {error}") from error
    imported.skip(option, file, "no such file here")
    return None


def _if_on(option: str, value: Any, theirs: str) -> Callable[[ImportedConfig, Any], None]:
    return lambda imported, on: imported.set(option, value, theirs) if on else None


def _model(imported: ImportedConfig, value: Any) -> None:
    imported.set("model", value, "pretrained_model_name_or_path")


def _trackers(imported: ImportedConfig, value: Any) -> None:
    names = [name for name in str(value or "").split(",") if name]
    if names:
        imported.set("report_to", ["tensorboard", "wandb"] if names == ["all"] else names, "report_to")


def _base_precision(imported: ImportedConfig, value: Any) -> None:
    if value != "no_change":
        imported.skip("base_model_precision", value, "the frozen base is kept in bf16 here")


def _text_encoder(imported: ImportedConfig, on: Any) -> None:
    if on:
        imported.notes.append("SimpleTuner trained the text encoder too; here it stays frozen")


def _lora_init(imported: ImportedConfig, value: Any) -> None:
    if value == "pissa":
        imported.set("init_lora_weights", "pissa", "lora_init_type")
    elif value not in (None, True, "default", "gaussian"):
        imported.skip("lora_init_type", value, "an adapter starts at zero here, or with pissa")


def _of_the_hub(imported: ImportedConfig, value: Any) -> None:
    if imported.ours.get("push_to_hub") and value:
        imported.set("hub_model_id", value, "hub_model_id")


_RENAMED: Renamed = {
    "pretrained_model_name_or_path": _model, "pretrained_vae_model_name_or_path": "vae", "output_dir": "output_dir",
    "train_batch_size": "train_batch_size", "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_checkpointing": "gradient_checkpointing", "mixed_precision": "mixed_precision",
    "lr_warmup_steps": "lr_warmup_steps", "caption_dropout_probability": "caption_dropout", "seed": "seed",
    "checkpoint_step_interval": "checkpointing_steps", "checkpointing_steps": "checkpointing_steps",
    "checkpoints_total_limit": "checkpoints_total_limit", "validation_step_interval": "sample_every",
    "validation_steps": "sample_every", "num_validation_images": "eval_batch_size",
    "validation_prompt": lambda imported, value: imported.set("sample_prompts", [str(value)], "validation_prompt"),
    "validation_num_inference_steps": "num_inference_steps", "validation_guidance": "guidance_scale",
    "snr_gamma": "snr_gamma", "prediction_type": "prediction_type", "loss_type": "loss_type",
    "rescale_betas_zero_snr": _if_on("zero_terminal_snr", True, "rescale_betas_zero_snr"),
    "input_perturbation": "input_perturbation", "use_ema": "use_ema", "init_lora": "init_lora",
    "lora_init_type": _lora_init,
    "push_to_hub": "push_to_hub", "hub_model_id": _of_the_hub, "report_to": _trackers,
    "base_model_precision": _base_precision, "train_text_encoder": _text_encoder,
}  # fmt: skip
_WITHOUT_EFFECT = frozenset(
    ("resume_from_checkpoint", "aspect_bucket_rounding", "disable_benchmark", "disable_bucket_pruning",
     "model_flavour", "maximum_image_size", "target_downsample_size", "vae_batch_size", "lora_format", "vae_dtype",
     "tracker_project_name", "tracker_run_name", "push_checkpoints_to_hub", "logging_dir", "cache_dir",
     "cache_dir_text", "cache_dir_vae", "text_encoder_limit", "save_text_encoder", "attention_mechanism",
     "base_model_default_dtype", "write_batch_size", "read_batch_size", "image_processing_batch_size", "max_workers",
     "aspect_bucket_worker_count", "ema_device", "ema_cpu_only", "ema_validation",
     "ema_update_interval", "evaluation_type", "preserve_data_backend_cache", "skip_file_discovery",
     "metadata_update_interval", "compress_disk_cache", "vae_cache_ondemand", "keep_vae_loaded", "quantize_via",
     "offload_during_startup", "user_prompt_library", "model_card_private", "model_card_safe_for_work",
     "model_card_note", "num_eval_images", "eval_steps_interval", "disable_tf32", "webhook_config",
     "webhook_reporting_interval", "i_know_what_i_am_doing", "num_processes", "pretrained_transformer_subfolder",
     "pretrained_unet_subfolder", "dynamo_backend")
)  # fmt: skip
"""Options that change nothing of what is learned here: caches, workers, cards, and parts of other models."""
_CHANGES_NOTHING: Mapping[str, Collection[Any]] = {
    "training_scheduler_timestep_spacing": ("trailing",), "inference_scheduler_timestep_spacing": ("trailing",),
    "timestep_bias_strategy": ("none",), "data_backend_sampling": ("auto-weighting", "uniform"),
    "peft_lora_mode": ("standard",), "gradient_checkpointing_backend": ("torch",), "masked_loss_probability": (1.0,),
    "freeze_encoder_strategy": ("after",), "layer_freeze_strategy": ("none",),
}  # fmt: skip
