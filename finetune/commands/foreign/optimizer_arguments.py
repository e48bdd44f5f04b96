"""Arguments of another tool's optimizer: as options of ours, or as arguments of the class."""

from collections.abc import Mapping
from typing import Any

from finetune.commands.foreign.imported_config import ImportedConfig, word_value
from finetune.training.optimizers import knows_argument

_OPTIONS = {
    "weight_decay": "adam_weight_decay", "eps": "adam_epsilon", "epsilon": "adam_epsilon",
    "beta1": "adam_beta1", "beta2": "adam_beta2",
}  # fmt: skip
_OF_ADAM = ("adamw", "adamw8bit", "prodigy")


def take_arguments(imported: ImportedConfig, given: Mapping[str, Any], *, section: str) -> None:
    """Take arguments of the optimizer's class; those that it does not know are left.

    Args:
        imported: has the optimizer.
        given: name -> value; None: the default of the class.
        section: what they are part of, for what is left.
    """
    optimizer = imported.ours.get("optimizer", "adamw")
    more = []
    for name, raw in given.items():
        value, theirs = word_value(raw), f"{section}.{name}"
        if value is None:
            continue
        if name == "betas" and optimizer in _OF_ADAM and len(betas := _numbers(value)) == 2:
            for option, beta in zip(("adam_beta1", "adam_beta2"), betas, strict=True):
                imported.set(option, beta, theirs)
        elif name == "weight_decay" or (name in _OPTIONS and optimizer in _OF_ADAM):
            imported.set(_OPTIONS[name], value, theirs)
        elif optimizer == "adafactor" and value is not False:
            imported.skip(theirs, value, "torch's Adafactor is taken, which has no such argument")
        elif knows_argument(optimizer, name):
            more.append(f"{name}={_text(value)}")
        elif value is not False:
            imported.skip(theirs, value, "the optimizer has no such argument")
    if more:
        imported.ours["optimizer_args"] = tuple(more)


def _numbers(value: Any) -> list[float]:
    numbers = value if isinstance(value, list | tuple) else str(value).strip("()[] ").split(",")
    return [float(number) for number in numbers]


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
