"""Optimizers by name or import path, and the groups of their parameters."""

import ast
import contextlib
import inspect
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from finetune.errors import RunError, UsageError
from finetune.import_path import load_object
from finetune.optimizer_table import OPTIMIZERS, TUNED, known_optimizer
from finetune.training import checkpoint
from finetune.training.optimizer_state import load_optimizer, optimizer_state, switch_mode


def make_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    *,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float | None = None,
    epsilon: float = 1e-8,
    foreach: bool = True,
    arguments: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """An optimizer by name or import path.

    One that is not in `TUNED` is tried first on a few numbers: its state must go through a checkpoint to the same bits.

    Args:
        name: of `OPTIMIZERS`, or package.module:Class.
        parameters: single ones, or groups as `parameter_groups` makes them.
        learning_rate: of all groups.
        betas, epsilon: of those in `TUNED`.
        weight_decay: None: 0.01 for those in `TUNED`, else the optimizer's own default.
        foreach: adafactor updates all parameters together, which takes about 4 more bytes for each weight on the way;
            False: one after the other, which keeps a GPU waiting. The other optimizers have one way.
        arguments: further arguments of the class, which replace those above.

    Raises:
        UsageError: there is no such optimizer, the package that has it is not installed, it does not know an argument,
            or it cannot be resumed from a checkpoint.
    """
    given: dict[str, Any] = dict(known_optimizer(name).arguments)
    if name in TUNED:
        given |= {"weight_decay": 0.01 if weight_decay is None else weight_decay}
        if name in ("adamw", "adamw8bit", "prodigy"):
            given |= {"betas": betas, "eps": epsilon}
        if name == "adafactor":
            given["foreach"] = foreach
    elif weight_decay is not None:
        given["weight_decay"] = weight_decay
    kind = _class_of(name)
    arguments = given | dict(arguments or {})
    _refuse_unknown(kind, arguments)

    def make(some: Sequence[Any]) -> torch.optim.Optimizer:
        groups = _muon_groups(some) if name == "muon" else list(some)
        with contextlib.redirect_stdout(io.StringIO()):  # prodigy says how it decays weights
            return kind(groups, lr=learning_rate, **arguments)

    try:
        if name not in TUNED:
            _try(make)
        return make(list(parameters))
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, AssertionError, RunError) as error:
        raise UsageError(f"optimizer = {name!r} cannot be used: {str(error).splitlines()[0]}") from error


def parse_arguments(given: Iterable[str]) -> dict[str, Any]:
    """ "betas=0.9,0.99" ... -> argument -> value, read as Python where possible, else as text.

    Raises:
        UsageError: not of the form key=value.
    """
    arguments: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"optimizer_args {text}: expected NAME=VALUE, such as betas=0.9,0.99")
        try:
            arguments[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[name] = value
    return arguments


def _class_of(name: str) -> Any:
    row = known_optimizer(name)
    try:
        kind = load_object(row.path, "optimizer")
    except UsageError as error:
        if row.package is not None:
            raise UsageError(f"optimizer = {name!r} needs a package: pip install {row.package}") from error
        if ":" not in name:
            names = ", ".join(OPTIMIZERS)
            raise UsageError(f"optimizer = {name!r}: choose one of {names}, or package.module:Class") from error
        raise
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise UsageError(f"optimizer = {name!r} is not a class of torch optimizers")
    return kind


def knows_argument(name: str, argument: str) -> bool:
    """Whether an optimizer's class has an argument; also where its package is missing, and nobody can say."""
    try:
        return argument in _arguments_of(_class_of(name))
    except UsageError:
        return True


def _arguments_of(kind: type) -> set[str]:
    """Arguments that a class or one that it inherits from names: some take all others, and pass over them."""
    named = {name for line in kind.__mro__ for name in inspect.signature(line.__init__).parameters}
    return named - {"self", "params", "lr", "args", "kwargs"}


def _refuse_unknown(kind: type, arguments: Mapping[str, Any]) -> None:
    """Raise UsageError for an argument that the class does not have."""
    names = _arguments_of(kind)
    for name in arguments:
        if name not in names:
            what = "give --learning_rate" if name == "lr" else f"{kind.__name__} has no such argument"
            raise UsageError(f"optimizer_args {name}: {what}")


def _muon_groups(some: Sequence[Any]) -> list[dict[str, Any]]:
    """Groups for Muon, which is for matrices; vectors are left to its AdamW."""
    groups = [dict(one) if isinstance(one, dict) else {"params": [one]} for one in some]
    split = []
    for group in groups:
        for matrices in (True, False):
            chosen = [p for p in group["params"] if (p.dim() >= 2) is matrices]
            if chosen:
                rate = {"lr": group["lr"]} if "lr" in group else {}
                factor = {"factor": group["factor"]} if "factor" in group else {}
                split.append({"params": chosen, "use_muon": matrices, **rate, **factor})
    return split


def _try(make: Callable[[Sequence[Any]], torch.optim.Optimizer]) -> None:
    """Step on a few numbers, and on from a checkpoint. Raises RunError, or what the optimizer raises, if that fails."""
    with torch.random.fork_rng(devices=[]):
        straight = _Trial(make)
        straight.steps(0, 4)
        first = _Trial(make)
        first.steps(0, 2)
        state = optimizer_state(first.optimizer, first.named)
        second = _Trial(make)
        for name, parameter in second.named.items():
            parameter.data.copy_(first.named[name])
        load_optimizer(second.optimizer, checkpoint.through_files(state), second.named, second.named)
        second.steps(2, 4)
    if not all(p.isfinite().all() for p in straight.named.values()):
        raise RunError("a trial step makes weights that are not finite")
    if not all(torch.equal(p, second.named[name]) for name, p in straight.named.items()):
        raise RunError("a trial that goes on from its saved state ends with other weights, so that no run could resume")


class _Trial:
    """An optimizer of a matrix and a vector."""

    def __init__(self, make: Callable[[Sequence[Any]], torch.optim.Optimizer]):
        shapes = {"matrix": (6, 4), "vector": (8,)}
        self.named = {
            name: nn.Parameter(torch.linspace(-1, 2, torch.Size(shape).numel()).view(shape))
            for name, shape in shapes.items()
        }
        self.optimizer = make(list(self.named.values()))
        switch_mode(self.optimizer, "train")

    def steps(self, start: int, end: int) -> None:
        for step in range(start, end):
            torch.manual_seed(step)
            for number, parameter in enumerate(self.named.values()):
                parameter.grad = torch.cos(torch.arange(parameter.numel()) + 3.0 * step + number).view_as(parameter)
            self.optimizer.step()


def parameter_groups(
    named: Mapping[str, nn.Parameter], blocks: Mapping[str, float], b_factor: float = 1.0
) -> list[dict[str, Any]]:
    """Parameters in groups of equal `factor`, by which the schedule's learning rate is multiplied.

    Args:
        named: name -> parameter.
        blocks: beginning of a name -> factor; the longest that fits holds.
        b_factor: of LoRA's matrix B (LoRA+, Hayou et al. 2024).
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in named.items():
        fitting = [begin for begin in blocks if name.startswith(begin)]
        factor = blocks[max(fitting, key=len)] if fitting else 1.0
        factor *= b_factor if ".lora_B." in name else 1.0
        groups.setdefault(factor, []).append(parameter)
    return [{"params": parameters, "factor": factor} for factor, parameters in groups.items()]
