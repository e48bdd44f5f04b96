"""Visitors of the page: their names and tokens, and what each has changed."""

import json
import re
import threading
import time
import tomllib
from pathlib import Path
from typing import NamedTuple

from finetune.errors import UsageError

_SHORTEST_TOKEN = 16
"""Characters: shorter ones could be tried out."""


class Visitor(NamedTuple):
    """Somebody who has a token."""

    name: str
    may_change: bool = True
    """Whether runs may be started and files written; otherwise the page only shows."""


def read_visitors(path: Path) -> dict[str, Visitor]:
    """Token -> visitor, from a TOML file: a table `[users]` or `[viewers]` of names and tokens.

    Raises:
        UsageError: the file cannot be read, or a token is short, doubled or no text that an address can hold.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--users {path}: {getattr(error, 'strerror', None) or error}") from error
    if unknown := tables.keys() - {"users", "viewers"}:
        raise UsageError(f"--users {path}: no table {min(unknown)}; expected [users] and [viewers]")
    visitors: dict[str, Visitor] = {}
    for table, may_change in (("users", True), ("viewers", False)):
        for name, token in tables.get(table, {}).items():
            if not isinstance(token, str) or not re.fullmatch(rf"[\w-]{{{_SHORTEST_TOKEN},}}", token, re.ASCII):
                why = f"expected {_SHORTEST_TOKEN} or more letters, digits, - and _"
                raise UsageError(f"--users {path}: the token of {name}: {why}")
            if token in visitors:
                raise UsageError(f"--users {path}: {name} and {visitors[token].name} have the same token")
            visitors[token] = Visitor(name, may_change)
    if not visitors:
        raise UsageError(f'--users {path}: no user; expected [users] and lines such as anna = "a long token"')
    return visitors


class AuditLog:
    """A line of JSON for each request that may change something.

    Args:
        path: of the file, which is made with its folder when the first line is written.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()

    def write(self, visitor: str, path: str) -> None:
        """Note that a visitor has posted to a path."""
        line = json.dumps({"at": round(time.time(), 3), "visitor": visitor, "path": path})
        with self._lock:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
