"""The lock by which one process at a time trains in a run folder."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import portalocker

from finetune.errors import UsageError, first_line

LOCK = ".lock"
"""A file in a run folder, which the process that trains there holds locked."""

_held: set[TextIO] = set()


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
    _held.add(file)
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
        _held.discard(file)
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


def _let_go() -> None:
    """A forked worker outlives a process that is killed, for some seconds, and would hold its folder so long."""
    for file in _held:
        file.close()
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
