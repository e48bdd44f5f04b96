"""events.jsonl: what a run is doing, one JSON object per line, for pages and programs that follow it.

Each line has `at` (seconds since 1970), `event`, and what that event tells:

    begin     pid, started (of that process), host, step and total: a part of the run begins after so many steps
    phase     name: loading, encoding, training, validating, forgetting, sampling, exporting; and the step
    progress  name, done and total of what is encoded
    step      a line of metrics.jsonl and of timings.jsonl, and left: seconds that the steps to come will take
    validation, forgetting, copies   what validation.jsonl, forgetting.jsonl and copies.jsonl say of a step
    picture   path in the run folder, and the step
    said      text: a line that was logged
    end       state: done, stopped or failed; and why
"""

import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import RawIOBase
from pathlib import Path
from typing import Any

import psutil

from finetune.errors import FinetuneError, Interrupted
from finetune.log_handlers import line_of

EVENTS = "events.jsonl"

_PAUSE = 0.5
"""Seconds between two lines of progress."""


class Events:
    """Writes events. Until there is a folder to write to they wait."""

    def __init__(self) -> None:
        self._waiting: list[str] = []
        self._file: RawIOBase | None = None
        self._progressed = 0.0

    @contextmanager
    def written_to(self, folder: Path, *, step: int, total: int, anew: bool) -> Iterator[None]:
        """Write events to the folder's file as soon as they are emitted; the last one says how the run ended.

        Args:
            folder: of the run.
            step, total: done before, and wanted.
            anew: forget what an earlier run has left there; else it is gone on with.
        """
        waited, state, text = self._waiting, "failed", ""
        # Without a buffer, which would hold what a full disk has refused, and fail again when the file is closed.
        with (folder / EVENTS).open("wb" if anew else "ab", buffering=0) as self._file:
            me = {"pid": os.getpid(), "started": psutil.Process().create_time(), "host": platform.node()}
            self.emit("begin", **me, step=step, total=total)
            self._file.write("".join(waited).encode("ascii"))
            try:
                yield
                state = "done"
            except FinetuneError as error:
                state, text = "stopped" if isinstance(error, Interrupted) else "failed", str(error)
                raise
            finally:
                with suppress(OSError):  # a full disk: that is told already
                    self.emit("end", state=state, text=text)
                self._file, self._waiting = None, []

    def emit(self, event: str, /, **values: Any) -> None:
        """Something happened."""
        kind = {"at": round(time.time(), 3), "event": event}
        line = json.dumps(kind | values | kind) + "\n"  # whatever the values are called
        if self._file is None:
            self._waiting.append(line)
        else:
            self._file.write(line.encode("ascii"))  # as json escapes all else

    def set_phase(self, name: str, step: int) -> None:
        """From now on this is done."""
        self.emit("phase", name=name, step=step)

    def progress(self, name: str, done: int, total: int) -> None:
        """Emit the progress of a long operation, at most twice a second, and at its end."""
        now = time.monotonic()
        if done == total or now - self._progressed >= _PAUSE:
            self._progressed = now
            self.emit("progress", name=name, done=done, total=total)


class EventHandler(logging.Handler):
    """Emits an event for each line that is logged.

    Args:
        events: of the run.
    """

    def __init__(self, events: Events) -> None:
        super().__init__()
        self._events = events

    def emit(self, record: logging.LogRecord) -> None:
        """Emit the record. Unlike the handlers of the standard library it passes errors on: the disk may be full."""
        for line in line_of(record).split("\n"):
            self._events.emit("said", text=line)
