"""finetune-unet import: another tool's settings as a config.toml, and a list of what could not be taken over."""

import json
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.commands.foreign import diffusers_scripts, onetrainer, sd_scripts
from finetune.commands.foreign.taken import Taken, word_value
from finetune.config import TrainConfig, config_text
from finetune.errors import UsageError
from finetune.files import new_file, write_whole


@dataclass(frozen=True, kw_only=True)
class Options:
    """Read settings of sd-scripts (a TOML file or a command line), diffusers' scripts (a command line) or OneTrainer
    (JSON)."""

    file: str
    """.toml, .json, or any other text file that holds a command line."""
    to: str = "config.toml"
    """The file to write; there must be none yet."""


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
    taken = _taken(path, text)
    write_whole(to, config_text(TrainConfig(**taken.ours)) + _comments(taken))
    for note in taken.notes:
        print(f"note: {note}")
    for setting, why in taken.left.items():
        print(f"left: {setting}: {why}")
    print(f"{to}: {len(taken.ours)} settings from {taken.tool}, {len(taken.left)} left out")
    missing = "" if taken.ours.get("data") else " --data ./images"
    print(f"to train: finetune-unet --config {shlex.quote(str(to))}{missing}")


def _taken(path: Path, text: str) -> Taken:
    if path.suffix == ".json":
        try:
            given = json.loads(text)
        except ValueError as error:
            raise UsageError(f"--file {path} is no JSON: {error}") from error
        if not isinstance(given, dict) or not {"training_method", "base_model_name", "model_type"} & given.keys():
            raise UsageError(f"--file {path}: no config of OneTrainer")
        return onetrainer.take(given)
    if path.suffix == ".toml":
        try:
            tables = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"--file {path} is no TOML: {error}") from error
        if "datasets" in tables:
            return sd_scripts.take_dataset(tables)
        flat = {n: v for name, value in tables.items() for n, v in _entries(name, value)}
        return sd_scripts.take(flat, "")
    script, given = _command_line(path, text)
    if script.startswith(("train_text_to_image", "train_dreambooth", "train_unconditional")):
        return diffusers_scripts.take(given, script)
    if script.endswith(("train_network.py", "train_db.py", "fine_tune.py", "sdxl_train.py")):
        return sd_scripts.take(given, script)
    raise UsageError(f"--file {path}: {script} is no script of sd-scripts or diffusers that can be taken over")


def _entries(name: str, value: Any) -> list[tuple[str, Any]]:
    """A table's entries, or the entry itself: sd-scripts lets tables be as one likes."""
    return list(value.items()) if isinstance(value, dict) else [(name, value)]


def _command_line(path: Path, text: str) -> tuple[str, Mapping[str, Any]]:
    """The script's name and its options; what a launcher is told comes before the script and is passed over."""
    try:
        words = shlex.split(text.replace("\\\r\n", " ").replace("\\\n", " ").replace("^\n", " "), comments=True)
    except ValueError as error:
        raise UsageError(f"--file {path}: {error}") from error
    scripts = [number for number, word in enumerate(words) if word.endswith(".py")]
    if not scripts:
        raise UsageError(f"--file {path}: no command line of a Python script; .toml and .json files are read as such")
    given: dict[str, Any] = {}
    name = ""
    for word in words[scripts[0] + 1 :]:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            given[name] = word_value(value) if value else True
        elif name:
            before, value = given[name], word_value(word)
            given[name] = value if before is True else [*(before if isinstance(before, list) else [before]), value]
    return Path(words[scripts[0]]).name, given


def _comments(taken: Taken) -> str:
    """What was left, below the settings, so that the file says it too."""
    lines = [*taken.notes, *(f"not taken over: {setting}: {why}" for setting, why in taken.left.items())]
    return "\n" + "".join(f"# {' '.join(line.split())}\n" for line in [f"Imported from {taken.tool}.", *lines])
