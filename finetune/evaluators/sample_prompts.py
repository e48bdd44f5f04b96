"""Prompts of the sample grids: texts, or files with one prompt per line and the settings of sd-scripts."""

import json
import os
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.errors import UsageError

_SETTINGS: dict[str, tuple[str, type]] = {
    "n": ("negative", str),
    "s": ("num_inference_steps", int),
    "l": ("guidance_scale", float),
    "d": ("seed", int),
}
"""sd-scripts' letters -> field of `SamplePrompt`, and its type."""
_SIZES = ("w", "h")
_IN_TABLES = {"negative_prompt": "n", "sample_steps": "s", "scale": "l", "seed": "d", "width": "w", "height": "h"}
"""What sd-scripts calls the same in .toml and .json files."""


@dataclass(frozen=True)
class SamplePrompt:
    """What one row of a grid shows."""

    text: str
    negative: str = ""
    num_inference_steps: int | None = None
    """None: the run's."""
    guidance_scale: float | None = None
    """None: the run's."""
    seed: int = 0
    """Of the row's first picture."""
    unknown: tuple[str, ...] = ()
    """Settings of other tools that are passed over."""
    other_size: bool = False
    """The line asks for a width or height, which a grid cannot give: its pictures have the run's resolution."""


def is_prompt_file(given: str) -> bool:
    """Whether an element of `--sample_prompts` names a file that exists."""
    return os.path.isfile(os.path.expanduser(given))


def sample_prompts(given: Iterable[str]) -> tuple[SamplePrompt, ...]:
    """The prompts that `--sample_prompts` stands for.

    A line of a file is a prompt, perhaps with `--n NEGATIVE`, `--s STEPS`, `--l GUIDANCE`, `--d SEED`, `--w WIDTH` and
    `--h HEIGHT` behind it; empty lines and those that begin with # are left out. Files of sd-scripts in .toml and .json
    hold the same in tables. Settings that are not known are passed over, and kept in `unknown`.

    Raises:
        UsageError: a file is not UTF-8, is broken or holds no prompt, or a setting is no number.
    """
    prompts: list[SamplePrompt] = []
    for text in given:
        prompts += _read(Path(text).expanduser()) if is_prompt_file(text) else [SamplePrompt(text)]
    return tuple(prompts)


def _read(path: Path) -> list[SamplePrompt]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        lines = _of_tables(path, text) if path.suffix in (".toml", ".json") else text.splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"sample_prompts {path}: cannot be read as UTF-8 text") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(
            f"sample_prompts {path}: no prompts as sd-scripts has them in such a file ({error})"
        ) from error
    prompts = [
        _parse(line.strip(), f"sample_prompts {path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not prompts:
        raise UsageError(f"sample_prompts {path}: no prompt in it")
    return prompts


def _of_tables(path: Path, text: str) -> list[str]:
    """The prompts of a .toml or .json file of sd-scripts, as lines."""
    tables = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)["prompt"]
    common = {} if isinstance(tables, list) else {name: value for name, value in tables.items() if name != "subset"}
    lines: list[str] = []
    for each in tables if isinstance(tables, list) else tables["subset"]:
        entry = common | ({"prompt": each} if isinstance(each, str) else each)
        settings = [f" --{_IN_TABLES.get(name, name)} {value}" for name, value in entry.items() if name != "prompt"]
        lines.append(entry["prompt"] + "".join(settings))
    return lines


def _parse(line: str, where: str) -> SamplePrompt:
    text, *settings = re.split(r"\s+--(?=[a-z])", line)
    prompt = SamplePrompt(text)
    for setting in settings:
        letter, _, value = setting.partition(" ")
        if letter in _SIZES:
            prompt = replace(prompt, other_size=True)
            continue
        if letter not in _SETTINGS:
            prompt = replace(prompt, unknown=(*prompt.unknown, f"--{letter}"))
            continue
        field, kind = _SETTINGS[letter]
        prompt = replace(prompt, **{field: _number(kind, value.strip(), f"{where}: --{letter}")})
    return prompt


def _number(kind: type, value: str, where: str) -> Any:
    try:
        number = kind(value)
    except ValueError as error:
        raise UsageError(f"{where} {value}: expected a number") from error
    least = 1 if where.endswith("--s") else 0
    if kind is not str and not least <= number < 2**63:
        raise UsageError(f"{where} {value}: expected {least} or more")
    return number
