"""Resolving a config: every option gets a value, checked before any weight is loaded."""

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from finetune.atomic_io import is_inside
from finetune.cache.folder import cache_folder
from finetune.config import ResolvedConfig, TrainConfig, as_dict, replace
from finetune.data.buckets import Buckets
from finetune.data.chunks import Chunks
from finetune.data.data_source import is_pattern
from finetune.data.split import default_fraction
from finetune.errors import UsageError
from finetune.evaluators.sample_prompts import is_prompt_file
from finetune.models.families import FAMILIES, bucket_sides, default_method, defaults, total_steps, warmup_steps
from finetune.models.model_info import ModelInfo
from finetune.models.single_file import heads_in_one_file
from finetune.models.source import open_source
from finetune.optimizer_table import OPTIMIZERS, known_optimizer
from finetune.options import option_info
from finetune.training.backend import compile_pays, resolve_precision


def _absolute(path: Path) -> str:
    """An absolute path, so that one folder has one name; links stay as they are, but on the way to ".."."""
    return str(path.resolve() if ".." in path.parts else path.absolute())


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Local folders as absolute paths, so that config.toml repeats the run from anywhere."""
    local: dict[str, Path] = {}
    if config.model not in FAMILIES:
        local["model"] = Path(config.model).expanduser()
    if config.class_data:
        local["class_data"] = Path(config.class_data).expanduser()
        if containing := [
            source for source in config.data if is_inside(local["class_data"], Path(source).expanduser())
        ]:
            raise UsageError(
                f"class_data {config.class_data} lies inside --data {containing[0]}, all of which is the subject"
            )
    if config.validation_data:
        local["validation_data"] = Path(config.validation_data).expanduser()
        inside = [data for data in config.data if is_inside(local["validation_data"], Path(data).expanduser())]
        if inside:
            given = config.validation_data
            raise UsageError(f"validation_data {given} lies inside --data {inside[0]}, all of which is trained on")
    for name in ("tokenizer", "init_lora", "vae"):
        if given := getattr(config, name):
            local[name] = Path(given).expanduser()
            if not local[name].exists():
                raise UsageError(f"{name} {given}: no such file or folder")
    existing = {
        name: path for name, path in local.items() if path.exists() or name == "class_data"
    }  # which may be made
    paths: dict[str, Any] = {name: _absolute(path) for name, path in existing.items()}
    sources = [(given, Path(given).expanduser()) for given in config.data]
    paths["data"] = [
        _absolute(path) if given and (path.exists() or is_pattern(given)) else given for given, path in sources
    ]
    if config.cache_dir and (folder := cache_folder(config.cache_dir)):
        paths["cache_dir"] = str(folder)
    if config.sample_prompts:
        paths["sample_prompts"] = [
            _absolute(Path(given).expanduser()) if is_prompt_file(given) else given for given in config.sample_prompts
        ]
    return replace(config, **paths)


def frozen_options(config: TrainConfig) -> dict[str, Any]:
    """What `load_model` and `load_frozen` take of a config for the VAE and the text encoders."""
    names = ("max_token_length", "clip_skip", "tokenizer", "vae", "vae_scale", "vae_shift", "vae_reflection_padding",
             "weighted_captions")  # fmt: skip
    return {name: getattr(config, name) for name in names}


def resolve_for(
    config: TrainConfig, model_info: ModelInfo, chunks: Chunks, device: torch.device, *, processes: int = 1
) -> ResolvedConfig:
    """The config with every option decided for these pictures. Raises UsageError as `resolve` does."""
    pictures = chunks.first
    return resolve(
        config,
        model_info,
        pictures=sum(chunks.counts),
        visits=chunks.visits,
        varied_captions=len(set(pictures.captions[: pictures.num_subject_images])) > 1,
        device=device,
        processes=processes,
        validation_fraction=0.0 if config.validation_data else default_fraction(pictures.num_subject_images),
        buckets=pictures.transform and pictures.transform.buckets,
    )


def resolve(
    config: TrainConfig,
    model_info: ModelInfo,
    *,
    pictures: int,
    varied_captions: bool,
    device: torch.device,
    processes: int = 1,
    visits: Sequence[int] = (),
    validation_fraction: float = 0.0,
    buckets: Buckets | None = None,
) -> ResolvedConfig:
    """The config with every option decided that depends on the model, the pictures or the machine.

    Args:
        config: what the user gave.
        model_info: the model it names.
        pictures: how many there are to train on.
        varied_captions: True when they do not all share one caption.
        device: where the UNet will run.
        processes: that train together.
        visits: of an epoch in each chunk, repeats counted; none: one for each picture.
        validation_fraction: share of the pictures that is held out, where it was not given.
        buckets: what they are trained in; None: squares.

    Raises:
        UsageError: an option that this kind of model or method cannot use.
    """
    method = config.method or default_method(model_info.family)
    _refuse_unusable(config, model_info, method, buckets)
    resolution = config.resolution or model_info.resolution
    few = {"pictures": pictures, "resolution": resolution, "varied_captions": varied_captions}
    family_defaults = defaults(model_info.family, method, config.optimizer, **few, scratch=model_info.scratch)
    family_defaults |= bucket_sides(resolution, model_info.multiple) if buckets else {}
    family_defaults |= {"use_ema": False} if config.full_bf16 or _may_average(config.optimizer) else {}
    one_pass = _one_pass(config, processes, buckets) if config.fused_backward_pass else {}
    family_defaults |= one_pass
    derived = {name: value for name, value in family_defaults.items() if getattr(config, name) is None} | one_pass
    processes = config.num_processes or processes
    length = _length(config, model_info, family_defaults | {"num_processes": processes}, pictures, visits or [pictures])
    small = model_info.family.is_small(resolution)
    steps = length["max_train_steps"] or 0
    return ResolvedConfig(
        config,
        **derived
        | length
        | {
            "method": method,
            "num_processes": processes,
            "resolution": resolution,
            "validation_fraction": validation_fraction
            if config.validation_fraction is None
            else config.validation_fraction,
            "aspect_ratio_bucketing": buckets is not None,
            "lora_alpha": float(config.rank) if config.lora_alpha is None else config.lora_alpha,
            "mixed_precision": _precision(config, device, small=small),
            "compile": compile_pays(device, steps, small=small) if config.compile is None else config.compile,
        },
    )


def _may_average(optimizer: str) -> bool:
    """Whether it averages the weights itself, as far as that is known before it is imported."""
    return known_optimizer(optimizer).averages or optimizer not in OPTIMIZERS


def _precision(config: TrainConfig, device: torch.device, *, small: bool) -> str:
    if not config.full_bf16:
        precision = resolve_precision(config.mixed_precision, device, small=small)
        if precision == "fp16" and config.init_lora_weights == "pissa":  # its two large parts have to cancel out
            raise UsageError("init_lora_weights pissa with mixed_precision fp16: choose bf16 or no")
        return precision
    if config.mixed_precision not in ("auto", "bf16"):
        raise UsageError(f"full_bf16 with mixed_precision = {config.mixed_precision}: choose bf16 or auto")
    if device.type == "cuda" and resolve_precision("auto", device, small=small) != "bf16":
        raise UsageError("full_bf16: this GPU cannot compute in bf16; leave it out")
    return "bf16"


def _one_pass(config: TrainConfig, processes: int, buckets: Buckets | None) -> dict[str, int]:
    """What `fused_backward_pass` leaves no choice in. Raises UsageError for what was given otherwise."""
    only = {"gradient_accumulation_steps": 1, "max_grad_norm": 0, "max_bad_steps": 1, "num_processes": 1}
    if buckets is not None:  # a step may hold pictures of several sizes
        only["train_batch_size"] = 1
    given = {name: value for name in only if (value := getattr(config, name)) is not None and name in config.given}
    for name, value in (given | ({"num_processes": processes} if processes > 1 else {})).items():
        if value != only[name]:
            or_else = ", or --no-aspect_ratio_bucketing" if name == "train_batch_size" else ""
            raise UsageError(f"fused_backward_pass with {name} = {value}: expected {only[name]}{or_else}")
    return only


def _length(
    config: TrainConfig, model_info: ModelInfo, family_defaults: Mapping[str, Any], pictures: int, visits: Sequence[int]
) -> dict[str, int | None]:
    """Epochs, steps and warm-up of the run."""
    factors = ("train_batch_size", "gradient_accumulation_steps", "num_processes")
    batch = prod(getattr(config, name) or family_defaults[name] for name in factors)
    epochs = config.num_train_epochs
    if epochs is None and config.max_train_steps is None:
        epochs = family_defaults["num_train_epochs"]
    steps = total_steps(pictures, visits, batch, epochs, config.max_train_steps)
    warmup, decay = _steps_of(config.lr_warmup_steps, steps), _steps_of(config.lr_decay_steps, steps)
    if warmup is None:
        warmup = warmup_steps(steps, model_info.family, config.resolution or model_info.resolution)
    elif warmup >= steps:
        raise UsageError(f"lr_warmup_steps = {warmup}: the whole run has only {steps} steps; give a smaller one")
    return {
        "num_train_epochs": epochs,
        "max_train_steps": steps,
        "lr_warmup_steps": warmup,
        "lr_decay_steps": decay,
        "token_warmup_step": _steps_of(config.token_warmup_step, steps),
    }


def _steps_of(given: float | None, total: int) -> int | None:
    """A number of steps, which may be given as a share of the run."""
    return None if given is None else round(given * total) if given < 1 else int(given)


def _conditions(config: TrainConfig, model_info: ModelInfo, method: str, buckets: Buckets | None) -> dict[str, Any]:
    """What options require (`OptionInfo.requires`) -> whether it is so here."""
    finds_rate = config.optimizer.startswith("prodigy")
    return {
        "text": model_info.family.latent,
        "a model that takes text": model_info.family.latent,
        "a checkpoint in one file": model_info.checkpoint is not None,
        "method lora": method == "lora",
        "method full": method == "full",
        "lora_type lora or rslora": method == "lora" and config.lora_type in ("lora", "rslora"),
        "lora_type lokr": method == "lora" and config.lora_type == "lokr",
        "conv_rank": config.conv_rank is not None,
        "lora_type lora, rslora or dora": method == "lora" and config.lora_type in ("lora", "rslora", "dora"),
        "an optimizer other than prodigy": not finds_rate,
        "method full, no use_ema, and optimizer adamw, adamw8bit, adafactor or sgd": method == "full"
        and not config.use_ema
        and config.optimizer in ("adamw", "adamw8bit", "adafactor", "sgd"),
        "LoRA or DoRA, and an optimizer other than prodigy": method == "lora"
        and config.lora_type in ("lora", "rslora", "dora")
        and not finds_rate,
        "a schedule that has an end": config.lr_scheduler not in ("constant", "inverse_sqrt")
        and ":" not in (config.lr_scheduler or ""),
        "lr_scheduler cosine_with_restarts": config.lr_scheduler == "cosine_with_restarts",
        "lr_scheduler polynomial": config.lr_scheduler == "polynomial",
        "lr_scheduler wsd": config.lr_scheduler == "wsd",
        "aspect_ratio_bucketing": buckets is not None,
        "full_bf16": config.full_bf16,
        "caption_tag_dropout": config.caption_tag_dropout > 0,
        "token_warmup_step": bool(config.token_warmup_step),
        "shuffle_caption, caption_tag_dropout or token_warmup_step": config.shuffle_caption
        or config.caption_tag_dropout > 0
        or bool(config.token_warmup_step),
        "class_data": config.class_data is not None,
        "class images": config.class_data is not None or any("class_images" in own for own in config.source_settings),
        "validation_data left out": config.validation_data is None,
        "use_ema": config.use_ema is not False,
        "an optimizer of the Adam family": config.optimizer in ("adamw", "adamw8bit", "prodigy"),
        "timestep_sampling logit_normal": config.timestep_sampling == "logit_normal",
        "timestep_sampling logit_normal or sigmoid": config.timestep_sampling in ("logit_normal", "sigmoid"),
        "timestep_sampling beta": config.timestep_sampling == "beta",
        "loss_type huber or smooth_l1": config.loss_type in ("huber", "smooth_l1"),
        "multires_noise_iterations": config.multires_noise_iterations > 0,
        "push_to_hub": config.push_to_hub,
        "report_to": bool(config.report_to),
        "sample_every left out": config.sample_every is None,
    }


def _refuse_unusable(config: TrainConfig, model_info: ModelInfo, method: str, buckets: Buckets | None) -> None:
    """Raise UsageError for the first option that was given and can do nothing here."""
    there = _conditions(config, model_info, method, buckets)
    why = {
        "text": f"with {model_info.name}: a pixel-space model takes no text",
        "method lora": "with method full; give --method lora",
    }
    if not model_info.family.latent and method == "lora":
        raise UsageError(f"method = lora: {model_info.name} is a pixel-space model; choose full")
    if config.masked_loss and model_info.family.image_condition == "inpainting":
        raise UsageError(
            f"masked_loss cannot be used with {model_info.name}: masks say where it paints, and all errors count"
        )
    if config.init_lora_weights == "pissa":
        for name in ("init_lora", "scale_weight_norms", "lora_dropout", "rank_dropout", "module_dropout"):
            if getattr(config, name):
                raise UsageError(f"{name} cannot be used with init_lora_weights pissa")
    if "single-file" in config.export_formats:
        _check_single_file(model_info)
    default_values = as_dict(TrainConfig())  # `dataclasses.replace` gives all options
    for name, info in option_info().items():
        given = name in config.given and getattr(config, name) not in (None, default_values[name])
        if given and info.requires is not None and not there[info.requires]:
            raise UsageError(f"{name} cannot be used {why.get(info.requires, f'here: it needs {info.requires}')}")


def _check_single_file(model_info: ModelInfo) -> None:
    """Raise UsageError where a checkpoint in one file could not hold what is trained."""
    layout = model_info.family.layout
    if layout is None:
        raise UsageError(f"export_formats single-file: {model_info.family.description} has no such form")
    heads, read = heads_in_one_file(layout, open_source(model_info).config("unet"))
    if heads != read:
        raise UsageError(
            f"export_formats single-file: the UNet of {model_info.name} has {heads} attention heads, and programs that "
            f"open a single file would take it to have {read}; choose diffusers or unet"
        )
