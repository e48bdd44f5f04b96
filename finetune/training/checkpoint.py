"""Checkpoints: `checkpoint-N/` folders of safetensors and JSON, written atomically. No pickle.

`manifest.json` has the size and SHA-256 of every other file, so that a damaged checkpoint is known as one before
anything is taken from it.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import load_file, save_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from finetune.atomic_io import as_readable_as, flush_to_disk, flush_tree, remove
from finetune.errors import RunError

FILES = (".checkpoint-*.part",)
"""Patterns of what is written into a run folder here, apart from the checkpoints."""

_NAME = re.compile(r"checkpoint-(\d+)")
_FILES = {"weights": "trainable.safetensors", "optimizer": "optimizer.safetensors", "ema": "ema.safetensors"}
_STATE, _MANIFEST = "state.json", "manifest.json"
_FORMAT = 2
"""Of the folder. 1, which says nothing of it, had no manifest."""


def save(
    run_folder: Path, state: Mapping[str, Any], keep: int = 0, provenance: Mapping[str, Any] | None = None
) -> Path:
    """Write `checkpoint-<step>` into the run folder; then delete all but the newest `keep` (0 keeps all).

    Args:
        run_folder: an existing folder.
        state: a trainer's `state_dict`.
        keep: how many checkpoints stay.
        provenance: what a resume compares with what it finds, fit for JSON (see `record`).

    Returns:
        The checkpoint's folder.

    Raises:
        OSError, SafetensorError: it cannot be written; those that are there already stay as they are.
    """
    folder = folder_of(run_folder, state["step"])
    scratch = run_folder / f".{folder.name}.part"
    discard_left_overs(run_folder)
    try:
        _write(scratch, state, provenance or {})
        if folder.exists():
            remove(folder)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # of a save that failed
    flush_to_disk(run_folder)
    _prune(run_folder, keep, newest=folder)
    return folder


def folder_of(run_folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return run_folder / f"checkpoint-{step}"


def _write(folder: Path, state: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
    """All files of a checkpoint, on the disk when this returns."""
    folder.mkdir()
    moments, plain = _flatten_optimizer(state["optimizer"])
    contents = {"weights": state["weights"], "optimizer": moments, "ema": state["ema"]}
    files = [name for name, tensors in contents.items() if tensors]
    for name in files:
        tensors = {key: tensor.detach().contiguous() for key, tensor in contents[name].items()}
        save_file(tensors, folder / _FILES[name])
    plainly = {name: state[name] for name in state if name not in contents}
    record = {"format": _FORMAT, **plainly, "optimizer": plain, "files": files, "about": dict(provenance)}
    (folder / _STATE).write_text(json.dumps(record, indent=1), encoding="utf-8")
    for name in files:
        as_readable_as(folder / _FILES[name], folder / _STATE)
    flush_tree(folder)
    (folder / _MANIFEST).write_text(json.dumps(_digests(sorted(folder.iterdir())), indent=1), encoding="utf-8")
    flush_tree(folder)


def _digests(files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each, by name."""
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(_sha256, files))
    return {path.name: {"size": path.stat().st_size, "sha256": d} for path, d in zip(files, digests, strict=True)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def discard_left_overs(run_folder: Path) -> None:
    """Delete what a save or a deletion has left that was cut off."""
    for left_over in run_folder.glob(".checkpoint-*"):
        shutil.rmtree(left_over)


def _prune(run_folder: Path, keep: int, newest: Path) -> None:
    """Delete all checkpoints but `newest` and the `keep` - 1 highest of the others; 0 keeps all."""
    others = [path for _, path in checkpoints(run_folder) if path != newest]
    for old in others[: max(0, len(others) - keep + 1)] if keep else []:
        remove(old)


def discard_others(run_folder: Path, step: int, keep: int = 0) -> None:
    """Delete the checkpoints that a run which resumes from `step` should not find.

    These are the later ones, which it will not come to in the same way, and those that `save` would have deleted after
    that step, had it not been killed in between: all but the newest `keep` (0 keeps all).
    """
    discard_left_overs(run_folder)
    for later, folder in checkpoints(run_folder):
        if later > step:
            remove(folder)
    _prune(run_folder, keep, newest=folder_of(run_folder, step))


def checkpoints(run_folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, oldest first."""
    matches = [(int(m[1]), p) for p in run_folder.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name))]
    return sorted(matches)


def latest(run_folder: Path) -> Path | None:
    """The newest checkpoint's folder, whole or damaged, or None."""
    existing = checkpoints(run_folder)
    return existing[-1][1] if existing else None


def newest_whole(run_folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is as it was written (None: there is none at all), and what is wrong with newer ones.

    Raises:
        RunError: there are checkpoints, and each is damaged.
    """
    damaged = []
    for _, folder in reversed(checkpoints(run_folder)):
        try:
            verify(folder)
        except RunError as error:
            damaged.append(str(error))
        else:
            return folder, damaged
    if damaged:
        reasons = "; ".join(damaged)
        raise RunError(f"{reasons}: there is no other checkpoint to resume from; delete them to start again")
    return None, []


def verify(folder: Path) -> None:
    """Read a checkpoint and compare it with its manifest. Raises RunError naming the file that is not as written."""
    state = record(folder)
    if not (folder / _MANIFEST).is_file():
        if "format" in state:
            raise RunError(f"{folder} is not a complete checkpoint: {_MANIFEST} is missing")
        return
    try:
        manifest = dict(json.loads((folder / _MANIFEST).read_bytes()))
        digests = _digests([path for path in folder.iterdir() if path.name in manifest])
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{folder} is not a complete checkpoint: {_MANIFEST}: {error}") from error
    if bad := [name for name in manifest if manifest[name] != digests.get(name)]:
        how = "is not as it was written" if bad[0] in digests else f"is missing, which {_MANIFEST} names"
        raise RunError(f"{folder} is not a complete checkpoint: {bad[0]} {how}")


def record(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's state.json: `step` and the `provenance` given to `save`. Raises RunError as `load` does."""
    try:
        state = json.loads((folder / _STATE).read_bytes())
        return {"about": {}} | state | {"step": int(state["step"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder} is not a readable checkpoint: {_STATE}: {error}") from error


def load(folder: Path) -> dict[str, Any]:
    """A checkpoint as a trainer's `load_state_dict` takes it, tensors on the CPU.

    Raises:
        RunError: a file is missing or damaged.
    """
    verify(folder)
    state = record(folder)
    try:
        tensors = {name: load_file(folder / _FILES[name]) if name in state["files"] else {} for name in _FILES}
        return {
            "updates": state["step"],  # version 0.1.0 counted the steps that fp16 skipped
            **{name: value for name, value in state.items() if name not in ("format", "files", "about")},
            "weights": tensors["weights"],
            "optimizer": _unflatten_optimizer(tensors["optimizer"], state["optimizer"]),
            "ema": tensors["ema"],
        }
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise RunError(f"{folder} is not a readable checkpoint: {error}") from error


def weights_file(folder: Path, *, ema: bool) -> Path:
    """The file of a checkpoint's trained weights, or of the averaged ones, if asked for and there.

    Raises:
        RunError: a file of the checkpoint is missing or damaged.
    """
    verify(folder)
    averaged = folder / _FILES["ema"]
    return averaged if ema and averaged.is_file() else folder / _FILES["weights"]


def through_files(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state as a checkpoint would return it.

    Raises:
        TypeError, SafetensorError: it holds what no checkpoint can.
    """
    tensors, plain = _flatten_optimizer(state)
    return _unflatten_optimizer(from_bytes(to_bytes(tensors)), json.loads(json.dumps(plain)))


def _flatten_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state_dict as tensors named "index.name" and the rest, fit for JSON.

    Some keep their tensors in mappings and lists of their own: "index.name/key", "index.name/[0]"; some, in their
    parameter groups: "group index.name".
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    strides: dict[str, list[int]] = {}

    def put(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            tensors[name] = value.detach().contiguous()
            if not value.is_contiguous():  # sums over another layout round otherwise
                strides[name] = list(value.stride())
        elif isinstance(value, Mapping):
            for key, inner in value.items():
                put(f"{name}/{key}", inner)
        elif isinstance(value, list):
            values[f"{name}/length"] = len(value)
            for number, inner in enumerate(value):
                put(f"{name}/[{number}]", inner)
        else:
            values[name] = value

    for index, slots in state["state"].items():
        for name, value in slots.items():
            put(f"{index}.{name}", value)
    entries = state.get("own", ())
    groups = []
    for index, group in enumerate(state["param_groups"]):
        for name in entries:
            if isinstance(group.get(name), Tensor):
                tensors[f"group {index}.{name}"] = group[name].detach().contiguous()
        groups.append({n: v for n, v in group.items() if n in entries or _fits_json(v)} if entries else group)
        groups[-1] = {n: v for n, v in groups[-1].items() if not isinstance(v, Tensor)}
    plain = {name: state[name] for name in ("kind", "names") if name in state} | ({"own": entries} if entries else {})
    plain |= {"strides": strides} if strides else {}
    return tensors, {"values": values, "param_groups": groups, **plain}


def _fits_json(value: Any) -> bool:
    """Whether a hyperparameter can be recorded; a function cannot, and is none of the state."""
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _unflatten_optimizer(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    groups = [
        {name: tuple(v) if isinstance(v, list) and name != "params" else v for name, v in group.items()}
        for group in plain["param_groups"]  # JSON made lists of the tuples (betas, eps)
    ]
    laid_out = {name: _with_strides(tensors[name], strides) for name, strides in plain.get("strides", {}).items()}
    for key, value in {**tensors, **laid_out, **plain["values"]}.items():
        index, name = key.split(".", 1)
        if index.startswith("group "):
            groups[int(index.removeprefix("group "))][name] = value
            continue
        slots = state.setdefault(int(index), {})
        *outer, last = name.split("/")
        for part in outer:
            slots = slots.setdefault(part, {})
        slots[last] = value
    listed = {index: {name: _as_list(value) for name, value in slots.items()} for index, slots in state.items()}
    rest = {"kind": plain.get("kind"), "names": plain.get("names")} | ({"own": plain["own"]} if "own" in plain else {})
    return {"state": listed, "param_groups": groups, **rest}


def _with_strides(tensor: Tensor, strides: Sequence[int]) -> Tensor:
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _as_list(value: Any) -> Any:
    """What was a list before it was flattened, as a list."""
    if not isinstance(value, dict):
        return value
    if "length" in value and all(name == "length" or name[0] == "[" for name in value):
        return [_as_list(value[f"[{number}]"]) for number in range(value["length"])]
    return {name: _as_list(inner) for name, inner in value.items()}
