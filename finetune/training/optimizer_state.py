"""Optimizer state in checkpoints: moments and step counts, but no hyperparameters."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from finetune.errors import RunError

_OF_PRODIGY = ("d", "d_max", "d_hat", "d_numerator", "d_denom", "k")
"""Entries of a parameter group that Prodigy changes itself (Mishchenko & Defazio 2023, "Prodigy", algorithm 4), for
checkpoints of versions that did not record such entries."""
_OF_THE_TRAINER = ("params", "lr", "initial_lr", "factor")
"""Entries of a parameter group that are the trainer's, not the optimizer's own."""


def optimizer_state(optimizer: torch.optim.Optimizer, held: Mapping[str, Tensor]) -> dict[str, Any]:
    """The optimizer's `state_dict`, its class as `kind`, and the `names` of its parameters in the order of its indices.

    `own` are the entries of its groups that the optimizer changes itself, such as a count of steps; the others are
    hyperparameters.

    Args:
        optimizer: whose state it is.
        held: name -> parameter, as the optimizer holds it; others are named by their index.
    """
    names_by_id = {id(parameter): name for name, parameter in held.items()}
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = [names_by_id.get(id(parameter), f"#{index}") for index, parameter in enumerate(order)]
    return {**optimizer.state_dict(), "kind": type(optimizer).__name__, "names": names, "own": _own_entries(optimizer)}


def _own_entries(optimizer: torch.optim.Optimizer) -> list[str]:
    """Entries of the groups that are not as the optimizer was made."""
    defaults = optimizer.defaults
    return sorted(
        {
            name
            for group in optimizer.param_groups
            for name, value in group.items()
            if name not in _OF_THE_TRAINER
            and isinstance(value, Tensor | int | float | str | None)
            and (name not in defaults or isinstance(value, Tensor) or value != defaults[name])
        }
    )


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    saved: Mapping[str, Any],
    held: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    extra_entries: Sequence[str] = (),
) -> None:
    """Give an optimizer the moments and step counts of a saved `optimizer_state`, by the names of its parameters.

    Args:
        optimizer: its hyperparameters stay.
        saved: of a checkpoint. Version 0.1.0 saved neither kind nor names; its order is that of the same options.
        held: name -> parameter, as the optimizer holds it.
        parameters: name -> the same in its own shape and memory layout, which moments of this shape get.
        extra_entries: further entries of the parameter groups that are taken from the checkpoint.

    Raises:
        RunError: the parameters are others, or the state is that of another kind of optimizer.
    """
    optimizer.load_state_dict(_merged(saved, optimizer_state(optimizer, held), extra_entries))
    for name, parameter in parameters.items():
        slots = optimizer.state.get(held[name], {})
        for slot, value in slots.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:  # files forget channels_last
                slots[slot] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _merged(saved: Mapping[str, Any], current: Mapping[str, Any], extra_entries: Sequence[str]) -> dict[str, Any]:
    """A `state_dict` with the saved state of each parameter and the current hyperparameters."""
    if (kind := saved.get("kind")) not in (None, current["kind"]):
        raise RunError(
            f"the checkpoint's optimizer is {kind}, whose state {current['kind']} cannot take over: go on with the "
            "same --optimizer, or begin a run with --init_lora"
        )
    groups: Sequence[Mapping[str, Any]] = saved["param_groups"]
    names: Sequence[str] = current["names"]
    then: Sequence[str] = saved.get("names") or names
    index = {name: number for number, name in enumerate(then)}
    if index.keys() != set(names) or len(then) != sum(len(group["params"]) for group in groups):
        raise RunError("the checkpoint's optimizer holds other parameters than this run trains")
    entries = (*saved.get("own", _OF_PRODIGY), *extra_entries)
    group_of = {number: group for group in groups for number in group["params"]}
    states = {number: saved["state"].get(index[name]) for number, name in enumerate(names)}
    return {
        "state": {number: _copied(state) for number, state in states.items() if state is not None},
        "param_groups": [
            {**group, **_state_of(group_of[index[name]], entries)}
            for group in current["param_groups"]
            for name in names[group["params"][0] : group["params"][0] + 1]  # its first parameter
        ],
    }


def _state_of(group: Mapping[str, Any], entries: Sequence[str]) -> dict[str, Any]:
    return {name: _copied(group[name]) for name in entries if name in group}


def _copied(state: Any) -> Any:
    """Copies: tensors of a checkpoint are mapped files, which would stay on the disk when the checkpoint is deleted."""
    if isinstance(state, Mapping):
        return {name: _copied(value) for name, value in state.items()}
    if isinstance(state, list):
        return [_copied(value) for value in state]
    return state.clone() if isinstance(state, Tensor) else state


def switch_mode(optimizer: torch.optim.Optimizer, mode: str) -> bool:
    """Switch a schedule-free optimizer between the weights of its steps ("train") and their average ("eval").

    Returns:
        Whether it is one; others have no such switch, and stay as they are.
    """
    switches = [getattr(optimizer, name, None) for name in ("train", "eval")]
    if not all(callable(switch) for switch in switches):
        return False
    getattr(optimizer, mode)()
    return True
