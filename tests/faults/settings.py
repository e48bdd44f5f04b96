"""What goes wrong inside the command's process, as functions that are called there before it begins."""

import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

_OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")


def at_operation(part: str, number: int, deed: Callable[[], None]) -> None:
    """Do something before the `number`th file operation (from 0) on a path in which the pattern `part` is found.

    fsync is one of them, since the file is opened for it.
    """
    seen = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _OPERATIONS or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        if re.search(part, os.fsdecode(arguments[0])):
            seen[0] += 1
            if seen[0] == number + 1:
                deed()

    sys.addaudithook(hook)


def signal_at(part: str, number: int, which: int = signal.SIGKILL) -> None:
    """Send a signal to the own process there."""
    at_operation(part, number, lambda: os.kill(os.getpid(), which))


def small_files_at(part: str, number: int, size: int) -> None:
    """From there on no file can grow beyond `size` bytes, as if the disk were full."""
    at_operation(part, number, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
