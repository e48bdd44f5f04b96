"""ImportedConfig: the options taken from another tool, and those skipped, with the reason."""

import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune.config import ELSEWHERE, TrainConfig, alternatives
from finetune.errors import UsageError
from finetune.options import option_types

Renamed = Mapping[str, str | Callable[["ImportedConfig", Any], None]]
"""Their option -> ours of the same meaning, or what does its work."""


@dataclass
class ImportedConfig:
    """Settings on their way from another tool to ours."""

    tool: str
    """Its name, for messages."""
    ours: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    """Their option, with its value -> why it was not taken over."""
    notes: list[str] = field(default_factory=list)
    """What is otherwise here, although every option was taken over."""
    defaults: Mapping[str, Collection[Any]] = field(default_factory=dict)
    """Their options that are not here -> values that change nothing there either."""

    def set(self, name: str, value: Any, theirs: str) -> None:
        """Set our option, or leave theirs where the value is none of ours; 0 is off there, and absent here."""
        try:
            self.ours[name] = getattr(TrainConfig(**{name: _as_meant(name, value)}), name)
        except UsageError as error:
            if isinstance(value, bool) or word_value(str(value)) != 0:
                self.skip(theirs, value, str(error))

    def skip(self, theirs: str, value: Any, why: str | None = None) -> None:
        """Say why an option is not taken over; by default what is known of it, or that there is none like it."""
        reason = ELSEWHERE.get(theirs.rpartition(".")[2], "there is no such option here")
        self.skipped[f"{theirs} = {word_value(value)!r}"] = why or reason

    def take(self, given: Mapping[str, Any], renamed: Renamed) -> None:
        """Go through what was given; what `renamed` has not is left."""
        for theirs, value in given.items():
            rule = renamed.get(theirs)
            if rule is None:
                if word_value(value) not in (None, False, "", [], {}, *self.defaults.get(theirs, ())):
                    self.skip(theirs, value)  # what is turned off there is absent here
            elif isinstance(rule, str):
                if value not in (None, ""):
                    self.set(rule, value, theirs)
            else:
                rule(self, word_value(value))


def dropout(imported: ImportedConfig, value: Any) -> None:
    """Dropout inside the layers; none there is none here, where not every kind of adapter has the option."""
    if value:
        imported.set("lora_dropout", value, "dropout")


def no_resume(imported: ImportedConfig, value: Any) -> None:
    """What another tool has saved to go on from."""
    if value:
        imported.skip(
            "resume", value, f"a state of {imported.tool} cannot be gone on from; --init_lora takes a LoRA file"
        )


def _as_meant(name: str, value: Any) -> Any:
    """A word, or several, as our option's type wants them; a number stays text where text is meant."""
    kinds = alternatives(option_types()[name])
    if str in kinds:
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)
    if isinstance(value, list) and any(typing.get_origin(kind) is tuple for kind in kinds):
        return value
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    many = any(typing.get_origin(kind) is tuple and str in typing.get_args(kind) for kind in kinds)
    return value if many else word_value(value)


def word_value(word: Any) -> Any:
    """What a word of a command line stands for: a number, a switch, or text; what is no word, as it is."""
    if not isinstance(word, str):
        return word
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return {"true": True, "false": False, "none": None}.get(word.lower(), word)


def square(imported: ImportedConfig, value: Any) -> None:
    """ "512", 512, "512,512" or [512, 512] as the resolution; other shapes are left."""
    sides = value if isinstance(value, list) else str(value).replace("x", ",").split(",")
    sides = {int(side) for side in sides if str(side).strip().isdigit()}
    if len(sides) == 1:
        imported.set("resolution", sides.pop(), "resolution")
    else:
        imported.skip("resolution", value, "one number of pixels is taken, whose square no bucket exceeds in area")
