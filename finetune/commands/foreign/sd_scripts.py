"""kohya's sd-scripts: its command lines and TOML files, and its dataset TOML."""

import json
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.commands.foreign.taken import Renamed, Taken, dropout, no_resume, square, word_value
from finetune.data.listing import is_picture, list_files
from finetune.errors import UsageError
from finetune.options import ATTENTION_AND_FEED_FORWARD
from finetune.wording import listed

_OPTIMIZERS = {
    "adamw": "adamw", "adamw8bit": "adamw8bit", "pagedadamw8bit": "adamw8bit", "adafactor": "adafactor",
    "prodigy": "prodigy", "sgdnesterov": "sgd", "sgdnesterov8bit": "sgd",
}  # fmt: skip
_SCHEDULES = {"constant_with_warmup": "constant", "cosine_with_restarts": "cosine", "cosine_with_min_lr": "cosine"}
_NO_LIKE = {"cosine_with_restarts": "cosine", "cosine_with_min_lr": "cosine", "cosine_annealing": "cosine"}
"""Schedules that there are not -> what comes near."""
_ARGUMENTS = {"weight_decay": "adam_weight_decay", "eps": "adam_epsilon"}
_ALGORITHMS = {"lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr"}

DEFAULTS: Mapping[str, Any] = {
    "train_batch_size": 1, "max_train_steps": 1600, "lr_warmup_steps": 0, "lr_scheduler": "constant",
    "caption_dropout": 0.0, "mixed_precision": "no", "rank": 4, "lora_alpha": 1.0,
    "learning_rate": 2e-6, "gradient_accumulation_steps": 1, "validation_fraction": 0.0,
}  # fmt: skip
"""What sd-scripts takes where nothing is said, and we would not."""
_CHANGES_NOTHING: Mapping[str, Collection[Any]] = {
    "min_timestep": (0,), "max_timestep": (1000,), "loss_type": ("l2",), "huber_c": (0.1,), "huber_schedule": ("snr",),
    "noise_offset_type": ("Original",), "lr_scheduler_num_cycles": (1,), "lr_scheduler_power": (1,),
    "caption_extension": (".txt", ".caption"), "multires_noise_discount": (0.3,), "dynamo_backend": ("no",),
    "vae_batch_size": (1,), "sample_sampler": ("ddim", "euler_a"), "huber_scale": (1,), "keep_tokens": (0,),
    "adaptive_noise_scale": (0,), "persistent_data_loader_workers": (True,), "no_half_vae": (True,),
    "no_token_padding": (True,), "lowram": (True,), "train_mode": ("lora",),
}  # fmt: skip
"""Options without a like here -> values that are their defaults, or change nothing of what is learned."""
_LORA_ALONE = ("rank", "lora_alpha")


def _optimizer(taken: Taken, value: Any) -> None:
    known = _OPTIMIZERS.get(str(value).lower().replace("_", ""))
    if known is None:
        taken.leave("optimizer_type", value, f"the optimizers here: {', '.join(sorted(set(_OPTIMIZERS.values())))}")
        return
    taken.ours["optimizer"] = known
    if str(value).lower().startswith(("paged", "sgdnesterov8")):
        taken.notes.append(f"{value} became {known}: what is paged, or SGD in 8 bits, there is not")


def _optimizer_arguments(taken: Taken, value: Any) -> None:
    for argument in value if isinstance(value, list) else str(value).split():
        name, _, text = str(argument).partition("=")
        if name == "betas" and text.count(",") == 1:
            for ours, beta in zip(("adam_beta1", "adam_beta2"), text.strip("()[] ").split(","), strict=True):
                taken.put(ours, word_value(beta.strip()), "optimizer_args.betas")
        elif name in _ARGUMENTS:
            taken.put(_ARGUMENTS[name], word_value(text), f"optimizer_args.{name}")
        else:
            taken.leave(f"optimizer_args.{name}", text)


def _network_arguments(taken: Taken, value: Any) -> None:
    pairs = [str(argument).partition("=") for argument in (value if isinstance(value, list) else str(value).split())]
    given = {name: word_value(text) for name, _, text in pairs}
    if (algorithm := given.pop("algo", None)) is not None:
        if algorithm in _ALGORITHMS:
            taken.put("lora_type", _ALGORITHMS[algorithm], "network_args.algo")
        else:
            taken.leave("network_args.algo", algorithm, f"the kinds here: {', '.join(_ALGORITHMS)}")
    if given.pop("dora_wd", False) and taken.ours.get("lora_type", "lora") != "lora":
        taken.leave("network_args.dora_wd", True, f"{taken.ours['lora_type']} is taken, of which there is no dora here")
    elif "dora_wd" in str(value):
        taken.put("lora_type", "dora", "network_args.dora_wd")
    if (convolutions := given.pop("conv_dim", None)) is not None:
        taken.notes.append(f"conv_dim = {convolutions}: convolutions have the rank and alpha of the other layers here")
        given.pop("conv_alpha", None)
        taken.ours["lora_target_modules"] = (*TRANSFORMERS, "conv1", "conv2", "conv_shortcut")
    for name, argument in given.items():
        taken.leave(f"network_args.{name}", argument)


def _warmup(taken: Taken, value: Any) -> None:
    value = word_value(str(value))
    if not isinstance(value, int | float):
        taken.leave("lr_warmup_steps", value)
        return
    if isinstance(value, float) and 0 < value < 1:
        steps = taken.ours.get("max_train_steps")
        if steps is None:
            taken.leave("lr_warmup_steps", value, "a share of a length that is given in epochs; give --lr_warmup_steps")
            return
        value = round(value * steps)
    taken.put("lr_warmup_steps", int(value), "lr_warmup_steps")


def _schedule(taken: Taken, value: Any) -> None:
    known = ("constant", "constant_with_warmup", "linear", "cosine", "polynomial")
    if value not in known:
        near = _NO_LIKE.get(value, "constant")
        taken.leave("lr_scheduler", value, f"there is no such schedule here; {near} is taken")
        value = near
    taken.put("lr_scheduler", _SCHEDULES.get(value, value), "lr_scheduler")


def _velocity(taken: Taken, value: Any) -> None:
    if value:
        taken.put("prediction_type", "v_prediction", "v_parameterization")


def _clip_skip(taken: Taken, value: Any) -> None:
    if value != 1:  # their neutral value; for XL, which takes the last layer but one, it would be another here
        taken.put("clip_skip", value, "clip_skip")


def _full_bf16(taken: Taken, value: Any) -> None:
    if value and taken.ours["method"] == "lora":
        taken.leave("full_bf16", value, "a LoRA keeps its few weights in fp32 here, and the rest in bf16 anyway")
    elif value:
        taken.put("full_bf16", True, "full_bf16")


def _fused_backward_pass(taken: Taken, value: Any) -> None:
    if value:
        taken.leave("fused_backward_pass", value, "here with --full_bf16, without clipping, and one picture at a time")


def _random_crop(taken: Taken, value: Any) -> None:
    taken.put("center_crop", not value, "random_crop")


def _buckets(taken: Taken, given: dict[str, Any]) -> None:
    """Their switch and its sides, which do nothing without it; small pictures are enlarged there unless they say no."""
    sides = {"min_bucket_reso": 256, "max_bucket_reso": 1024, "bucket_reso_steps": 64}
    sides |= {name: given.pop(name) for name in sides if name in given}
    upscale = not given.pop("bucket_no_upscale", False)
    taken.ours["aspect_ratio_bucketing"] = bool(given.pop("enable_bucket", False))
    if taken.ours["aspect_ratio_bucketing"]:
        for name, value in {**sides, "bucket_upscale": upscale}.items():
            taken.put(name, value, name)


def _captions(taken: Taken, given: dict[str, Any]) -> None:
    """Kept tokens mean nothing where nothing is shuffled; each line of a file is a caption where wildcards are on."""
    taken.ours["shuffle_caption"] = bool(given.pop("shuffle_caption", False))
    kept = given.pop("keep_tokens", 0)
    if taken.ours["shuffle_caption"] and kept:
        taken.put("keep_tokens", kept, "keep_tokens")
    if given.pop("enable_wildcard", False):
        taken.ours["caption_lines"] = "chosen"
        taken.notes.append("enable_wildcard: each visit takes a line of a caption file, but {a|b} is not expanded")


def _folders(taken: Taken, subsets: list[dict[str, Any]], default: int) -> None:
    """Folders and repeats; a setting that one folder has otherwise than the first is left."""
    everything = [subset for subset in subsets if "image_dir" in subset]
    with_pictures = [subset for subset in everything if not subset.get("is_reg")]
    for number, subset in enumerate(subset for subset in everything if subset.get("is_reg")):
        if number:
            taken.leave("is_reg", subset["image_dir"], "class pictures come from one folder")
            continue
        taken.put("class_data", subset["image_dir"], "image_dir")
        if prompt := subset.get("class_tokens"):
            taken.put("class_prompt", prompt, "class_tokens")
    if not with_pictures:
        return
    taken.put("data", [subset["image_dir"] for subset in with_pictures], "image_dir")
    repeats = [subset.get("num_repeats", default) for subset in with_pictures]
    if set(repeats) != {1}:
        taken.put("repeats", repeats, "num_repeats")
    for folder in (subset["image_dir"] for subset in everything):
        below = (
            {file.rpartition("/")[0] for file in list_files(Path(folder)) if is_picture(file)} if _there(folder) else ()
        )
        if deeper := sorted(set(below) - {""}):
            taken.notes.append(f"{folder}: subfolders are trained on too, which sd-scripts does not: {listed(deeper)}")
    for subset in with_pictures[1:]:
        for name, value in subset.items():
            if name not in ("image_dir", "num_repeats", "class_tokens") and value != with_pictures[0].get(name):
                taken.leave(f"{subset['image_dir']}.{name}", value, "all folders have the settings of the first")


def _there(folder: Any) -> bool:
    return Path(str(folder)).is_dir()


def _class_tokens(taken: Taken, subsets: Sequence[Mapping[str, Any]]) -> None:
    """One prompt, if all folders of the subject have the same; else each would be trained with another one's."""
    tokens = {str(subset["image_dir"]): subset.get("class_tokens") for subset in subsets if "image_dir" in subset}
    distinct = set(tokens.values())
    if len(distinct) == 1 and None not in distinct:
        taken.put("prompt", distinct.pop(), "class_tokens")
        return
    for folder, prompt in tokens.items():
        if prompt:
            taken.leave(f"{folder}.class_tokens", prompt, "one --prompt is for all folders; give captions beside them")


def _network_module(taken: Taken, value: Any) -> None:
    if value not in ("networks.lora", "lycoris.kohya"):
        taken.leave("network_module", value, "networks.lora and lycoris.kohya have their like here")


def _trackers(taken: Taken, value: Any) -> None:
    taken.put("report_to", ["tensorboard", "wandb"] if value == "all" else [value], "log_with")


def _max_token_length(taken: Taken, value: Any) -> None:
    taken.put("max_token_length", 77 if value == 75 else value, "max_token_length")


def _prompts(taken: Taken, value: Any) -> None:
    taken.put("sample_prompts", [str(value)], "sample_prompts")


_METADATA = "captions were in it: have them in .txt files, or in metadata.jsonl with file_name and text"

TRANSFORMERS = (*ATTENTION_AND_FEED_FORWARD, "proj_in", "proj_out")
"""The layers that sd-scripts adapts: every linear layer and 1 x 1 convolution of a transformer."""

_RENAMED: Renamed = {
    "pretrained_model_name_or_path": "model", "train_data_dir": "data", "vae": "vae",
    "reg_data_dir": "class_data", "prior_loss_weight": "prior_loss_weight",
    "train_batch_size": "train_batch_size", "max_train_steps": "max_train_steps",
    "max_train_epochs": "num_train_epochs", "seed": "seed", "dataset_repeats": "repeats",
    "gradient_accumulation_steps": "gradient_accumulation_steps", "gradient_checkpointing": "gradient_checkpointing",
    "mixed_precision": "mixed_precision", "full_bf16": _full_bf16,
    "fused_backward_pass": _fused_backward_pass, "learning_rate": "learning_rate",
    "network_dim": "rank", "network_alpha": "lora_alpha", "network_dropout": dropout, "network_weights": "init_lora",
    "min_snr_gamma": "snr_gamma", "noise_offset": "noise_offset", "ip_noise_gamma": "input_perturbation",
    "max_grad_norm": "max_grad_norm", "clip_skip": _clip_skip, "alpha_mask": "masked_loss", "flip_aug": "random_flip",
    "caption_dropout_rate": "caption_dropout", "max_data_loader_n_workers": "dataloader_num_workers",
    "save_every_n_steps": "checkpointing_steps", "save_every_n_epochs": "save_model_epochs",
    "sample_every_n_steps": "sample_every", "sample_every_n_epochs": "save_image_epochs", "resolution": square,
    "sample_prompts": _prompts, "optimizer_type": _optimizer, "optimizer_args": _optimizer_arguments,
    "network_args": _network_arguments, "lr_scheduler": _schedule, "lr_warmup_steps": _warmup,
    "v_parameterization": _velocity, "random_crop": _random_crop, "log_with": _trackers,
    "max_token_length": _max_token_length, "network_module": _network_module,
    "network_train_unet_only": lambda taken, value: None, "resume": no_resume,
    "use_8bit_adam": lambda taken, value: taken.put("optimizer", "adamw8bit", "use_8bit_adam") if value else None,
    "in_json": lambda taken, value: taken.leave("in_json", value, _METADATA),
    "metadata_file": lambda taken, value: taken.leave("metadata_file", value, _METADATA),
}  # fmt: skip


_ARGUMENT_TABLES = ("optimizer_args", "network_args", "lr_scheduler_args")


def flattened(tables: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a TOML file at any depth: sd-scripts lets tables be as one likes, other programs nest them."""
    flat: dict[str, Any] = {}
    for name, value in tables.items():
        if not isinstance(value, dict):
            flat[name] = value
        elif name in _ARGUMENT_TABLES and not any(isinstance(inner, dict) for inner in value.values()):
            flat[name] = [f"{argument}={text}" for argument, text in value.items()]
        else:
            flat |= flattened(value)
    return flat


_GUI = {
    "max_resolution": "resolution", "optimizer": "optimizer_type", "stop_text_encoder_training_pct": "",
    "LoRA_type": "", "conv_dim": "", "conv_alpha": "", "lr_warmup": "", "epoch": "", "sdxl": "", "xformers": "",
}  # fmt: skip
"""What kohya_ss calls otherwise than sd-scripts, or says in another way (""; see `take_gui`)."""


def take_gui(given: Mapping[str, Any], place: Path = Path()) -> Taken:
    """The settings of a preset of kohya_ss, the page around sd-scripts: JSON.

    Args:
        given: option -> value, much of it text.
        place: the folder that files which it names are relative to.
    """
    kind = str(given.get("LoRA_type", ""))
    flat = {_GUI.get(name, name): value for name, value in given.items() if _GUI.get(name, name)}
    flat["network_module"] = "lycoris.kohya" if "LyCORIS" in kind else "networks.lora"
    if "LoCon" in kind or "LyCORIS" in kind:
        algorithm = kind.rpartition("/")[2].lower()
        flat["network_args"] = [
            f"algo={algorithm}" if "/" in kind else "algo=locon",
            f"conv_dim={given.get('conv_dim')}",
        ]
    epochs, steps = word_value(given.get("epoch", 0)), word_value(given.get("max_train_steps", 0))
    if not flat.get("max_train_epochs") and not steps and epochs:
        flat["max_train_epochs"] = epochs
    if warmup := word_value(given.get("lr_warmup", 0)):
        flat["lr_warmup_steps"] = warmup / 100 if isinstance(warmup, int | float) else warmup  # it is in percent there
    script = "sdxl_train_network.py" if given.get("sdxl") else "train_network.py"
    taken = take(flat, script, place)
    taken.tool = "kohya_ss"
    return taken


def take(given: Mapping[str, Any], script: str, place: Path = Path()) -> Taken:
    """The settings of a run of sd-scripts.

    Args:
        given: option -> value.
        script: its name, such as `sdxl_train_network.py`; "" for a TOML file.
        place: the folder that a dataset file which it names is relative to.
    """
    given, taken = dict(given), Taken("sd-scripts", defaults=_CHANGES_NOTHING)
    lora = "network" in script if script else "network_module" in given or "network_dim" in given
    told_xl = given.pop("sdxl", False) or "sdxl" in script
    named_xl = re.search(r"sd[_-]?xl", Path(str(given.get("pretrained_model_name_or_path", ""))).name, re.IGNORECASE)
    if (told_xl or named_xl) and given.pop("clip_skip", None):
        taken.notes.append("clip_skip does nothing for XL in sd-scripts, and is left out")
    subsets = given.pop("subsets", [])
    rate = given.pop("unet_lr", None)
    if rate is not None:
        given["learning_rate"] = rate
    warmup = given.pop("lr_warmup_steps", None)
    directory, name = given.pop("output_dir", None), given.pop("output_name", None)
    if directory or name:
        directory, name = (" ".join(map(str, v)) if isinstance(v, list) else str(v or "") for v in (directory, name))
        taken.ours["output_dir"] = (
            f"{directory.rstrip('/')}/{name}".strip("/") if name and directory else directory or name
        )
    if lora:
        taken.ours |= {"method": "lora", "lora_target_modules": TRANSFORMERS}
        if not given.get("network_train_unet_only"):
            taken.notes.append("sd-scripts trained the text encoder too; here it stays frozen")
        if "network_alpha" not in given:
            taken.notes.append("alpha is 1 where sd-scripts is told none (here it would be the rank)")
        elif word_value(given["network_alpha"]) == 0:
            given["network_alpha"] = given.get("network_dim", 4)  # which 0 stands for there
    else:
        taken.ours["method"] = "full"
    if file := given.pop("config_file", None):
        taken.leave("config_file", file, "import that file too, and put the settings together by hand")
    dataset = _dataset_of(taken, given.pop("dataset_config", None), place, subsets)
    _buckets(taken, given)
    _captions(taken, given)
    if not given.get("reg_data_dir"):
        given.pop("prior_loss_weight", None)  # theirs has a value also where there are no class pictures
    if ratio := given.pop("warmup_ratio", None):
        warmup = warmup or ratio
    if "batch_size" in given:
        given.setdefault("train_batch_size", given.pop("batch_size"))
    taken.take(given, _RENAMED)
    if dataset is not None:  # whose settings win there too
        taken.ours |= dataset.ours
        taken.notes += dataset.notes
        taken.left |= dataset.left
    defaults = {option: value for option, value in DEFAULTS.items() if lora or option not in _LORA_ALONE}
    if "num_train_epochs" in taken.ours:
        taken.ours.pop("max_train_steps", None)  # sd-scripts lets the epochs win
        defaults.pop("max_train_steps", None)
    taken.ours = defaults | taken.ours
    if warmup is not None:
        _warmup(taken, warmup)
    return taken


def _dataset_of(taken: Taken, file: Any, place: Path, subsets: Sequence[Any]) -> Taken | None:
    """The settings of the dataset file that a run names, or of the folders that its own file has."""
    if subsets:
        return take_dataset({"datasets": [{"subsets": list(subsets)}]})
    if not file:
        return None
    path = Path(str(file)) if Path(str(file)).is_file() else place / str(file)
    if not path.is_file():
        taken.leave("dataset_config", file, "no such file here; give it as --data")
        return None
    return read_dataset(path)


def read_dataset(path: Path) -> Taken:
    """What `take_dataset` takes from a file. Raises UsageError where it is none."""
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
        tables = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:  # UnicodeDecodeError, and what both parsers raise, among them
        kind = path.suffix[1:].upper()
        raise UsageError(f"--data {path}: {getattr(error, 'strerror', None) or f'no {kind}: {error}'}") from error
    if not isinstance(tables, dict) or "datasets" not in tables:
        raise UsageError(f"--data {path}: no [[datasets]], as a dataset file of sd-scripts has them")
    return take_dataset(tables)


def take_dataset(tables: Mapping[str, Any]) -> Taken:
    """The settings of a dataset TOML: its folders with their repeats; what else a folder has is that of the first."""
    taken = Taken("sd-scripts", defaults=_CHANGES_NOTHING)
    datasets = tables.get("datasets", [])
    everything = [subset for dataset in datasets for subset in dataset.get("subsets", [])]
    subsets = [subset for subset in everything if not subset.get("is_reg")]
    merged: dict[str, Any] = dict(tables.get("general", {}))
    for dataset in datasets[:1]:
        merged |= {name: value for name, value in dataset.items() if name != "subsets"}
    default = merged.get("num_repeats", 1)
    for subset in subsets[:1]:
        merged |= subset
    if len(datasets) > 1:
        taken.leave("datasets", f"{len(datasets)} tables", "settings are those of the first, folders those of all")
    for name in ("image_dir", "num_repeats", "class_tokens"):
        merged.pop(name, None)
    _folders(taken, everything, default)
    _class_tokens(taken, subsets)
    names = {"batch_size": "train_batch_size"}
    extension = merged.pop("caption_extension", None)
    if extension not in (None, ".txt", ".caption"):
        taken.leave("caption_extension", extension, "captions are read from .txt and .caption files")
    _buckets(taken, merged)
    _captions(taken, merged)
    taken.take(merged, {**_RENAMED, **names})
    return taken
