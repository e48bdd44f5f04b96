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

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
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
    plain = {name: state[name] for name in ("param_groups", "kind", "names") if name in state}
    return tensors, {"values": values, **plain}


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
    return {"state": state, "param_groups": groups, "kind": plain.get("kind"), "names": plain.get("names")}
