"""finetune-unet import: convert another tool's settings to config.toml, and list what could not be imported."""

import json
import shlex
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune.atomic_io import new_file, write_whole
from finetune.commands.foreign import (
    ai_toolkit,
    diffusers_scripts,
    everydream,
    kohya_ss,
    onetrainer,
    sd_scripts,
    simpletuner,
)
from finetune.commands.foreign.command_line import read_command_line
from finetune.commands.foreign.imported_config import ImportedConfig
from finetune.commands.foreign.sd_scripts_dataset import take_dataset
from finetune.config import TrainConfig, config_text
from finetune.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Convert settings of sd-scripts, kohya_ss, the diffusers scripts, OneTrainer, ai-toolkit, SimpleTuner or
    EveryDream2."""

    file: str
    """.toml, .json, .yaml, or a text file with a command line: .sh, .bat, .ps1, .ipynb."""
    to: str = "config.toml"
    """File to write; it must not exist."""


def run(options: Options) -> None:
    """Write the config, and print what is left.

    Raises:
        UsageError: no such file, one of another kind, or a place that is taken.
    """
    path = Path(options.file).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--file {path}: {getattr(error, 'strerror', None) or 'no text'}") from error
    to = new_file("--to", options.to)
    imported = _imported(path, text)
    if not imported.ours.get("model") and "method" in imported.ours:
        imported.notes.append("no model is named: give --model, or tiny is trained")
    write_whole(to, config_text(TrainConfig(**imported.ours)) + _comments(imported))
    for note in imported.notes:
        print(f"note: {note}")
    for setting, why in imported.skipped.items():
        print(f"left: {setting}: {why}")
    if imported.idle:
        print(f"without effect here: {', '.join(dict.fromkeys(imported.idle))}")
    print(f"{to}: {len(imported.ours)} settings from {imported.tool}, {len(imported.skipped)} left out")
    missing = "" if imported.ours.get("data") else " --data ./images"
    print(f"to train: finetune-unet --config {shlex.quote(str(to))}{missing}")


def _imported(path: Path, text: str) -> ImportedConfig:
    if path.suffix == ".json":
        return _from_tables(path, _parsed(path, text, json.loads, "JSON"))
    if path.suffix in (".yaml", ".yml"):
        return _from_tables(path, _parsed(path, text, yaml.safe_load, "YAML"))
    if path.suffix == ".toml":
        try:
            tables = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"--file {path} is not valid TOML: {error}") from error
        if "datasets" in tables:
            return take_dataset(tables)
        return sd_scripts.take(sd_scripts.flattened(tables), "", path.parent)
    line = read_command_line(path, text)
    if line.script in diffusers_scripts.SCRIPTS:
        launched = {name: line.launcher[name] for name in ("mixed_precision",) if name in line.launcher}
        imported = diffusers_scripts.take({**launched, **line.options}, line.script)
    elif line.script in sd_scripts.SCRIPTS:
        imported = sd_scripts.take(line.options, line.script, path.parent)
    else:
        scripts = ", ".join((*sd_scripts.SCRIPTS, *diffusers_scripts.SCRIPTS))
        raise UsageError(f"--file {path}: {line.script} cannot be imported; expected one of {scripts}")
    for name, variable in line.unknown.items():
        imported.skip(name, variable, "a variable that the file does not set; give the option itself")
    return imported


def _parsed(path: Path, text: str, parse: Callable[[str], Any], kind: str) -> Any:
    try:
        return parse(text)
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"--file {path} is not valid {kind}: {' '.join(str(error).split())}") from error


def _from_tables(path: Path, given: Any) -> ImportedConfig:
    """The settings of a file of tables, by the names in it."""
    if ai_toolkit.is_job(given):
        return ai_toolkit.take(given)
    if simpletuner.is_config(given):
        return simpletuner.take(given, path.parent)
    if everydream.is_config(given):
        return everydream.take(given, path.parent)
    if isinstance(given, dict) and {"training_method", "base_model_name"} & given.keys():
        return onetrainer.take(given)
    if isinstance(given, dict) and isinstance(given.get("datasets"), list):
        return take_dataset(given)
    if isinstance(given, dict) and {"LoRA_type", "pretrained_model_name_or_path"} <= given.keys():
        return kohya_ss.take(given, path.parent)
    programs = "OneTrainer, kohya_ss, ai-toolkit, SimpleTuner, EveryDream2 (train.json)"
    raise UsageError(f"--file {path}: no config of {programs}, and no dataset file of sd-scripts")


def _comments(imported: ImportedConfig) -> str:
    """What was left, below the settings, so that the file says it too."""
    lines = [*imported.notes, *(f"not taken over: {setting}: {why}" for setting, why in imported.skipped.items())]
    return "\n" + "".join(f"# {' '.join(line.split())}\n" for line in [f"Imported from {imported.tool}.", *lines])
