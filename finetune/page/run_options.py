"""The options of runs, from their config.toml."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.options import option_info


def differing_options(runs: Sequence[Path]) -> dict[str, list[str]]:
    """The options that runs have different values of, each with the value of every run; empty where one has none.

    Args:
        runs: run folders; one without a config.toml that can be read has no options.
    """
    read = [_options(run) for run in runs]
    free = {name for name, info in option_info().items() if info.affects == "free"}
    names = dict.fromkeys(name for options in read for name in options if name not in free)
    values = {name: [_formatted(options.get(name)) for options in read] for name in names}
    return {name: some for name, some in values.items() if len(set(some)) > 1}


def _options(run: Path) -> dict[str, Any]:
    try:
        tables = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not written yet, or by a version with another format
        return {}
    return {name: value for table in tables.values() if isinstance(table, dict) for name, value in table.items()}


def _formatted(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)
