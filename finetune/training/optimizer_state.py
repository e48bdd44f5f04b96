"""Optimizer state in checkpoints: moments and step counts, but no hyperparameters."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from finetune.errors import RunError

_STATE_IN_GROUPS = ("d", "d_max", "d_hat", "d_numerator", "d_denom", "k")
"""Entries of a parameter group that an optimizer changes itself: Prodigy's estimate of the step size (Mishchenko &
Defazio 2023, "Prodigy", algorithm 4). All others are hyperparameters."""


def optimizer_state(optimizer: torch.optim.Optimizer, held: Mapping[str, Tensor]) -> dict[str, Any]:
    """The optimizer's `state_dict`, its class as `kind`, and the `names` of its parameters in the order of its indices.

    Args:
        optimizer: whose state it is.
        held: name -> parameter, as the optimizer holds it; others are named by their index.
    """
    names_by_id = {id(parameter): name for name, parameter in held.items()}
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = [names_by_id.get(id(parameter), f"#{index}") for index, parameter in enumerate(order)]
    return {**optimizer.state_dict(), "kind": type(optimizer).__name__, "names": names}


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
    group_of = {number: group for group in groups for number in group["params"]}
    states = {number: saved["state"].get(index[name]) for number, name in enumerate(names)}
    return {
        "state": {number: _copied(state) for number, state in states.items() if state is not None},
        "param_groups": [
            {**group, **_state_of(group_of[index[name]], extra_entries)}
            for group in current["param_groups"]
            for name in names[group["params"][0] : group["params"][0] + 1]  # its first parameter
        ],
    }


def _state_of(group: Mapping[str, Any], extra_entries: Sequence[str]) -> dict[str, Any]:
    return {name: group[name] for name in (*_STATE_IN_GROUPS, *extra_entries) if name in group}


def _copied(state: Any) -> Any:
    """Copies: tensors of a checkpoint are mapped files, which would stay on the disk when the checkpoint is deleted."""
    if isinstance(state, Mapping):
        return {name: _copied(value) for name, value in state.items()}
    return state.clone() if isinstance(state, Tensor) else state
