"""What is known about an option in addition to its type, its default and its meaning. Free of torch."""

import dataclasses
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Affects = Literal["another run", "on resume", "length", "machine", "free"]


@dataclass(frozen=True)
class Range:
    """What values an option may have."""

    allowed: str
    holds: Callable[[Any], bool]


AT_LEAST_ONE = Range("1 or more", lambda value: value >= 1)
POSITIVE = Range("above 0", lambda value: 0 < value < float("inf"))
NOT_NEGATIVE = Range("0 or more", lambda value: 0 <= value < float("inf"))
STEPS_OR_SHARE = Range("a whole number, or below 1", lambda value: 0 <= value < 1 or (value >= 1 and value % 1 == 0))
SHARE = Range("from 0 to 1, or true or false", lambda value: 0 <= value <= 1)
BELOW_ONE = Range("from 0 up to (not including) 1", lambda value: 0 <= value < 1)


@dataclass(frozen=True)
class OptionInfo:
    """What is known about an option in addition to its type, its default and the docstring below it."""

    range: Range | None = None
    requires: str | None = None
    """The condition under which the option has an effect, as `finetune/run/resolve_config.py` checks it."""
    affects: Affects = "another run"
    """What a changed value does to a run. "another run": it is a different run. "on resume": a resume that names the
    folder may change it. "length": like "on resume", where the learning rate does not depend on the length.
    "machine": the run stays the same if the machine chose the value, not the user. "free": it has no effect on the
    result."""
    aliases: tuple[str, ...] = ()
    """Other names that are accepted: those of the Hugging Face tutorial and scripts."""
    suggest_for: tuple[str, ...] = ()
    """Names of other tools for which this option is suggested; they are not accepted."""
    path: bool = False
    """Whether it may name a file or folder of this machine, which is not published."""
    inherited: bool = False
    """Whether a resume that leaves it out takes it from the run, although it does not affect the result."""
    several: bool = False
    """Whether several values may be given at once; `TrainConfig` takes each source of images with each of them."""
    decided_by: Literal["dataset", "transform"] | None = None
    """What makes the option unusable: any dataset of the user's own, or one that has a transform."""


def option(default: Any, range: Range | None = None, **info: Any) -> Any:
    """Return a dataclass field with a default and its `OptionInfo`."""
    return dataclasses.field(default=default, metadata={"info": OptionInfo(range, **info)})


def info_of_field(field: dataclasses.Field[Any]) -> OptionInfo:
    """Return what is known about one option of a section or of a command."""
    return field.metadata.get("info", OptionInfo())


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The alternatives of `A | B`; the hint itself otherwise."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
