"""Import from dataset files of sd-scripts: folders, repeats and settings, as TOML or JSON."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.commands.foreign.imported_config import ImportedConfig
from finetune.commands.foreign.sd_scripts_options import CHANGES_NOTHING, RENAMED, take_buckets, take_captions
from finetune.config import TrainConfig, as_dict
from finetune.data.listing import is_picture, list_files
from finetune.errors import UsageError
from finetune.source_options import OF_A_SOURCE, parse_settings, settings_text
from finetune.text import join_limited


def read_dataset(path: Path) -> ImportedConfig:
    """What `take_dataset` takes from a file. Raises UsageError where it is none."""
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
        tables = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:  # UnicodeDecodeError, and what both parsers raise, among them
        kind = path.suffix[1:].upper()
        raise UsageError(f"--data {path}: {getattr(error, 'strerror', None) or f'no {kind}: {error}'}") from error
    if isinstance(tables, dict) and "source" in tables:
        return take_sources(path, tables)
    if not isinstance(tables, dict) or "datasets" not in tables:
        raise UsageError(f"--data {path}: no [[source]], and no [[datasets]] as a dataset file of sd-scripts has them")
    return take_dataset(tables)


def take_sources(path: Path, tables: Mapping[str, Any]) -> ImportedConfig:
    """The settings of a dataset file of our own: options of the run, and a [[source]] for each source of images.

    Raises:
        UsageError: a source has no data, or an option that it cannot have.
    """
    imported = ImportedConfig("finetune-unet")
    imported.ours |= {name: value for name, value in tables.items() if name != "source"}
    sources = [dict(source) for source in tables["source"]]
    if missing := [number for number, source in enumerate(sources, start=1) if "data" not in source]:
        raise UsageError(f"--data {path}: source {missing[0]} has no data; it names a folder, shards or a dataset")
    imported.ours["data"] = tuple(str(source.pop("data")) for source in sources)
    imported.ours["repeats"] = tuple(source.pop("repeats", 1) for source in sources)
    texts = tuple(settings_text(source) for source in sources)
    for text in texts:
        parse_settings(text)
    imported.ours["source_settings"] = texts
    return imported


def take_dataset(tables: Mapping[str, Any]) -> ImportedConfig:
    """The settings of a dataset file: those of the first folder are the run's, what others have otherwise is theirs."""
    imported = ImportedConfig("sd-scripts", defaults=CHANGES_NOTHING)
    merged = [
        {**tables.get("general", {}), **{n: v for n, v in dataset.items() if n != "subsets"}, **subset}
        for dataset in tables.get("datasets", [])
        for subset in dataset.get("subsets", [])
    ]
    subsets = [subset for subset in merged if "image_dir" in subset]
    for subset in [subset for subset in merged if "image_dir" not in subset]:
        imported.skip("metadata_file", subset.get("metadata_file"), "a subset without image_dir; give its folder")
    subject = [subset for subset in subsets if not subset.get("is_reg")]
    first = _taken(imported, (subject or [dict(tables.get("general", {}))])[0])
    imported.ours |= first
    _take_folders(imported, subject, [subset for subset in subsets if subset.get("is_reg")])
    _note_subfolders(imported, subsets)
    return imported


def _taken(imported: ImportedConfig, subset: Mapping[str, Any]) -> dict[str, Any]:
    """The options that one folder's settings are."""
    subset_config = ImportedConfig("sd-scripts", defaults=CHANGES_NOTHING)
    given = {name: value for name, value in subset.items() if name not in _OF_THE_FOLDER}
    extension = given.pop("caption_extension", None)
    if extension not in (None, ".txt", ".caption"):
        subset_config.skip("caption_extension", extension, "captions are read from .txt and .caption files")
    take_buckets(subset_config, given)
    take_captions(subset_config, given)
    subset_config.take(given, {**RENAMED, "batch_size": "train_batch_size"})
    imported.skipped |= subset_config.skipped
    imported.notes += [note for note in subset_config.notes if note not in imported.notes]
    return subset_config.ours


_OF_THE_FOLDER = ("image_dir", "num_repeats", "class_tokens", "is_reg")


def _take_folders(
    imported: ImportedConfig, subject: Sequence[Mapping[str, Any]], classes: Sequence[Mapping[str, Any]]
) -> None:
    """Folders with their repeats and settings. Class images of several folders are sources as well."""
    if len(classes) == 1:
        imported.set("class_data", classes[0]["image_dir"], "image_dir")
        if prompt := classes[0].get("class_tokens"):
            imported.set("class_prompt", prompt, "class_tokens")
        classes = []
    sources = [*subject, *classes]
    if not sources:
        return
    imported.set("data", [subset["image_dir"] for subset in sources], "image_dir")
    repeats = [subset.get("num_repeats", 1) for subset in sources]
    if set(repeats) != {1}:
        imported.set("repeats", repeats, "num_repeats")
    prompts = {subset.get("class_tokens") for subset in sources}
    if len(prompts) == 1 and None not in prompts:
        imported.set("prompt", prompts.pop(), "class_tokens")
    differing = [_differences(imported, subset) for subset in sources]
    if any(differing):
        imported.ours["source_settings"] = tuple(map(settings_text, differing))


def _differences(imported: ImportedConfig, subset: Mapping[str, Any]) -> dict[str, Any]:
    """What a folder has otherwise than the run, by the names of our options."""
    ours, plain = _taken(imported, subset), as_dict(TrainConfig())
    settings: dict[str, Any] = {"class_images": True} if subset.get("is_reg") else {}
    if (prompt := subset.get("class_tokens")) and prompt != imported.ours.get("prompt"):
        settings["prompt"] = prompt
    for name in dict.fromkeys((*ours, *imported.ours)):
        value = ours.get(name, plain.get(name))
        if name in _OF_THE_RUN or value == imported.ours.get(name, plain.get(name)):
            continue
        if name in OF_A_SOURCE:
            settings[name] = ("" if name != "keep_tokens" else 0) if value is None else value
        else:
            imported.skip(f"{subset['image_dir']}.{name}", value, "one value is for all folders")
    return settings


_OF_THE_RUN = ("data", "repeats", "prompt", "class_data", "class_prompt", "source_settings")


def _note_subfolders(imported: ImportedConfig, subsets: Sequence[Mapping[str, Any]]) -> None:
    for folder in (subset["image_dir"] for subset in subsets):
        below = (
            {file.rpartition("/")[0] for file in list_files(Path(folder)) if is_picture(file)} if _there(folder) else ()
        )
        if deeper := sorted(set(below) - {""}):
            imported.notes.append(
                f"{folder}: subfolders are trained on too, which sd-scripts does not: {join_limited(deeper)}"
            )


def _there(folder: Any) -> bool:
    return Path(str(folder)).is_dir()
