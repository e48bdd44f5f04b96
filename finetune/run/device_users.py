"""Which processes of this machine train on which device, so that a queue can wait for them."""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import portalocker

from finetune.cache.folder import default_folder
from finetune.run.held_files import held


class DeviceUser(NamedTuple):
    """A process that trains."""

    device: str
    """cpu, mps, or cuda: and the number or name of the GPU."""
    pid: int
    output_dir: str


def device_name(kind: str, index: int | None) -> str:
    """What a device of torch is called on this machine, whatever CUDA_VISIBLE_DEVICES makes of its number.

    Args:
        kind: cpu, cuda or mps.
        index: of the device in this process; None: the first one.
    """
    if kind != "cuda":
        return kind
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    number = index or 0
    return f"cuda:{visible[number] if number < len(visible) else number}"


@contextmanager
def using_device(device: str, output_dir: Path) -> Iterator[None]:
    """Let `device_users` see that this process trains on a device, until the block or the process ends.

    Args:
        device: see `device_name`.
        output_dir: the run folder.
    """
    path = _folder() / f"{uuid.uuid4().hex}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w", encoding="utf-8")
    except OSError:  # a home that cannot be written: nothing can wait for this process
        yield
        return
    held.add(file)
    with contextlib.suppress(portalocker.LockException, OSError):  # a file system without locks, or a full one
        portalocker.lock(file, portalocker.LOCK_EX | portalocker.LOCK_NB)
        json.dump(DeviceUser(device, os.getpid(), str(output_dir))._asdict(), file)
        file.flush()
    try:
        yield
    finally:
        held.discard(file)
        file.close()
        path.unlink(missing_ok=True)


def device_users() -> list[DeviceUser]:
    """The processes of this user that train on this machine."""
    users = []
    for path in sorted(_folder().glob("*.json")):
        try:
            with path.open("r+", encoding="utf-8") as file:
                try:
                    portalocker.lock(file, portalocker.LOCK_EX | portalocker.LOCK_NB)
                except portalocker.AlreadyLocked:
                    users.append(DeviceUser(**json.load(file)))
                    continue
            path.unlink(missing_ok=True)  # its process was killed
        except (OSError, ValueError, TypeError, portalocker.LockException):  # just being written or deleted
            continue
    return users


def _folder() -> Path:
    return default_folder() / "devices"
