"""Files that this process holds locked, which a process that it forks must not hold as well."""

import os
from typing import IO, Any

held: set[IO[Any]] = set()


def _let_go() -> None:
    """A forked worker outlives a process that is killed, for some seconds, and would hold its files so long."""
    for file in held:
        file.close()
    held.clear()


os.register_at_fork(after_in_child=_let_go)
