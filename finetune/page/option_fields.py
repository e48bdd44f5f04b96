"""OptionField: the options of training that the form of the page offers, each with its meaning."""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from finetune.errors import UsageError
from finetune.option_info import alternatives, info_of_field
from finetune.options import SECTIONS, meanings, option_types

PREFIX = "option."
"""Of the names of these fields in a form."""

FOLDERS = {"class_data", "validation_data"}
"""Options that name a folder of images, which must be open to the page."""

_TEXTS = {
    "background", "caption_prefix", "caption_separator", "caption_suffix", "class_prompt", "keep_tokens_separator",
    "lora_target_modules", "secondary_separator", "train_modules",
}  # fmt: skip
"""Options that take a text which is no path, no Python name and no address."""

PROMPTS = "sample_prompts"
"""The option with a prompt on each line; a file of prompts is for the command line."""

ASKED_ABOVE = {"data", "model", "method", "prompt", "trigger", "max_train_steps", "early_stop", "follow_links"}
"""Options that the form asks for by themselves, or decides."""


@dataclass(frozen=True)
class OptionField:
    """A field of the form for one option."""

    name: str
    kind: Literal["switch", "choice", "number", "text", "lines", "folder"]
    meaning: str
    default: str
    """The value without this option; empty where the run decides it."""
    choices: tuple[str, ...] = ()
    requires: str = ""
    """The condition under which the option has an effect."""


@cache
def option_fields() -> dict[str, dict[str, OptionField]]:
    """Section -> option name -> its field. The options of output are not among them: they name folders and publish."""
    sections = {heading: section for heading, section in SECTIONS.items() if heading != "output"}
    return {
        heading: {
            field.name: made
            for field in dataclasses.fields(section)
            if field.name not in ASKED_ABOVE and (made := _field(field, meanings(section)[field.name]))
        }
        for heading, section in sections.items()
    }


def _field(field: dataclasses.Field[Any], meaning: str) -> OptionField | None:
    """The field of an option; None where it takes text that could name a file or Python code."""
    hint = option_types()[field.name]
    named, text = choices(hint), takes_text(hint)
    if field.name == PROMPTS:
        kind = "lines"
    elif field.name in FOLDERS:
        kind = "folder"
    elif named:
        kind = "choice"
    elif text:
        kind = "text"
        if field.name not in _TEXTS:
            return None
    else:
        kind = "switch" if bool in alternatives(hint) else "number"
    default = "" if field.default in (None, (), "") else str(field.default)
    requires = info_of_field(field).requires or ""
    return OptionField(field.name, kind, meaning, default, tuple(named), requires)


def words_of_fields(filled: Mapping[str, str]) -> dict[str, list[str]]:
    """Option name -> its words, for the fields of a form that are not empty. Raises UsageError for a value that would
    be read as another option.
    """
    fields = {name: field for section in option_fields().values() for name, field in section.items()}
    words = {}
    for name, field in fields.items():
        value = filled.get(PREFIX + name, "").strip()
        if not value:
            continue
        if field.kind == "switch" and value in ("yes", "no"):
            words[name] = [f"--{name}" if value == "yes" else f"--no_{name}"]
        elif field.kind == "lines" or (field.kind == "text" and takes_several(name)):
            values = value.splitlines() if field.kind == "lines" else value.split()
            values = [line.strip() for line in values if line.strip()]
            if flags := [line for line in values if line.startswith("-")]:  # would be another option
                raise UsageError(f"{name} {flags[0]!r}: expected no dash at its beginning")
            words[name] = [f"--{name}", *values]
        else:
            words[name] = [f"--{name}={value}"]
    return words


def takes_several(name: str) -> bool:
    """Whether an option takes several values."""
    return any(typing.get_origin(kind) is tuple for kind in alternatives(option_types()[name]))


def takes_text(hint: Any) -> bool:
    """Whether an option of this type takes any text."""
    return any(kind is str or typing.get_origin(kind) is tuple for kind in alternatives(hint))


def choices(hint: Any) -> list[str]:
    """The values that an option's type names."""
    named = [kind for kind in alternatives(hint) if typing.get_origin(kind) is Literal]
    return [str(choice) for kind in named for choice in typing.get_args(kind)]
