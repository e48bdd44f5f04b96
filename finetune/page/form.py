"""The form of the page, as command-line arguments."""

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path

from finetune.errors import UsageError
from finetune.evaluators.sample_prompts import is_prompt_file
from finetune.models.families import FAMILIES
from finetune.options import SECTIONS, option_info, option_types
from finetune.page.allowed_paths import AllowedPaths
from finetune.page.option_fields import (
    FOLDERS,
    PREFIX,
    PROMPTS,
    choices,
    option_fields,
    takes_text,
    words_of_fields,
)

_OPEN = {
    field.name for heading, section in SECTIONS.items() for field in dataclasses.fields(section) if heading != "output"
} - {"follow_links"}
"""Options that the page takes, unless they take text: none says where to write, what to delete or to publish."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def form_words(filled: Mapping[str, str], places: AllowedPaths) -> list[str]:
    """The options of the command that a form stands for.

    Args:
        filled: the fields by their names; what is empty is left to the command.
        places: folders that are open to the page.

    Raises:
        UsageError: a folder is not open to the page, an option could name one, or a number is none.
    """
    steps = filled.get("steps", "").strip()
    if steps and not (steps.isascii() and steps.isdigit()):
        raise UsageError(f"steps {steps!r}: expected a whole number")
    texts = {name: filled.get(name, "").strip() for name in ("method", "prompt", "trigger")}
    data = str(places.pictures(filled.get("data", "").strip()))
    given = {"model": _model(filled.get("model", "").strip(), places), "data": data, **texts, "max_train_steps": steps}
    words = [word for name, value in given.items() if value for word in _option(name, value)]
    words += ["--no_follow_links"]  # which could lead out of what is open
    words += ["--early_stop"] * ("early_stop" in filled)
    for name, option in words_of_fields(filled).items():
        if name in FOLDERS:
            option = _option(name, str(places.pictures(option[0].partition("=")[2])))
        elif name == PROMPTS and (files := [line for line in option[1:] if is_prompt_file(str(places.work / line))]):
            raise UsageError(f"{name} {files[0]!r} is a file, and is for the command line")
        words += option
    return words + _more(filled.get("more", ""))


def filled_by(words: Sequence[str]) -> dict[str, str]:
    """The fields of a form that stand for these words, as far as it has fields for them; the others are in `more`."""
    names = {"data": "data", "model": "model", "method": "method", "prompt": "prompt", "trigger": "trigger",
             "max_train_steps": "steps"}  # fmt: skip
    fields = {name: field for section in option_fields().values() for name, field in section.items()}
    filled, more = dict[str, str](), list[str]()
    at = 0
    while at < len(words):
        flag, equals, value = words[at].removeprefix("--").partition("=")
        values = [value] if equals else list(takewhile(lambda word: not word.startswith("--"), words[at + 1 :]))
        end = at + 1 + (0 if equals else len(values))
        positive = flag.removeprefix("no_")
        if flag in names and values:
            filled[names[flag]] = values[0]
        elif flag == "early_stop":
            filled["early_stop"] = "on"
        elif positive in fields and fields[positive].kind == "switch" and not values:
            filled[PREFIX + positive] = "yes" if flag == positive else "no"
        elif flag in fields and values:
            filled[PREFIX + flag] = ("\n" if fields[flag].kind == "lines" else " ").join(values)
        elif flag != "no_follow_links":
            more += words[at:end]
        at = end
    return filled | ({"more": shlex.join(more)} if more else {})


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
        if takes_text(kinds[name]) and not set(_values(words[place:])) <= set(choices(kinds[name])):
            raise UsageError(f"more options: {word} takes text, and is for the command line")
    return words


def _values(words: Sequence[str]) -> list[str]:
    """The values of the option that the words begin with."""
    _, equals, value = words[0].partition("=")
    following = takewhile(lambda word: not word.startswith("--"), words[1:])
    return [value, *following] if equals else list(following)
