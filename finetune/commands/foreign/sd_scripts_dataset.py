"""Import from dataset files of sd-scripts: folders, repeats and settings, as TOML or JSON."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.commands.foreign.imported_config import ImportedConfig
from finetune.commands.foreign.sd_scripts_options import CHANGES_NOTHING, RENAMED, take_buckets, take_captions
from finetune.data.listing import is_picture, list_files
from finetune.errors import UsageError
from finetune.text import join_limited


def read_dataset(path: Path) -> ImportedConfig:
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


def take_dataset(tables: Mapping[str, Any]) -> ImportedConfig:
    """The settings of a dataset TOML: its folders with their repeats; what else a folder has is that of the first."""
    imported = ImportedConfig("sd-scripts", defaults=CHANGES_NOTHING)
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
        imported.skip("datasets", f"{len(datasets)} tables", "settings are those of the first, folders those of all")
    for name in ("image_dir", "num_repeats", "class_tokens"):
        merged.pop(name, None)
    _folders(imported, everything, default)
    _class_tokens(imported, subsets)
    names = {"batch_size": "train_batch_size"}
    extension = merged.pop("caption_extension", None)
    if extension not in (None, ".txt", ".caption"):
        imported.skip("caption_extension", extension, "captions are read from .txt and .caption files")
    take_buckets(imported, merged)
    take_captions(imported, merged)
    imported.take(merged, {**RENAMED, **names})
    return imported


def _folders(imported: ImportedConfig, subsets: list[dict[str, Any]], default: int) -> None:
    """Folders and repeats; a setting that one folder has otherwise than the first is left."""
    everything = [subset for subset in subsets if "image_dir" in subset]
    with_pictures = [subset for subset in everything if not subset.get("is_reg")]
    for number, subset in enumerate(subset for subset in everything if subset.get("is_reg")):
        if number:
            imported.skip("is_reg", subset["image_dir"], "class images come from one folder")
            continue
        imported.set("class_data", subset["image_dir"], "image_dir")
        if prompt := subset.get("class_tokens"):
            imported.set("class_prompt", prompt, "class_tokens")
    if not with_pictures:
        return
    imported.set("data", [subset["image_dir"] for subset in with_pictures], "image_dir")
    repeats = [subset.get("num_repeats", default) for subset in with_pictures]
    if set(repeats) != {1}:
        imported.set("repeats", repeats, "num_repeats")
    for folder in (subset["image_dir"] for subset in everything):
        below = (
            {file.rpartition("/")[0] for file in list_files(Path(folder)) if is_picture(file)} if _there(folder) else ()
        )
        if deeper := sorted(set(below) - {""}):
            imported.notes.append(
                f"{folder}: subfolders are trained on too, which sd-scripts does not: {join_limited(deeper)}"
            )
    for subset in with_pictures[1:]:
        for name, value in subset.items():
            if name not in ("image_dir", "num_repeats", "class_tokens") and value != with_pictures[0].get(name):
                imported.skip(f"{subset['image_dir']}.{name}", value, "all folders have the settings of the first")


def _there(folder: Any) -> bool:
    return Path(str(folder)).is_dir()


def _class_tokens(imported: ImportedConfig, subsets: Sequence[Mapping[str, Any]]) -> None:
    """One prompt, if all folders of the subject have the same; else each would be trained with another one's."""
    tokens = {str(subset["image_dir"]): subset.get("class_tokens") for subset in subsets if "image_dir" in subset}
    distinct = set(tokens.values())
    if len(distinct) == 1 and None not in distinct:
        imported.set("prompt", distinct.pop(), "class_tokens")
        return
    for folder, prompt in tokens.items():
        if prompt:
            imported.skip(
                f"{folder}.class_tokens", prompt, "one --prompt is for all folders; give captions beside them"
            )
