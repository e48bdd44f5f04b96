"""Checkpoints: `checkpoint-N/` folders of safetensors and JSON, written whole or not at all. No pickle."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.errors import RunError
from finetune.files import flush_to_disk, flush_tree, remove

_NAME = re.compile(r"checkpoint-(\d+)")
_FILES = {"weights": "trainable.safetensors", "optimizer": "optimizer.safetensors", "ema": "ema.safetensors"}


def save(run_folder: Path, state: Mapping[str, Any], keep: int = 0) -> Path:
    """Write `checkpoint-<step>` into the run folder; then delete all but the newest `keep` (0 keeps all).

    Args:
        run_folder: an existing folder.
        state: a trainer's `state_dict`.
        keep: how many checkpoints stay.

    Returns:
        The checkpoint's folder.
    """
    folder = run_folder / f"checkpoint-{state['step']}"
    scratch = run_folder / f".{folder.name}.part"
    for left_over in run_folder.glob(".checkpoint-*"):  # of a save that was cut off
        shutil.rmtree(left_over)
    scratch.mkdir()
    moments, plain = _flatten_optimizer(state["optimizer"])
    contents = {"weights": state["weights"], "optimizer": moments, "ema": state["ema"]}
    files = [name for name, tensors in contents.items() if tensors]
    for name in files:
        tensors = {key: tensor.detach().contiguous() for key, tensor in contents[name].items()}
        save_file(tensors, scratch / _FILES[name])
    record = {name: state[name] for name in ("step", "updates", "scaler")} | {"optimizer": plain, "files": files}
    (scratch / "state.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    flush_tree(scratch)
    if folder.exists():
        remove(folder)
    scratch.rename(folder)
    flush_to_disk(run_folder)
    others = [path for _, path in checkpoints(run_folder) if path != folder]
    for old in others[: max(0, len(others) - keep + 1)] if keep else []:
        remove(old)
    return folder


def discard_after(run_folder: Path, step: int) -> None:
    """Delete the checkpoints above `step`: a run that resumes from there will not come to the same ones."""
    for later, folder in checkpoints(run_folder):
        if later > step:
            remove(folder)


def checkpoints(run_folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every whole checkpoint, oldest first."""
    found = [(int(m[1]), p) for p in run_folder.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name))]
    return sorted(found)


def step_of(folder: Path) -> int:
    """The steps done when a checkpoint was written, whatever it is called now. Raises RunError as `load` does."""
    try:
        return int(json.loads((folder / "state.json").read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder} is not a readable checkpoint: {error}") from error


def latest(run_folder: Path) -> Path | None:
    """The newest checkpoint's folder, or None."""
    found = checkpoints(run_folder)
    return found[-1][1] if found else None


def load(folder: Path) -> dict[str, Any]:
    """A checkpoint as a trainer's `load_state_dict` takes it, tensors on the CPU.

    Raises:
        RunError: a file is missing or damaged.
    """
    try:
        record = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        tensors = {name: load_file(folder / _FILES[name]) if name in record["files"] else {} for name in _FILES}
        return {
            "weights": tensors["weights"],
            "optimizer": _unflatten_optimizer(tensors["optimizer"], record["optimizer"]),
            "ema": tensors["ema"],
            "scaler": record["scaler"],
            "step": record["step"],
            "updates": record.get("updates", record["step"]),  # version 0.1.0 counted the steps that fp16 skipped
        }
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise RunError(f"{folder} is not a readable checkpoint: {error}") from error


def _flatten_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state_dict as tensors named "index.name" and the rest, fit for JSON.

    bitsandbytes keeps its tensors in a mapping of their own: "index.name/inner".
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for index, slots in state["state"].items():
        inner = {f"{n}/{i}": v for n, value in slots.items() if isinstance(value, Mapping) for i, v in value.items()}
        for name, value in ({n: v for n, v in slots.items() if not isinstance(v, Mapping)} | inner).items():
            (tensors if isinstance(value, Tensor) else values)[f"{index}.{name}"] = value
    return tensors, {"values": values, "param_groups": state["param_groups"]}


def _unflatten_optimizer(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **plain["values"]}.items():
        index, name = key.split(".", 1)
        slots, (name, _, inner) = state.setdefault(int(index), {}), name.partition("/")
        if inner:
            slots.setdefault(name, {})[inner] = value
        else:
            slots[name] = value
    groups = [
        {name: tuple(v) if isinstance(v, list) and name != "params" else v for name, v in group.items()}
        for group in plain["param_groups"]  # JSON made lists of the tuples (betas, eps)
    ]
    return {"state": state, "param_groups": groups}
