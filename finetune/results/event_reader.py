"""Reading events.jsonl while a run goes on: its state, curves, images and log.

Nothing is written or locked, so any number of readers can follow a run, wherever it was started.
"""

import json
import math
import os
import platform
import re
import signal
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import psutil

from finetune.errors import UsageError
from finetune.results.curves import LossCurve
from finetune.results.events import EVENTS

State = Literal["unknown", "running", "done", "stopped", "failed", "cut off"]

_TEXT = frozenset({"event", "name", "text", "state", "host", "path"})
"""Entries of an event that are text; all others are numbers, or lists of them."""

_GRID = re.compile(r"samples/step-\d+\.png")

_SILENT = 120.0
"""Seconds without an event after which a run on another machine is taken for dead."""


class RunEvents:
    """What a run's events add up to; `read` takes in those that are new.

    Args:
        folder: of the run; it need not be there, and may be deleted at any time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._forget()

    def _forget(self) -> None:
        self._offset, self._file = 0, -1
        self.stopping = False
        """Whether it was asked to stop, see `stop`."""
        self.begun: dict[str, Any] = {}
        self.end: dict[str, Any] | None = None
        self.phase = ""
        self.progress: dict[str, Any] = {}
        self.step: dict[str, Any] = {}
        self.at = 0.0
        """Of the last event, in seconds since 1970."""
        self.loss = LossCurve()
        self.learning_rates, self.speeds, self.memories = LossCurve(), LossCurve(), LossCurve()
        """Learning rate, images per second, and peak memory in GB."""
        self.validations: dict[int, dict[str, Any]] = {}
        self.forgetting: dict[int, dict[str, Any]] = {}
        self.copies: dict[int, dict[str, Any]] = {}
        self.pictures: dict[int, str] = {}
        """Step -> path in the folder."""
        self.said: deque[str] = deque(maxlen=300)

    def read(self) -> bool:
        """Take in the whole lines that are new. Answers whether there were any, or the folder is another one now."""
        path = self.folder / EVENTS
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                changed = status.st_ino != self._file or status.st_size < self._offset
                if changed:
                    self._forget()
                    self._file = status.st_ino
                file.seek(self._offset)
                new = file.read()
        except OSError:  # not there, or not any more
            changed = self._file != -1
            self._forget()
            return changed
        complete = new[: new.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.splitlines():
            try:
                event = json.loads(line)
            except ValueError:  # the rest of a line that a full disk has cut
                continue
            if isinstance(event, dict) and all(_is_plain(name, value) for name, value in event.items()):
                with suppress(KeyError):  # an event of another version may lack what this one reads
                    self._take(event)
        return changed or bool(complete)

    def _take(self, event: Mapping[str, Any]) -> None:
        self.at = event.get("at", self.at)
        match event.get("event"):
            case "begin":
                self._begin(dict(event))
            case "phase":
                self.phase, self.progress = event["name"], {}
            case "progress":
                self.phase, self.progress = "encoding", dict(event)
            case "step":
                self.step = dict(event)
                if event["loss"] is not None:
                    self.loss.add(event["step"], event["loss"])
                for name, measured in self._measured().items():
                    if event.get(name) is not None:
                        measured.add(event["step"], event[name])
            case "validation":
                self.validations[event["step"]] = dict(event)
            case "forgetting":
                self.forgetting[event["step"]] = dict(event)
            case "copies":
                self.copies[event["step"]] = dict(event)
            case "picture":
                if _GRID.fullmatch(event["path"]):
                    self.pictures[event["step"]] = event["path"]
            case "said":
                self.said.append(event["text"])
            case "end":
                self.end = dict(event)
            case _:
                pass

    def _measured(self) -> dict[str, LossCurve]:
        """What steps measure besides the loss, by its name in their events."""
        return {"lr": self.learning_rates, "images_per_second": self.speeds, "peak_memory_gb": self.memories}

    def _begin(self, event: dict[str, Any]) -> None:
        """A part of the run goes on from a checkpoint: what came after that is done again."""
        done = event["step"]
        self.begun, self.end, self.phase, self.progress, self.step = event, None, "starting", {}, {}
        self.stopping = False
        for curve in (self.loss, *self._measured().values()):
            curve.cut(done)
        for of_steps in (self.validations, self.forgetting, self.copies, self.pictures):
            for step in [step for step in of_steps if step > done]:
                del of_steps[step]

    @property
    def version(self) -> tuple[int, int, str, bool]:
        """Changes whenever there is more to tell."""
        return self._file, self._offset, self.state, self.stopping

    @property
    def state(self) -> State:
        if not self.begun:
            return "unknown"
        if self.end is not None:
            return self.end["state"]
        if self.begun["host"] != platform.node():
            return "running" if time.time() - self.at < _SILENT else "cut off"
        return "running" if self.process() else "cut off"

    def process(self) -> psutil.Process | None:
        """The process that runs it, if it lives, and lives here."""
        if not self.begun or self.begun["host"] != platform.node():
            return None
        try:
            process = psutil.Process(self.begun["pid"])
            alive = process.create_time() == self.begun["started"] and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return None
        return process if alive else None

    def stop(self) -> None:
        """Ask the run to stop with a checkpoint: once, for a second signal would end it without.

        Raises:
            UsageError: it does not run on this machine.
        """
        process = self.process()
        if process is None or self.end is not None:
            raise UsageError(f"{self.folder.name}: it is not running on this machine")
        if not self.stopping:
            self.stopping = True
            process.send_signal(signal.SIGINT)


def _is_plain(name: str, value: object) -> bool:
    """Whether an entry of an event is what the readers of it take it for."""
    if name in _TEXT:
        return isinstance(value, str)
    values = value if isinstance(value, list) else [value]
    return all(each is None or (isinstance(each, (int, float)) and math.isfinite(each)) for each in values)
