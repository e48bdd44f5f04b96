"""The form of the page, as command-line arguments."""

import dataclasses
import re
import shlex
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from finetune.errors import UsageError
from finetune.models.families import FAMILIES
from finetune.options import SECTIONS, option_info, option_types
from finetune.page.allowed_paths import AllowedPaths

_OPEN = {
    field.name for heading, section in SECTIONS.items() for field in dataclasses.fields(section) if heading != "output"
} - {"follow_links"}
"""Options that the page takes, unless they take text: none says where to write, what to delete or to publish."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Form:
    """A training run as it was filled in; what is empty is left to the command."""

    data: str
    model: str = ""
    method: str = ""
    prompt: str = ""
    trigger: str = ""
    steps: int | None = None
    early_stop: bool = False
    more: str = ""
    """Other options as they are typed on the command line."""

    def words(self, places: AllowedPaths) -> list[str]:
        """The options of the command. Raises UsageError for a folder that is not open to the page, or an option that
        could name one.
        """
        data = str(places.pictures(self.data))
        given = {
            "model": _model(self.model.strip(), places),
            "data": data,
            "method": self.method,
            "prompt": self.prompt.strip(),
            "trigger": self.trigger.strip(),
            "max_train_steps": str(int(self.steps)) if self.steps else "",
        }
        words = [word for name, value in given.items() if value for word in _option(name, value)]
        words.append("--no_follow_links")  # which could lead out of what is open
        return words + ["--early_stop"] * self.early_stop + _more(self.more)


def form_of(filled: Mapping[str, str]) -> Form:
    """The fields of the page by their names, as a `Form`. Raises UsageError for a number of steps that is none."""
    steps = filled.get("steps", "").strip()
    if steps and not steps.isdigit():
        raise UsageError(f"steps {steps!r}: expected a whole number")
    texts = {name: filled.get(name, "") for name in ("data", "model", "method", "prompt", "trigger", "more")}
    return Form(**texts, steps=int(steps) if steps else None, early_stop="early_stop" in filled)


def _option(name: str, value: str) -> list[str]:
    return [f"--{name}={value}"] if value.startswith("-") else [f"--{name}", value]


def _model(given: str, places: AllowedPaths) -> str:
    """A short name, a hub id, or a folder or file that lies where pictures or runs may."""
    if not given:
        raise UsageError("model: choose one")
    if given in FAMILIES:
        return given
    path = (places.work / Path(given).expanduser()).resolve()
    if path.exists() and any(path.is_relative_to(folder) for folder in (*places.data, places.runs)):
        return str(path)
    if not _HUB_ID.fullmatch(given) or path.exists():
        raise UsageError(f"model {given!r}: choose one of {', '.join(FAMILIES)}, owner/name, or what lies in --data")
    return given


def _more(text: str) -> list[str]:
    """The words of further options. Raises UsageError for those that take text, which could be a path, and for those
    that delete, publish or resume.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"more options: {error}") from error
    if words and not words[0].startswith("--"):
        raise UsageError(f"more options: {words[0]!r} follows no option")
    for place, word in enumerate(words):
        if not word.startswith("--"):
            continue
        name = word.partition("=")[0].removeprefix("--").replace("-", "_").removeprefix("no_")
        kinds = option_types()
        name = next((ours for ours, info in option_info().items() if name in info.aliases), name)
        if name not in kinds:
            raise UsageError(f"more options: no option {word}")
        if name not in _OPEN:
            raise UsageError(f"more options: {word} is for the command line")
        if _takes_text(kinds[name]) and not set(_values(words[place:])) <= _choices(kinds[name]):
            raise UsageError(f"more options: {word} takes text, and is for the command line")
    return words


def _values(words: Sequence[str]) -> list[str]:
    """The values of the option that the words begin with."""
    _, equals, value = words[0].partition("=")
    following = takewhile(lambda word: not word.startswith("--"), words[1:])
    return [value, *following] if equals else list(following)


def _takes_text(hint: Any) -> bool:
    return any(kind is str or typing.get_origin(kind) is tuple for kind in _alternatives(hint))


def _choices(hint: Any) -> set[str]:
    """The values that an option's type names."""
    named = [kind for kind in _alternatives(hint) if typing.get_origin(kind) is Literal]
    return {str(choice) for kind in named for choice in typing.get_args(kind)}


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
