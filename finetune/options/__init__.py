"""Every option of a run, written once: type, default, meaning, and what else there is to know of it. Free of torch.

The sections, a file each, group the options for `--help` and for the TOML file. An option whose default depends on the
model, the pictures or the machine is None here until the run decides it (`finetune/run/resolve_config.py`). What the
rest of the package asks about options (is it only for LoRA? may a resume change it?) is answered by
`finetune/option_info.py`'s `OptionInfo`, never by a list of names.
"""

import ast
import dataclasses
import inspect
import typing
from functools import cache
from itertools import pairwise
from typing import Any

from finetune.option_info import OptionInfo, info_of_field
from finetune.options.adapter import AdapterOptions
from finetune.options.captions import CaptionOptions
from finetune.options.data import DataOptions
from finetune.options.evaluation import SampleOptions, ValidationOptions
from finetune.options.model import ModelOptions
from finetune.options.objective import ObjectiveOptions
from finetune.options.output import OutputOptions
from finetune.options.training import TrainingOptions

ATTENTION_AND_FEED_FORWARD = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
"""The layers that a LoRA adapts unless the model's family says otherwise."""

SECTIONS: dict[str, type] = {
    "model": ModelOptions,
    "adapter": AdapterOptions,
    "data": DataOptions,
    "captions": CaptionOptions,
    "training": TrainingOptions,
    "objective": ObjectiveOptions,
    "validation": ValidationOptions,
    "samples": SampleOptions,
    "output": OutputOptions,
}


@cache
def option_types() -> dict[str, Any]:
    """Option name -> its type hint, in the order of the sections."""
    hints: dict[str, Any] = {}
    for section in SECTIONS.values():
        hints |= typing.get_type_hints(section)
    return hints


@cache
def option_info() -> dict[str, OptionInfo]:
    """Option name -> what is known about it, in the order of the sections."""
    fields = [field for section in SECTIONS.values() for field in dataclasses.fields(section)]
    return {field.name: info_of_field(field) for field in fields}


def meanings(section: type) -> dict[str, str]:
    """Option name -> the docstring below it, which Python itself does not keep."""
    (definition,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(definition, ast.ClassDef)
    return {
        option.target.id: inspect.cleandoc(text.value.value)
        for option, text in pairwise(definition.body)
        if isinstance(option, ast.AnnAssign)
        and isinstance(option.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }
