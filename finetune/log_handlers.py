"""Log handlers: messages of the package as lines of text, or as JSON, on standard output.

Every module logs to `logging.getLogger(__name__)`. The command installs a handler; a program that has configured
logging itself keeps its own, and `fine_tune` adds one only where there is none.
"""

import json
import logging
import os
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from shutil import get_terminal_size
from typing import Any

PACKAGE = logging.getLogger("finetune")

LABEL_WIDTH = 12
"""Columns of the labels in front of the rows of a table."""

_NOTE = "note"
"""The label of a warning."""

_BOLD, _YELLOW, _PLAIN = "\x1b[1m", "\x1b[33m", "\x1b[0m"


def labelled(label: str, /, **values: Any) -> dict[str, Any]:
    """The `extra` of a log record that is a row of a table.

    Args:
        label: of the row; "" for none.
        values: what the message says, for handlers that write JSON.
    """
    return {"label": label, "values": values}


def row(label: str, text: str) -> str:
    """A row of a table as one line: the label in its column, then the text."""
    return f"{label:<{LABEL_WIDTH}} {text}" if label else text


def line_of(record: logging.LogRecord) -> str:
    """The record as one line of text: a row where it has a label, and a warning is a row that is labelled as a note."""
    return row(_label(record), record.getMessage())


def _label(record: logging.LogRecord) -> str:
    return getattr(record, "label", _NOTE if record.levelno >= logging.WARNING else "")


class TextHandler(logging.Handler):
    """Writes lines to standard output; on a terminal they are wrapped to its width, above a progress bar.

    Unlike the handlers of the standard library it passes errors on, so that a program whose reader has gone ends.
    """

    def __init__(self) -> None:
        super().__init__()
        self._process = os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record."""
        out = sys.stdout
        if out is None:  # a program without a console
            return
        text = _for_terminal(record) if out.isatty() else line_of(record)
        tqdm = sys.modules.get("tqdm")
        if tqdm is None or os.getpid() != self._process:  # a forked process may have inherited tqdm's lock as held
            print(text, file=out, flush=True)
        else:
            tqdm.tqdm.write(text, file=out)
            out.flush()


def _for_terminal(record: logging.LogRecord) -> str:
    label, message = _label(record), record.getMessage()
    width = max(40, get_terminal_size().columns)
    indent = " " * (LABEL_WIDTH + 1) if label else "  "
    text = "\n".join(
        textwrap.fill(
            row(label, line),
            width,
            subsequent_indent=indent,
            break_long_words=False,  # a path that is cut could not be copied
            break_on_hyphens=False,
        )
        for line in message.split("\n")
    )
    if not label or "NO_COLOR" in os.environ:
        return text
    color = _YELLOW if record.levelno >= logging.WARNING else _BOLD
    return f"{color}{text[: len(label)]}{_PLAIN}{text[len(label) :]}"


class JsonHandler(logging.Handler):
    """Writes each record to standard output as a line of JSON: time, level, logger, message, label and values."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        label, values = getattr(record, "label", ""), getattr(record, "values", {})
        print(json.dumps(values | line | ({"label": label} if label else {})), flush=True)


def install(handler: logging.Handler) -> None:
    """Make this the handler of the package, at level INFO, in the place of one that was installed before."""
    for old in [old for old in PACKAGE.handlers if isinstance(old, (TextHandler, JsonHandler))]:
        PACKAGE.removeHandler(old)
    PACKAGE.addHandler(handler)
    PACKAGE.setLevel(logging.INFO)


@contextmanager
def logging_to(*handlers: logging.Handler, silent: bool = False) -> Iterator[None]:
    """Add handlers for a while, and `TextHandler` where the program has configured no logging.

    Args:
        handlers: added to those that there are.
        silent: log errors alone, as processes do that are not the main one.
    """
    level = PACKAGE.level
    added = list(handlers) if PACKAGE.hasHandlers() else [TextHandler(), *handlers]
    if len(added) > len(handlers) and level == logging.NOTSET:
        PACKAGE.setLevel(logging.INFO)
    if silent:
        PACKAGE.setLevel(logging.ERROR)
    for handler in added:
        PACKAGE.addHandler(handler)
    try:
        yield
    finally:
        for handler in added:
            PACKAGE.removeHandler(handler)
        PACKAGE.setLevel(level)
