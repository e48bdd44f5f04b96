"""Import from command lines and TOML files of sd-scripts."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.commands.foreign.imported_config import ImportedConfig, word_value
from finetune.commands.foreign.sd_scripts_dataset import read_dataset, take_dataset
from finetune.commands.foreign.sd_scripts_network import TRANSFORMERS, take_network
from finetune.commands.foreign.sd_scripts_options import (
    CHANGES_NOTHING,
    RENAMED,
    WITHOUT_EFFECT,
    take_buckets,
    take_captions,
    take_objective,
    take_optimizer_arguments,
    take_schedule,
    take_warmup,
)
from finetune.source_options import parse_settings, settings_text

SCRIPTS = ("train_network.py", "sdxl_train_network.py", "train_db.py", "fine_tune.py", "sdxl_train.py")
"""Those that train what can be trained here; their siblings train other models."""
DEFAULTS: Mapping[str, Any] = {
    "train_batch_size": 1, "max_train_steps": 1600, "lr_warmup_steps": 0, "lr_scheduler": "constant",
    "caption_dropout": 0.0, "mixed_precision": "no", "rank": 4, "lora_alpha": 1.0,
    "learning_rate": 2e-6, "gradient_accumulation_steps": 1, "validation_fraction": 0.0,
}  # fmt: skip
"""What sd-scripts takes where nothing is said, and we would not."""
_LORA_ALONE = ("rank", "lora_alpha")


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


def take(given: Mapping[str, Any], script: str, place: Path = Path()) -> ImportedConfig:
    """The settings of a run of sd-scripts.

    Args:
        given: option -> value.
        script: its name, such as `sdxl_train_network.py`; "" for a TOML file.
        place: the folder that a dataset file which it names is relative to.
    """
    given = dict(given)
    imported = ImportedConfig("sd-scripts", defaults=CHANGES_NOTHING, without_effect=WITHOUT_EFFECT)
    lora = "network" in script if script else "network_module" in given or "network_dim" in given
    told_xl = given.pop("sdxl", False) or "sdxl" in script
    named_xl = re.search(r"sd[_-]?xl", Path(str(given.get("pretrained_model_name_or_path", ""))).name, re.IGNORECASE)
    if (told_xl or named_xl) and given.pop("clip_skip", None):
        imported.notes.append("clip_skip does nothing for XL in sd-scripts, and is left out")
    subsets = given.pop("subsets", [])
    rate = given.pop("unet_lr", None)
    if rate is not None:
        given["learning_rate"] = rate
    warmup = given.pop("lr_warmup_steps", None)
    directory, name = given.pop("output_dir", None), given.pop("output_name", None)
    if directory or name:
        directory, name = (" ".join(map(str, v)) if isinstance(v, list) else str(v or "") for v in (directory, name))
        imported.ours["output_dir"] = (
            f"{directory.rstrip('/')}/{name}".strip("/") if name and directory else directory or name
        )
    imported.ours["method"] = "lora" if lora else "full"
    if lora:
        _before_network(imported, given)
    if file := given.pop("config_file", None):
        imported.skip("config_file", file, "import that file too, and put the settings together by hand")
    dataset = _dataset_of(imported, given.pop("dataset_config", None), place, subsets)
    take_buckets(imported, given)
    take_captions(imported, given)
    take_objective(imported, given)
    arguments, network_arguments = given.pop("optimizer_args", None), given.pop("network_args", None)
    weight_norms = word_value(given.pop("scale_weight_norms", None))
    schedule = {name: given.pop(name) for name in list(given) if name.startswith("lr_") and name != "lr_warmup_steps"}
    class_weight = word_value(given.pop("prior_loss_weight", None))
    if ratio := given.pop("warmup_ratio", None):
        warmup = warmup or ratio
    if "batch_size" in given:
        given.setdefault("train_batch_size", given.pop("batch_size"))
    imported.take(given, RENAMED)
    if lora:
        take_network(imported, given.get("network_module"), network_arguments, weight_norms)
    take_schedule(imported, schedule)
    imported.take(schedule, RENAMED)
    if arguments:
        take_optimizer_arguments(imported, arguments)
    if dataset is not None:  # whose settings win there too
        imported.ours |= dataset.ours
        imported.notes += dataset.notes
        imported.skipped |= dataset.skipped
    _take_class_weight(imported, class_weight)
    defaults = {option: value for option, value in DEFAULTS.items() if lora or option not in _LORA_ALONE}
    if "num_train_epochs" in imported.ours:
        imported.ours.pop("max_train_steps", None)  # sd-scripts lets the epochs win
        defaults.pop("max_train_steps", None)
    imported.ours = defaults | imported.ours
    if warmup is not None and "schedulefree" not in imported.ours.get("optimizer", "").lower():
        take_warmup(imported, warmup)
    return imported


def _take_class_weight(imported: ImportedConfig, weight: Any) -> None:
    """The loss weight of class images, which sd-scripts has also where there are none."""
    if weight is None:
        return
    if "class_data" in imported.ours:
        imported.set("prior_loss_weight", weight, "prior_loss_weight")
    sources = [parse_settings(text) for text in imported.ours.get("source_settings", ())]
    for settings in sources:
        if settings.get("class_images") and weight != 1:
            settings["loss_weight"] = float(weight)
    if sources:
        imported.ours["source_settings"] = tuple(map(settings_text, sources))


def _before_network(imported: ImportedConfig, given: dict[str, Any]) -> None:
    """What holds of every network, and what its alpha means."""
    imported.ours["lora_target_modules"] = TRANSFORMERS
    if not given.get("network_train_unet_only"):
        imported.notes.append("sd-scripts trained the text encoder too; here it stays frozen")
    if "network_alpha" not in given:
        imported.notes.append("alpha is 1 where sd-scripts is told none (here it would be the rank)")
    elif word_value(given["network_alpha"]) == 0:
        given["network_alpha"] = given.get("network_dim", 4)  # which 0 stands for there


def _dataset_of(imported: ImportedConfig, file: Any, place: Path, subsets: Sequence[Any]) -> ImportedConfig | None:
    """The settings of the dataset file that a run names, or of the folders that its own file has."""
    if subsets:
        return take_dataset({"datasets": [{"subsets": list(subsets)}]})
    if not file:
        return None
    path = Path(str(file)) if Path(str(file)).is_file() else place / str(file)
    if not path.is_file():
        imported.skip("dataset_config", file, "no such file here; give it as --data")
        return None
    return read_dataset(path)
