"""Import from job files of ai-toolkit (YAML or JSON): its options and defaults as of version 0.12."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from finetune.commands.foreign.imported_config import ImportedConfig, Renamed, without_nulls, word_value
from finetune.commands.foreign.optimizer_arguments import take_arguments
from finetune.commands.foreign.sources import ForeignSource, take_sources
from finetune.data.captions import TRIGGER, with_trigger
from finetune.errors import UsageError

DEFAULTS: Mapping[str, Any] = {
    "max_train_steps": 1000, "train_batch_size": 1, "lr_scheduler": "constant", "lr_warmup_steps": 0,
    "gradient_checkpointing": True, "mixed_precision": "no", "caption_dropout": 0.0, "validation_fraction": 0.0,
    "sample_every": 100, "checkpointing_steps": 1000, "checkpoints_total_limit": 5, "gradient_accumulation_steps": 1,
    "use_ema": False,
}  # fmt: skip
"""What ai-toolkit takes where a file says nothing, and we would not (`toolkit/config_modules.py`)."""
_ARCHITECTURES = ("sd1", "sd2", "sdxl", "ssd", "vega")
_KINDS = {"lora": "lora", "locon": "lora", "dora": "dora", "lokr": "lokr"}
_EVERY_LINEAR = ("attn-mlp", "conv_shortcut", "time_emb_proj", "linear_1", "linear_2")
"""The layers that it adapts: every linear layer and 1 x 1 convolution of the UNet (`toolkit/lora_special.py`)."""
_OPTIMIZERS = {
    "adamw": "adamw", "adamw8bit": "adamw8bit", "adamw8": "adamw8bit", "adam": "torch.optim:Adam",
    "adam8bit": "bitsandbytes.optim:Adam8bit", "ademamix8bit": "bitsandbytes.optim:AdEMAMix8bit",
    "lion": "lion", "lion8bit": "bitsandbytes.optim:Lion8bit", "adagrad": "torch.optim:Adagrad",
    "adafactor": "adafactor", "prodigy": "prodigy", "prodigy8bit": "prodigy",
}  # fmt: skip
_SCHEDULES = {"constant": "constant", "constant_with_warmup": "constant", "cosine": "cosine",
              "cosine_with_restarts": "cosine"}  # fmt: skip
"""Theirs -> ours; their restarts come after as many steps as the run has."""
_DTYPES = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16", "fp32": "no", "float32": "no",
           "float": "no"}  # fmt: skip
_LOSSES = {"mse": "l2", "mae": "l1"}


def is_job(given: Any) -> bool:
    """Whether the contents of a file are a job of ai-toolkit."""
    return isinstance(given, dict) and "job" in given and isinstance(given.get("config"), dict)


def take(given: Mapping[str, Any]) -> ImportedConfig:
    """The settings of a job.

    Raises:
        UsageError: it does not train, or trains another kind of model than Stable Diffusion.
    """
    ours = dict(DEFAULTS)
    imported = ImportedConfig("ai-toolkit", ours=ours, defaults=_CHANGES_NOTHING, without_effect=_WITHOUT_EFFECT)
    config = without_nulls(given["config"])
    process, *more = config.get("process") or [{}]
    for other in more:
        imported.skip("process", other.get("type"), "a job of one process is taken")
    tables = {name: process.get(name) or {} for name in ("model", "network", "train", "save", "sample", "logging")}
    _refuse_other_models(process, tables["model"])
    if name := config.get("name"):
        ours["output_dir"] = f"{str(process.get('training_folder') or 'output').rstrip('/')}/{name}"
    if trigger := process.get("trigger_word"):
        imported.set("trigger", trigger, "trigger_word")
    imported.take(tables["model"], _MODEL, section="model")
    _take_network(imported, tables["network"])
    train = dict(tables["train"])
    _take_optimizer(imported, train)
    _take_schedule(imported, train)
    imported.take(train, _TRAIN, section="train")
    class_weight = float(train.get("reg_weight", 1.0))
    take_sources(imported, _sources_of(imported, process.get("datasets") or [], class_weight), theirs="folder_path")
    imported.take(tables["save"], _SAVE, section="save")
    _take_samples(imported, tables["sample"], trigger)
    if train.get("disable_sampling"):
        ours["sample_every"] = 0
    imported.take(tables["logging"], _LOGGING, section="logging")
    taken = (*tables, "type", "training_folder", "trigger_word", "datasets")
    imported.take({name: value for name, value in process.items() if name not in taken}, {})
    return imported


def _refuse_other_models(process: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    if process.get("type") not in ("sd_trainer", "diffusion_trainer", "ui_trainer"):
        raise UsageError(f"process type {process.get('type')}: expected sd_trainer or diffusion_trainer")
    architecture = str(model.get("arch") or "sd1").partition(":")[0]
    others = sorted(name for name, on in model.items() if name.startswith("is_") and on is True)
    others = [name for name in others if name not in ("is_xl", "is_v2", "is_v_pred", "is_ssd", "is_vega")]
    if architecture not in _ARCHITECTURES or others:
        found = others[0] if others else f"arch {architecture}"
        raise UsageError(f"model {found}: Stable Diffusion 1, 2 and XL can be trained here")


def _take_network(imported: ImportedConfig, network: Mapping[str, Any]) -> None:
    """A LoRA or LoKr of every layer, or none: all weights are trained."""
    imported.ours["method"] = "lora" if network else "full"
    if not network:
        return
    kind = str(network.get("type", "lora")).lower()
    if kind not in _KINDS:
        imported.skip("network.type", kind, f"the kinds here: {', '.join(dict.fromkeys(_KINDS.values()))}")
    kind = imported.ours["lora_type"] = _KINDS.get(kind, "lora")
    rank = next((network[name] for name in ("rank", "linear") if network.get(name) is not None), 4)
    alpha, conv = network.get("linear_alpha", network.get("alpha", 1.0)), network.get("conv")
    conv_alpha = network.get("conv_alpha", conv)
    if kind == "lokr" and network.get("lokr_full_rank", True):  # the larger factor is whole, and alpha has no effect
        rank = alpha = conv = conv_alpha = 10_000
    imported.set("rank", rank, "network.linear")
    imported.set("lora_alpha", alpha, "network.linear_alpha")
    imported.ours["lora_target_modules"] = (*_EVERY_LINEAR, *(("conv_in", "conv_out") if conv else ()))
    if conv:
        imported.set("conv_rank", conv, "network.conv")
        imported.set("conv_alpha", conv_alpha, "network.conv_alpha")
    if kind == "lokr" and network.get("lokr_factor", -1) > 0:
        imported.set("lokr_factor", network["lokr_factor"], "network.lokr_factor")
    dropout: Renamed = {} if kind == "lokr" else {"dropout": "lora_dropout"}
    left = {name: value for name, value in network.items() if name not in (*_OF_THE_NETWORK, "network_kwargs")}
    imported.take(left, {**dropout, "pretrained_lora_path": "init_lora"}, section="network")
    imported.take(network.get("network_kwargs") or {}, {}, section="network.network_kwargs")


_OF_THE_NETWORK = ("type", "rank", "linear", "alpha", "linear_alpha", "conv", "conv_alpha", "lokr_full_rank",
                   "lokr_factor")  # fmt: skip


def _take_optimizer(imported: ImportedConfig, train: dict[str, Any]) -> None:
    """The optimizer with its arguments and rate (`toolkit/optimizer.py`: Adam's epsilon is 1e-6)."""
    name = str(train.pop("optimizer", "adamw")).lower()
    if name not in _OPTIMIZERS:
        imported.skip("train.optimizer", name, "there is no such optimizer here; adamw is taken")
    ours = imported.ours["optimizer"] = _OPTIMIZERS.get(name, "adamw")
    rates = [train.pop("unet_lr", None), train.pop("lr", None)]
    rate = next((word_value(rate) for rate in rates if rate is not None), 1e-6)
    if ours == "prodigy" and rate < 0.1:
        rate = 1.0  # so it is there, too
    imported.set("learning_rate", rate, "train.lr")
    arguments = dict(train.pop("optimizer_params", None) or {})
    if name in _OPTIMIZERS and ours in ("adamw", "adamw8bit", "prodigy"):
        arguments = {"eps": 1e-6, **({"weight_decay": 0.0} if ours == "prodigy" else {}), **arguments}
    take_arguments(imported, arguments, section="train.optimizer_params")


def _take_schedule(imported: ImportedConfig, train: dict[str, Any]) -> None:
    name = str(train.pop("lr_scheduler", "constant"))
    settings = dict(train.pop("lr_scheduler_params", None) or {})
    warmup = settings.pop("num_warmup_steps", 1000) if name == "constant_with_warmup" else 0
    if name not in _SCHEDULES:
        imported.skip("train.lr_scheduler", name, "there is no such schedule here; constant is taken")
    imported.ours["lr_scheduler"] = _SCHEDULES.get(name, "constant")
    if warmup:
        imported.set("lr_warmup_steps", warmup, "train.lr_scheduler_params.num_warmup_steps")
    if imported.ours["lr_scheduler"] == "cosine" and (lowest := word_value(settings.pop("eta_min", 0))):
        imported.set("lr_end", lowest, "train.lr_scheduler_params.eta_min")
    for option, value in settings.items():
        imported.skip(f"train.lr_scheduler_params.{option}", value)


def _sources_of(
    imported: ImportedConfig, datasets: Sequence[Mapping[str, Any]], class_weight: float
) -> list[ForeignSource]:
    """The folders; one with several resolutions is trained at each of them."""
    sources = []
    for dataset in datasets:
        if not (dataset.get("folder_path") or dataset.get("dataset_path")):
            imported.skip("datasets.folder_path", None, "a dataset without a folder")
            continue
        settings = _settings_of(imported, dataset, class_weight)
        sides = dataset.get("resolution", 512)
        # Their flipped images are added to the others; here half of the visits are mirrored.
        repeats = int(dataset.get("num_repeats", 1)) * (2 if dataset.get("flip_x") else 1)
        place = str(dataset.get("folder_path") or dataset.get("dataset_path"))
        sources += [
            ForeignSource(place, repeats, settings | {"resolution": int(side)})
            for side in (sides if isinstance(sides, list) else [sides])
        ]
    return sources


def _settings_of(imported: ImportedConfig, dataset: Mapping[str, Any], class_weight: float) -> dict[str, Any]:
    settings = ImportedConfig("ai-toolkit", defaults=_CHANGES_NOTHING, without_effect=_WITHOUT_EFFECT)
    extension = str(dataset.get("caption_ext") or "txt").removeprefix(".")
    if extension not in ("txt", "caption"):
        settings.skip("datasets.caption_ext", extension, "captions are read from .txt and .caption files")
    left = {name: value for name, value in dataset.items() if name not in _OF_THE_FOLDER}
    settings.take(left, _DATASET, section="datasets")
    imported.skipped |= settings.skipped
    if dataset.get("buckets") is False:
        imported.ours["aspect_ratio_bucketing"] = False
    ours = settings.ours
    if ours.get("caption_tag_dropout") and dataset.get("keep_tokens"):
        ours["keep_tokens"] = int(dataset["keep_tokens"])
    weight = float(dataset.get("loss_multiplier", 1.0)) * (class_weight if dataset.get("is_reg") else 1.0)
    if dataset.get("is_reg"):
        ours["class_images"] = True
    return ours | ({"loss_weight": weight} if weight != 1 else {})


_OF_THE_FOLDER = ("folder_path", "dataset_path", "resolution", "num_repeats", "caption_ext", "caption_type",
                  "keep_tokens", "is_reg", "loss_multiplier", "buckets")  # fmt: skip


def _take_samples(imported: ImportedConfig, sample: Mapping[str, Any], trigger: str | None) -> None:
    """The prompts of sample grids; their sizes and seeds change nothing of what is learned."""
    prompts = [item.get("prompt") for item in sample.get("samples") or []] or sample.get("prompts") or []
    prompts = [with_trigger(text, trigger) if TRIGGER in text else text for text in prompts if text]
    if prompts:
        imported.ours["sample_prompts"] = tuple(prompts)
    for theirs, ours in {
        "sample_every": "sample_every",
        "guidance_scale": "guidance_scale",
        "sample_steps": "num_inference_steps",
    }.items():
        if sample.get(theirs) is not None:
            imported.set(ours, sample[theirs], f"sample.{theirs}")


def _ema(imported: ImportedConfig, value: Any) -> None:
    if value and value.get("use_ema"):
        imported.ours |= {"use_ema": True, "ema_max_decay": float(value.get("ema_decay", 0.999))}
        left = {name: other for name, other in value.items() if name not in ("use_ema", "ema_decay")}
        imported.take(left, {}, section="train.ema_config")


def _noise_scheduler(imported: ImportedConfig, value: Any) -> None:
    if value == "flowmatch":
        why = "the model's own noise schedule is taken; --prediction_type flow trains with the loss of flow matching"
        imported.skip("train.noise_scheduler", value, why)


def _limit(option: str, theirs: str) -> Callable[[ImportedConfig, Any], None]:
    """Take a limit of their steps, which count from pure noise, timestep 999, down to the image."""

    def rule(imported: ImportedConfig, value: Any) -> None:
        timestep = 1000 - int(value) if option == "max_timestep" else 999 - int(value)
        if timestep not in (0, 1000):
            imported.set(option, timestep, theirs)

    return rule


def _text_encoder(imported: ImportedConfig, on: Any) -> None:
    if on:
        imported.notes.append("ai-toolkit trained the text encoder too; here it stays frozen")


def _unet(imported: ImportedConfig, on: Any) -> None:
    if not on:
        imported.skip("train.train_unet", on, "here it is the UNet that is trained")


def _loss(imported: ImportedConfig, value: Any) -> None:
    if value in _LOSSES:
        imported.ours["loss_type"] = _LOSSES[value]
    else:
        imported.skip("train.loss_type", value, f"the losses that can be imported: {', '.join(_LOSSES)}")


def _precision(imported: ImportedConfig, value: Any) -> None:
    imported.set("mixed_precision", _DTYPES.get(value, value), "train.dtype")


def _accumulation(imported: ImportedConfig, value: Any) -> None:
    if value != 1:
        imported.set("gradient_accumulation_steps", value, "train.gradient_accumulation")


def _if_on(option: str, value: Any, theirs: str) -> Callable[[ImportedConfig, Any], None]:
    return lambda imported, on: imported.set(option, value, theirs) if on else None


def _if_given_with(option: str, other: str, theirs: str) -> Callable[[ImportedConfig, Any], None]:
    """Take what does nothing without another option."""
    return lambda imported, value: imported.set(option, value, theirs) if imported.ours.get(other) and value else None


_MODEL: Renamed = {
    "name_or_path": "model", "vae_path": "vae",
    "is_v_pred": _if_on("prediction_type", "v_prediction", "model.is_v_pred"),
}  # fmt: skip
_TRAIN: Renamed = {
    "steps": "max_train_steps", "batch_size": "train_batch_size", "gradient_checkpointing": "gradient_checkpointing",
    "gradient_accumulation": _accumulation, "gradient_accumulation_steps": _accumulation,
    "noise_offset": "noise_offset", "min_snr_gamma": "snr_gamma", "max_grad_norm": "max_grad_norm",
    "ema_config": _ema, "noise_scheduler": _noise_scheduler, "train_text_encoder": _text_encoder, "train_unet": _unet,
    "min_denoising_steps": _limit("max_timestep", "train.min_denoising_steps"),
    "max_denoising_steps": _limit("min_timestep", "train.max_denoising_steps"),
    "loss_type": _loss, "dtype": _precision,
}  # fmt: skip
_SAVE: Renamed = {
    "save_every": "checkpointing_steps", "max_step_saves_to_keep": "checkpoints_total_limit",
    "push_to_hub": "push_to_hub", "hf_repo_id": _if_given_with("hub_model_id", "push_to_hub", "save.hf_repo_id"),
    "hf_private": _if_given_with("hub_private_repo", "push_to_hub", "save.hf_private"),
}  # fmt: skip
_LOGGING: Renamed = {
    "use_wandb": _if_on("report_to", ["wandb"], "logging.use_wandb"),
    "project_name": _if_given_with("tracker_project_name", "report_to", "logging.project_name"),
}
_DATASET: Renamed = {
    "default_caption": "prompt", "trigger_word": "trigger", "caption_dropout_rate": "caption_dropout",
    "shuffle_tokens": "shuffle_caption", "alpha_mask": "masked_loss",
    "flip_x": _if_on("random_flip", True, "datasets.flip_x"),
    "random_crop": _if_on("center_crop", False, "datasets.random_crop"),
    "token_dropout_rate": lambda imported, share: (
        imported.set("caption_tag_dropout", share, "datasets.token_dropout_rate") if share else None
    ),
}  # fmt: skip

_FREE: Mapping[str, Collection[str]] = {
    "model": ("arch", "is_xl", "is_v2", "is_ssd", "is_vega", "dtype", "vae_dtype", "te_dtype", "qtype", "qtype_te",
              "low_vram", "compile", "extras_name_or_path", "cache_size_limit"),
    "network": ("old_lokr_format", "transformer_only", "split_multistage_loras"),  # a UNet has no such parts
    "train": (
        "timestep_type", "linear_timesteps", "linear_timesteps2", "next_sample_timesteps",  # of flow matching
        "bypass_guidance_embedding", "switch_boundary_every",
        "text_encoder_lr", "refiner_lr", "embedding_lr", "adapter_lr", "train_refiner",  # of what is not trained here
        "skip_first_sample", "force_first_sample", "disable_sampling", "xformers", "sdp", "attention_backend",
        "cache_text_embeddings", "unload_text_encoder", "start_step", "reg_weight", "diff_output_preservation_class",
    ),
    "save": ("dtype", "save_format"),
    "logging": ("log_every", "verbose", "use_ui_logger", "run_name"),
    "datasets": (
        "cache_latents", "cache_latents_to_disk", "cache_text_embeddings", "num_workers", "prefetch_factor",
        "cache_latents_num_workers", "bucket_tolerance", "shrink_video_to_frames", "num_frames", "fps", "debug",
        "control_transparent_color", "full_size_control_images", "replay_transforms", "mask_min_value",
        "guidance_type", "random_triggers_max", "fast_image_size", "num_controls_from_same_folder",
    ),
}  # fmt: skip
"""Table -> options that change nothing of what is learned here, whatever their value."""
_WITHOUT_EFFECT = frozenset(
    (*(f"{table}.{name}" for table, names in _FREE.items() for name in names), "device", "sqlite_db_path",
     "performance_log_every")
)  # fmt: skip
_ONE = ("noise_multiplier", "latent_multiplier", "img_multiplier", "pred_scaler", "cfg_scale", "max_cfg_scale",
        "target_noise_multiplier", "diff_output_preservation_multiplier", "blank_prompt_preservation_multiplier",
        "optimal_noise_pairing_samples", "merge_network_on_save_strength", "audio_loss_multiplier")  # fmt: skip
_CHANGES_NOTHING: Mapping[str, Collection[Any]] = {
    **{f"train.{name}": (1,) for name in _ONE},
    "train.content_or_style": ("balanced",), "train.loss_target": ("noise",), "train.num_train_timesteps": (1000,),
    "train.differential_guidance_scale": (3,), "train.ema_config.param_multiplier": (1,),
    "datasets.scale": (1,), "datasets.network_weight": (1,), "datasets.type": ("image",),
}  # fmt: skip
"""Options without a like here -> values that are their defaults, or change nothing of what is learned."""
