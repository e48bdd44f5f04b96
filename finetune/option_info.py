"""What is known about an option, beside its type, its default and its meaning. Free of torch."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Change = Literal["another run", "on resume", "length", "machine", "free"]


@dataclass(frozen=True)
class Range:
    """Which numbers an option may be."""

    allowed: str
    holds: Callable[[float], bool]


AT_LEAST_ONE = Range("1 or more", lambda value: value >= 1)
POSITIVE = Range("above 0", lambda value: 0 < value < float("inf"))
NOT_NEGATIVE = Range("0 or more", lambda value: 0 <= value < float("inf"))
SHARE = Range("from 0 to 1, or true or false", lambda value: 0 <= value <= 1)
BELOW_ONE = Range("from 0 up to (not including) 1", lambda value: 0 <= value < 1)


@dataclass(frozen=True)
class OptionInfo:
    """What an option means, beside its type, its default and the docstring below it."""

    range: Range | None = None
    needs: str | None = None
    """What must be there for the option to do anything, as `finetune/run/resolve_config.py` checks it."""
    change: Change = "another run"
    """What another value makes of a run: another run; the same, if it is resumed by name ("length": and its learning
    rate does not depend on the length); the same, if the machine and not the user chose it; or always the same
    ("free": says nothing about the result)."""
    names: tuple[str, ...] = ()
    """Other names under which it is accepted: those of the Hugging Face tutorial and scripts."""
    called: tuple[str, ...] = ()
    """What other tools call it: suggested, not accepted."""
    path: bool = False
    """It may name a file or a folder of this machine, which is nobody else's business."""
    inherited: bool = False
    """A resume that leaves it out takes it from the run, though another value makes no other run."""
    decided_by: Literal["dataset", "transform"] | None = None
    """Decided already by any dataset of the user's own, or by one that has a transform."""


def option(default: Any, range: Range | None = None, **info: Any) -> Any:
    """A field of a section with what is known `OptionInfo` it."""
    return dataclasses.field(default=default, metadata={"about": OptionInfo(range, **info)})


def info_of_field(field: dataclasses.Field[Any]) -> OptionInfo:
    """What is known about one option, of a section or of a command."""
    return field.metadata.get("about", OptionInfo())
