"""The options of sd-scripts: our name for each, and conversions for those that need one."""

from collections.abc import Collection, Mapping
from typing import Any

from finetune.commands.foreign.imported_config import ImportedConfig, Renamed, dropout, no_resume, square, word_value
from finetune.commands.foreign.optimizer_arguments import take_arguments
from finetune.optimizer_table import OPTIMIZERS

_OPTIMIZERS = {
    "adamw": "adamw", "adamw8bit": "adamw8bit", "pagedadamw8bit": "adamw8bit", "pagedadamw": "adamw",
    "adafactor": "adafactor", "prodigy": "prodigy", "sgdnesterov": "sgd", "sgdnesterov8bit": "sgd",
    "lion": "lion", "lion8bit": "lion", "pagedlion8bit": "lion", "ademamix8bit": "bitsandbytes.optim:AdEMAMix8bit",
    "adamwschedulefree": "schedulefree_adamw", "sgdschedulefree": "schedulefree_sgd",
    "radamschedulefree": "pytorch_optimizer:ScheduleFreeRAdam",
    "pytorchoptimizer.came": "came", "pytorchoptimizer.adopt": "adopt", "pytorchoptimizer.ademamix": "ademamix",
    "pytorchoptimizer.soap": "soap", "pytorchoptimizer.stableadamw": "stableadamw", "pytorchoptimizer.lion": "lion",
    "prodigyplus.prodigyplusschedulefree": "prodigy_schedulefree",
    "prodigyplus.prodigyplusschedulefree.prodigyplusschedulefree": "prodigy_schedulefree",
}  # fmt: skip
_ANOTHER = {"paged": "it is not paged", "sgdnesterov8": "its moments are in 32 bits",
            "lion8": "its moments are in 32 bits", "adafactor": "it is torch's"}  # fmt: skip
"""Beginnings of optimizers whose like here is not quite the same -> what is otherwise."""
_SCHEDULES = {
    "constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine",
    "cosine_with_restarts": "cosine_with_restarts", "polynomial": "polynomial", "inverse_sqrt": "inverse_sqrt",
    "cosine_with_min_lr": "cosine", "warmup_stable_decay": "wsd",
}  # fmt: skip
_OF_SCHEDULES = ("lr_scheduler_num_cycles", "lr_scheduler_power", "lr_scheduler_min_lr_ratio", "lr_decay_steps")
"""Options that only some schedules have."""

WITHOUT_EFFECT = frozenset(
    ("cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk",
     "vae_batch_size", "skip_cache_check", "xformers", "sdpa", "mem_eff_attn", "torch_compile", "dynamo_backend",
     "save_model_as", "save_precision", "save_state", "save_state_on_train_end", "save_last_n_epochs",
     "save_last_n_steps", "save_last_n_epochs_state", "save_last_n_steps_state", "save_n_epoch_ratio",
     "logging_dir", "log_prefix", "log_tracker_name", "log_tracker_config", "log_config", "wandb_run_name",
     "console_log_level", "console_log_simple", "debug_dataset", "training_comment", "no_metadata", "metadata_title",
     "metadata_author", "metadata_description", "metadata_license", "metadata_tags", "tokenizer_cache_dir",
     "text_encoder_lr", "text_encoder_lr1", "text_encoder_lr2", "learning_rate_te", "learning_rate_te1",
     "learning_rate_te2", "stop_text_encoder_training", "sample_sampler", "sample_at_first", "v2", "lowram", "highvram",
     "no_half_vae", "disable_mmap_load_safetensors", "persistent_data_loader_workers", "ddp_timeout",
     "ddp_gradient_as_bucket_view", "ddp_static_graph", "num_cpu_threads_per_process", "num_processes", "num_machines",
     "multi_gpu", "gpu_ids", "main_process_port", "model_list", "no_token_padding", "train_mode", "output_config",
     "dataset_class", "huggingface_path_in_repo", "huggingface_repo_type",
     "wandb_api_key", "huggingface_token", "use_safetensors", "text_encoder_batch_size", "cache_info", "async_upload")
)  # fmt: skip
"""Options that change nothing of what is learned here: caches, attention, files, logs, and the text encoder's."""
CHANGES_NOTHING: Mapping[str, Collection[Any]] = {
    "noise_offset_type": ("Original",),
    "caption_extension": (".txt", ".caption"),
    "huber_scale": (1,), "keep_tokens": (0,), "adaptive_noise_scale": (0,), "caption_extention": (".txt", ".caption"),
}  # fmt: skip
"""Options without a like here -> values that are their defaults, or change nothing of what is learned."""


def _optimizer(imported: ImportedConfig, value: Any) -> None:
    name = str(value).lower().replace("_", "")
    optimizer = _OPTIMIZERS.get(name) or _OPTIMIZERS.get(name.removeprefix("torch.optim."))
    if optimizer is None and "." in str(value):  # a class by its import path
        module, _, kind = str(value).rpartition(".")
        optimizer = f"{module}:{kind}"
    if optimizer is None:
        imported.skip("optimizer_type", value, f"the optimizers here: {', '.join(OPTIMIZERS)}")
        return
    imported.ours["optimizer"] = optimizer
    for begin, difference in _ANOTHER.items():
        if name.startswith(begin):
            imported.notes.append(f"{value} became {optimizer}: {difference}")


def take_optimizer_arguments(imported: ImportedConfig, value: Any) -> None:
    """Arguments of the optimizer's class, once the optimizer is known."""
    words = value if isinstance(value, list) else str(value).split()
    pairs = [str(word).partition("=") for word in words]
    take_arguments(imported, {name: text for name, _, text in pairs}, section="optimizer_args")


def take_warmup(imported: ImportedConfig, value: Any) -> None:
    value = word_value(str(value))
    if not isinstance(value, int | float):
        imported.skip("lr_warmup_steps", value)
        return
    imported.set("lr_warmup_steps", value, "lr_warmup_steps")


def take_schedule(imported: ImportedConfig, given: dict[str, Any]) -> None:
    """The schedule with its options; others do nothing there, and are refused here."""
    values = {name: word_value(given.pop(name, None)) for name in _OF_SCHEDULES}
    name = given.pop("lr_scheduler", None)
    if "schedulefree" in imported.ours.get("optimizer", "").lower():  # theirs has no schedule then
        imported.ours["lr_scheduler"] = "constant"
        return
    if given.get("lr_scheduler_type"):  # which wins there
        imported.skip(
            "lr_scheduler_type", given.pop("lr_scheduler_type"), "give --lr_scheduler package.module:function"
        )
        return
    if name is None:
        return
    ours = _SCHEDULES.get(name)
    if ours is None:
        imported.skip("lr_scheduler", name, "there is no such schedule here; constant is taken")
        ours = "constant"
    imported.ours["lr_scheduler"] = ours
    if ours == "cosine_with_restarts" and values["lr_scheduler_num_cycles"]:
        imported.set("lr_num_cycles", values["lr_scheduler_num_cycles"], "lr_scheduler_num_cycles")
    if ours == "polynomial" and values["lr_scheduler_power"]:
        imported.set("lr_power", values["lr_scheduler_power"], "lr_scheduler_power")
    if ours == "wsd" and values["lr_decay_steps"]:
        imported.set("lr_decay_steps", values["lr_decay_steps"], "lr_decay_steps")
    if name in ("cosine_with_min_lr", "warmup_stable_decay") and values["lr_scheduler_min_lr_ratio"]:
        rate = imported.ours.get("learning_rate", 2e-6)  # sd-scripts' default
        imported.set("lr_end", values["lr_scheduler_min_lr_ratio"] * rate, "lr_scheduler_min_lr_ratio")


def _velocity(imported: ImportedConfig, value: Any) -> None:
    if value:
        imported.set("prediction_type", "v_prediction", "v_parameterization")


def _clip_skip(imported: ImportedConfig, value: Any) -> None:
    if value != 1:  # their neutral value; for XL, which takes the last layer but one, it would be another here
        imported.set("clip_skip", value, "clip_skip")


def _full_bf16(imported: ImportedConfig, value: Any) -> None:
    if value and imported.ours["method"] == "lora":
        imported.skip("full_bf16", value, "a LoRA keeps its few weights in fp32 here, and the rest in bf16 anyway")
    elif value:
        imported.set("full_bf16", True, "full_bf16")


def _fused_backward_pass(imported: ImportedConfig, value: Any) -> None:
    if value:
        imported.skip("fused_backward_pass", value, "here with --full_bf16, without clipping, and one image at a time")


def _random_crop(imported: ImportedConfig, value: Any) -> None:
    imported.set("center_crop", not value, "random_crop")


def take_buckets(imported: ImportedConfig, given: dict[str, Any]) -> None:
    """Their switch and its sides, which do nothing without it; small pictures are enlarged there unless they say no."""
    sides = {"min_bucket_reso": 256, "max_bucket_reso": 1024, "bucket_reso_steps": 64}
    sides |= {name: given.pop(name) for name in sides if name in given}
    upscale = not given.pop("bucket_no_upscale", False)
    imported.ours["aspect_ratio_bucketing"] = bool(given.pop("enable_bucket", False))
    if imported.ours["aspect_ratio_bucketing"]:
        for name, value in {**sides, "bucket_upscale": upscale}.items():
            imported.set(name, value, name)


def take_captions(imported: ImportedConfig, given: dict[str, Any]) -> None:
    """Their options of captions; those of tags do nothing there, and are refused here, where no tags are moved."""
    imported.ours["shuffle_caption"] = bool(given.pop("shuffle_caption", False))
    if share := word_value(given.pop("caption_tag_dropout_rate", 0)):
        imported.set("caption_tag_dropout", share, "caption_tag_dropout_rate")
    if warmup := word_value(given.pop("token_warmup_step", 0)):
        imported.set("token_warmup_step", warmup, "token_warmup_step")
        imported.set("token_warmup_min", given.pop("token_warmup_min", 1), "token_warmup_min")
    given.pop("token_warmup_min", None)
    of_tags = {name: given.pop(name, None) for name in ("keep_tokens", "keep_tokens_separator", "caption_separator")}
    if imported.ours["shuffle_caption"] or {"caption_tag_dropout", "token_warmup_step"} & imported.ours.keys():
        for name, value in of_tags.items():
            if value:
                imported.set(name, value, name)
    if every := word_value(given.pop("caption_dropout_every_n_epochs", 0)):
        imported.set("caption_dropout_every_n_epochs", every, "caption_dropout_every_n_epochs")
    imported.ours["caption_lines"] = "first"
    if word_value(given.pop("enable_wildcard", False)):
        imported.ours |= {"caption_lines": "chosen", "enable_wildcard": True}
    for name in ("caption_prefix", "caption_suffix", "secondary_separator"):
        if value := given.pop(name, None):
            imported.set(name, value, name)


def take_objective(imported: ImportedConfig, given: dict[str, Any]) -> None:
    """Options that do nothing there, and are refused here, without another one that they belong to."""
    velocity = bool(word_value(given.get("v_parameterization", False)))
    if not velocity and word_value(given.pop("scale_v_pred_loss_like_noise_pred", False)):
        imported.notes.append("scale_v_pred_loss_like_noise_pred does nothing without v_parameterization")
    if not velocity and (zero := word_value(given.pop("zero_terminal_snr", False))):
        imported.skip(
            "zero_terminal_snr", zero, "at zero terminal SNR the noise tells nothing; it needs v_parameterization"
        )
    if given.get("loss_type", "l2") not in ("huber", "smooth_l1"):
        for name in ("huber_schedule", "huber_c"):
            given.pop(name, None)
    for name, needed in (
        ("multires_noise_discount", "multires_noise_iterations"),
        ("noise_offset_random_strength", "noise_offset"),
        ("ip_noise_gamma_random_strength", "ip_noise_gamma"),
    ):
        if not word_value(given.get(needed) or 0):
            given.pop(name, None)


def _switch(name: str) -> Any:
    return lambda imported, on: imported.set(name, True, name) if on else None


def _network_module(imported: ImportedConfig, value: Any) -> None:
    if value not in ("networks.lora", "lycoris.kohya"):
        imported.skip("network_module", value, "networks.lora and lycoris.kohya have their like here")


def _trackers(imported: ImportedConfig, value: Any) -> None:
    imported.set("report_to", ["tensorboard", "wandb"] if value == "all" else [value], "log_with")


def _max_token_length(imported: ImportedConfig, value: Any) -> None:
    imported.set("max_token_length", 77 if value == 75 else value, "max_token_length")


def _prompts(imported: ImportedConfig, value: Any) -> None:
    imported.set("sample_prompts", [str(value)], "sample_prompts")


_METADATA = "captions were in it: have them in .txt files, or in metadata.jsonl with file_name and text"

RENAMED: Renamed = {
    "pretrained_model_name_or_path": "model", "train_data_dir": "data", "vae": "vae",
    "vae_custom_scale": "vae_scale", "vae_custom_shift": "vae_shift",  # of a fork for EQ-VAEs and flow matching
    "vae_reflection_padding": "vae_reflection_padding", "flow_uniform_static_ratio": "flow_shift",
    "reg_data_dir": "class_data", "prior_loss_weight": "prior_loss_weight",
    "train_batch_size": "train_batch_size", "max_train_steps": "max_train_steps",
    "max_train_epochs": "num_train_epochs", "seed": "seed", "dataset_repeats": "repeats",
    "gradient_accumulation_steps": "gradient_accumulation_steps", "gradient_checkpointing": "gradient_checkpointing",
    "mixed_precision": "mixed_precision", "full_bf16": _full_bf16,
    "fused_backward_pass": _fused_backward_pass, "learning_rate": "learning_rate",
    "network_dim": "rank", "network_alpha": "lora_alpha", "network_dropout": dropout, "network_weights": "init_lora",
    "zero_terminal_snr": _switch("zero_terminal_snr"), "debiased_estimation_loss": _switch("debiased_estimation"),
    "scale_v_pred_loss_like_noise_pred": _switch("scale_v_pred_loss_like_noise_pred"), "loss_type": "loss_type",
    "huber_schedule": "huber_schedule", "huber_c": "huber_c", "min_timestep": "min_timestep",
    "weighted_captions": _switch("weighted_captions"), "max_timestep": "max_timestep",
    "multires_noise_iterations": "multires_noise_iterations",
    "multires_noise_discount": "multires_noise_discount",
    "min_snr_gamma": "snr_gamma", "noise_offset": "noise_offset", "ip_noise_gamma": "input_perturbation",
    "noise_offset_random_strength": "noise_offset_random_strength",
    "ip_noise_gamma_random_strength": "input_perturbation_random_strength",
    "max_grad_norm": "max_grad_norm", "clip_skip": _clip_skip, "alpha_mask": "masked_loss", "flip_aug": "random_flip",
    "caption_dropout_rate": "caption_dropout", "max_data_loader_n_workers": "dataloader_num_workers",
    "save_every_n_steps": "checkpointing_steps", "save_every_n_epochs": "save_model_epochs",
    "sample_every_n_steps": "sample_every", "sample_every_n_epochs": "save_image_epochs", "resolution": square,
    "sample_prompts": _prompts, "optimizer_type": _optimizer, "lr_warmup_steps": take_warmup,
    "flow_model": lambda imported, on: imported.set("prediction_type", "flow", "flow_model") if on else None,
    "flow_logit_mean": "logit_mean", "flow_logit_std": "logit_std", "flow_timestep_distribution": "timestep_sampling",
    "v_parameterization": _velocity, "random_crop": _random_crop, "log_with": _trackers,
    "max_token_length": _max_token_length, "network_module": _network_module,
    "network_train_unet_only": lambda imported, value: None, "resume": no_resume,
    "use_8bit_adam": lambda imported, value: imported.set("optimizer", "adamw8bit", "use_8bit_adam") if value else None,
    "in_json": lambda imported, value: imported.skip("in_json", value, _METADATA),
    "metadata_file": lambda imported, value: imported.skip("metadata_file", value, _METADATA),
}  # fmt: skip
