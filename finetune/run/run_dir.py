"""RunDir: a run folder, its lock, and how a run begins and ends in it."""

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import portalocker

from finetune.atomic_io import remove, write_whole
from finetune.config import ResolvedConfig, TrainConfig, config_text, own_version, replace
from finetune.data.data_source import called
from finetune.errors import UsageError, first_line
from finetune.results import metrics_log
from finetune.results.export import MOVING, has_own_parts, kohya_files, names_of_exports
from finetune.run.held_files import held
from finetune.training.checkpoint import checkpoints, latest

_CLEARED_LAST = ("result.json", metrics_log.METRICS, "config.toml")
"""Files that tell a run's folder from a stranger's: one that was killed while it deleted them can still be cleared."""


@dataclass(frozen=True)
class RunDir:
    """Where a run lives and where it goes on."""

    path: Path
    checkpoint: Path | None = None
    """Resume from here; None: start from the beginning."""
    step: int = 0
    """Steps that were done there."""
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the checkpoint says of the run that wrote it."""
    finished: bool = False
    note: str = ""
    """For the user about what was found, a line each; may be empty."""
    overwrite: bool = False
    """An earlier run is to be deleted when this one starts."""
    mark: str = ""
    """Of this run, for those that find its folder locked."""


_NAMED = 4
"""Sources of pictures that are all named in a folder's name."""


def default_folder(config: TrainConfig) -> Path:
    """runs/<data>-<model>, relative to the working directory."""
    return Path("runs") / f"{name_of(config.data)}-{Path(config.model).name.removesuffix('.safetensors')}"


def name_of(data: Sequence[str]) -> str:
    """What the sources of pictures are called together; of many, as a shell makes of a pattern, the first."""
    names = [called(source) for source in data]
    return "+".join(names if len(names) <= _NAMED else [names[0], f"{len(names) - 1}-more"]) or "dataset"


def begin(folder: RunDir, config: ResolvedConfig, data: str, *, written: Sequence[str]) -> None:
    """All is loaded and training starts: delete what it replaces, and record the config and the data's digest.

    Args:
        folder: of the run.
        config: of the run.
        data: the digest.
        written: patterns of what runs write into their folders, beside their exports.
    """
    cut_off = folder.checkpoint is None and (folder.path / "data.json").exists()  # an earlier start, no checkpoint yet
    if folder.overwrite or cut_off:
        _clear(folder.path, written)
    (folder.path / "result.json").unlink(missing_ok=True)
    once = {"overwrite_output_dir": False, "resume_from_checkpoint": None, "allow_changed": ()}
    recorded = replace(config, config.given - once.keys(), **once)
    write_whole(folder.path / "data.json", json.dumps({"digest": data}) + "\n")
    write_whole(folder.path / "config.toml", config_text(recorded))  # which alone would be a stranger's


def finish(folder: Path, result: dict[str, Any]) -> None:
    """Mark the run as finished: `result.json`, written last."""
    write_whole(folder / "result.json", json.dumps(result | {"version": own_version()}, indent=1) + "\n")


def is_run(path: Path) -> bool:
    """True where a run of ours has trained at least a step, or has ended."""
    return (path / "config.toml").exists() and (path / "data.json").exists() and has_trained(path)


def holds_a_model(path: Path) -> bool:
    return any((path / name).exists() for name in ("result.json", *names_of_exports()))


def has_trained(path: Path) -> bool:
    return (path / "metrics.jsonl").exists() or (path / "result.json").exists() or latest(path) is not None


def is_data_of(path: Path, data: str) -> bool:
    """Whether a run folder's run trains on the pictures of this digest."""
    return _digest(path) == data


def _digest(path: Path) -> str | None:
    """The digest of the pictures that a run trains on; None where its record is damaged."""
    try:
        return json.loads((path / "data.json").read_text(encoding="utf-8"))["digest"]
    except (ValueError, KeyError, TypeError):
        return None


def _clear(path: Path, written: Sequence[str]) -> None:
    """Delete what a run writes, by name, and leave all else; last what tells it from a stranger's folder."""
    exports = names_of_exports()[::-1]  # the marks last: without them what is named like a part is the user's own
    for name in (*exports, MOVING) if has_own_parts(path) else exports[-1:]:
        remove(path / name)
    for _, saved in (*checkpoints(path), *kohya_files(path)):
        remove(saved)
    for pattern in (*(name for name in written if name not in _CLEARED_LAST), *_CLEARED_LAST):
        for entry in path.glob(pattern):
            remove(entry)


LOCK = ".lock"
"""A file in a run folder, which the process that trains there holds locked."""


@contextmanager
def occupied(folder: Path, mark: str, *, lock: bool = True) -> Iterator[None]:
    """Make the folder, show that it can be written, and hold it: inside, no other process can run in it.

    The system drops the lock when the process ends, however it ends.

    Args:
        folder: of the run.
        mark: tells this run from others, written into the lock.
        lock: False: hold nothing, where a file system has no locks.

    Raises:
        UsageError: it cannot be written or locked, or another process holds it.
    """
    try:
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        file = (folder / LOCK).open("a") if lock else None  # NFS locks only what is open for writing
    except OSError as error:
        raise UsageError(f"output_dir {folder} cannot be written: {error.strerror}") from error
    if file is None:
        yield
        return
    held.add(file)
    try:
        try:
            portalocker.lock(file, portalocker.LOCK_EX | portalocker.LOCK_NB)
            file.truncate(0)
            file.write(mark)
            file.flush()
        except portalocker.AlreadyLocked as error:
            raise UsageError(f"output_dir {folder}: another process is training in it") from error
        except (portalocker.LockException, OSError) as error:
            raise UsageError(
                f"output_dir {folder} cannot be locked ({first_line(error)}): choose one on another file system, "
                "or give --no_lock_output_dir and start no second run in it"
            ) from error
        yield
    finally:
        held.discard(file)
        file.close()


def held_by_another(path: Path, mark: str) -> bool:
    """Whether a process that does another run holds the folder."""
    theirs = mark
    try:
        with (path / LOCK).open("r+") as file:
            theirs = file.read()
            portalocker.lock(file, portalocker.LOCK_EX | portalocker.LOCK_NB)
    except portalocker.AlreadyLocked:
        return theirs != mark
    except (OSError, portalocker.LockException):  # there is none, or nothing can be locked here
        return False
    return False
