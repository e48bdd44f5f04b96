"""ImportedConfig: the options taken from another tool, and those skipped, with the reason."""

import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune.config import ELSEWHERE, TrainConfig
from finetune.errors import UsageError
from finetune.option_info import alternatives
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
    without_effect: Collection[str] = ()
    """Their options that change nothing of what is learned, whatever their value."""
    idle: list[str] = field(default_factory=list)
    """Those of them that were given."""

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

    def take(self, given: Mapping[str, Any], renamed: Renamed, *, section: str = "") -> None:
        """Go through what was given; what `renamed` has not is left.

        Args:
            given: their option -> value.
            renamed: their option -> ours, or what takes it.
            section: the table that they are in, in front of the names of those that are left.
        """
        for name, value in given.items():
            rule, theirs = renamed.get(name), f"{section}.{name}" if section else name
            if isinstance(rule, str):
                if value not in (None, ""):
                    self.set(rule, value, theirs)
            elif rule is not None:
                rule(self, word_value(value))
            elif not self._is_off(theirs, value):
                if theirs in self.without_effect:
                    self.idle.append(theirs)
                else:
                    self.skip(theirs, value)

    def _is_off(self, theirs: str, value: Any) -> bool:
        """Whether an option changes nothing at this value; what is turned off there is absent here."""
        return word_value(value) in (None, False, "", [], {}, *self.defaults.get(theirs, ()))


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
    number = word_value(value)
    if int in kinds and isinstance(number, float) and number.is_integer():
        return int(number)
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


def without_nulls(given: Any) -> Any:
    """Tables without the entries that are null, which stand for the default, at any depth."""
    if isinstance(given, Mapping):
        return {name: without_nulls(value) for name, value in given.items() if value is not None}
    return [without_nulls(item) for item in given if item is not None] if isinstance(given, list) else given


def square(imported: ImportedConfig, value: Any) -> None:
    """ "512", 512, "512,512" or [512, 512] as the resolution; other shapes are left."""
    sides = value if isinstance(value, list) else str(value).replace("x", ",").split(",")
    sides = {int(side) for side in sides if str(side).strip().isdigit()}
    if len(sides) == 1:
        imported.set("resolution", sides.pop(), "resolution")
    else:
        imported.skip("resolution", value, "one number of pixels is taken, whose square no bucket exceeds in area")
