"""Writer: a process that encodes into a shared folder. Its claims are released when it ends."""

import fcntl
import os
from pathlib import Path
from uuid import uuid4

WRITERS = "writers"


class Writer:
    """A name for this process, and a lock on a file of that name, which the system drops when the process ends."""

    def __init__(self, folder: Path) -> None:
        self.name = uuid4().hex
        (folder / WRITERS).mkdir(exist_ok=True)
        self._place = folder / WRITERS / self.name
        self._lock = os.open(self._place, os.O_CREAT | os.O_RDWR, 0o644)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        self._place.unlink(missing_ok=True)
        os.close(self._lock)


def dead(folder: Path, name: str) -> bool:
    """Whether the writer of that name has ended, however it did."""
    try:
        descriptor = os.open(folder / WRITERS / name, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
