"""finetune-unet import: convert another tool's settings to config.toml, and list what could not be imported."""

import json
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path

from finetune.atomic_io import new_file, write_whole
from finetune.commands.foreign import diffusers_scripts, kohya_ss, onetrainer, sd_scripts
from finetune.commands.foreign.command_line import read_command_line
from finetune.commands.foreign.imported_config import ImportedConfig
from finetune.commands.foreign.sd_scripts_dataset import take_dataset
from finetune.config import TrainConfig, config_text
from finetune.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Convert settings of sd-scripts (TOML or a command line), kohya_ss (JSON), the diffusers scripts (a command line)
    or OneTrainer (JSON)."""

    file: str
    """.toml, .json, or a text file with a command line: .sh, .bat, .ps1, .ipynb."""
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
    print(f"{to}: {len(imported.ours)} settings from {imported.tool}, {len(imported.skipped)} left out")
    missing = "" if imported.ours.get("data") else " --data ./images"
    print(f"to train: finetune-unet --config {shlex.quote(str(to))}{missing}")


def _imported(path: Path, text: str) -> ImportedConfig:
    if path.suffix == ".json":
        return _from_json(path, text)
    if path.suffix == ".toml":
        try:
            tables = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"--file {path} is not valid TOML: {error}") from error
        if "datasets" in tables:
            return take_dataset(tables)
        return sd_scripts.take(sd_scripts.flattened(tables), "", path.parent)
    line = read_command_line(path, text)
    if line.script.startswith(("train_text_to_image", "train_dreambooth", "train_unconditional")):
        launched = {name: line.launcher[name] for name in ("mixed_precision",) if name in line.launcher}
        imported = diffusers_scripts.take({**launched, **line.options}, line.script)
    elif line.script.endswith(("train_network.py", "train_db.py", "fine_tune.py", "sdxl_train.py")):
        imported = sd_scripts.take(line.options, line.script, path.parent)
    else:
        raise UsageError(
            f"--file {path}: {line.script} is not a script of sd-scripts or diffusers that can be imported"
        )
    for name, variable in line.unknown.items():
        imported.skip(name, variable, "a variable that the file does not set; give the option itself")
    return imported


def _from_json(path: Path, text: str) -> ImportedConfig:
    try:
        given = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--file {path} is not valid JSON: {error}") from error
    if isinstance(given, dict) and {"training_method", "base_model_name"} & given.keys():
        return onetrainer.take(given)
    if isinstance(given, dict) and isinstance(given.get("datasets"), list):
        return take_dataset(given)
    if isinstance(given, dict) and {"LoRA_type", "pretrained_model_name_or_path"} <= given.keys():
        return kohya_ss.take(given, path.parent)
    simple = isinstance(given, dict) and "data_backend_config" in {name.lstrip("-") for name in given}
    what = "a config of SimpleTuner, which is not read" if simple else "no config of OneTrainer"
    readable = "configs of OneTrainer and of kohya_ss, and dataset files of sd-scripts"
    raise UsageError(f"--file {path}: {what}; what is read of .json are {readable}")


def _comments(imported: ImportedConfig) -> str:
    """What was left, below the settings, so that the file says it too."""
    lines = [*imported.notes, *(f"not taken over: {setting}: {why}" for setting, why in imported.skipped.items())]
    return "\n" + "".join(f"# {' '.join(line.split())}\n" for line in [f"Imported from {imported.tool}.", *lines])
