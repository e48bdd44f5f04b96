"""The processes that the page starts: runs in sequence, each of which outlives the page."""

import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from finetune.errors import INTERRUPTED, UsageError

_TERMINAL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_LOOK = 0.5
"""Seconds between two looks at whether a run has ended."""


class CommandResult(NamedTuple):
    """What a command has printed."""

    ok: bool
    text: str


def command_line(words: Sequence[str]) -> str:
    """What a person would type."""
    return shlex.join(["finetune-unet", *words])


def run_command(words: Sequence[str], work: Path, *, timeout: float = 600) -> CommandResult:
    """Run a command that ends by itself, in the folder `work`; answers what it prints, or why it failed."""
    try:
        done = subprocess.run(
            _argv(words), cwd=work, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return CommandResult(False, f"{command_line(words)}: no answer in {timeout:.0f} seconds")
    text = done.stdout if done.returncode == 0 else last_error_line(done.stderr)
    return CommandResult(done.returncode == 0, text)


def last_error_line(stderr: str) -> str:
    """The last line that is not a progress bar's."""
    lines = [line for line in _TERMINAL.sub("", stderr).replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1] if lines else "it ended without a word"


def failure(code: int, stderr: str) -> str:
    """Why a run has failed, by its exit code and what it has complained; "" where it has ended or kept a checkpoint."""
    line = last_error_line(stderr)
    saved = code == 128 + signal.SIGINT and line != f"finetune-unet: {INTERRUPTED}"
    return line if code and not saved else ""


class Queue:
    """Training commands, one after the other.

    The one that runs goes on when the page is closed; those that wait are then forgotten.

    Args:
        work: where they run.
    """

    def __init__(self, work: Path) -> None:
        self._work_folder = work
        self._waiting: deque[list[str]] = deque()
        self._running: list[str] | None = None
        self._failed = ""
        self._lock = threading.Lock()
        self._worker: threading.Thread | None = None

    def add(self, words: Sequence[str]) -> None:
        """Start this training, when those before it have ended."""
        with self._lock:
            self._waiting.append(list(words))
            self._failed = ""
            if self._worker is None or not self._worker.is_alive():
                self._worker = threading.Thread(target=self._work, daemon=True)
                self._worker.start()

    def drop(self, number: int) -> None:
        """Take one of those that wait out of the queue."""
        with self._lock:
            if not 0 <= number < len(self._waiting):
                raise UsageError(f"number {number + 1}: {len(self._waiting)} are waiting")
            del self._waiting[number]

    def entries(self) -> tuple[str | None, list[str], str]:
        """The command that runs, those that wait, and why the last one failed, if it did."""
        with self._lock:
            running = command_line(self._running) if self._running else None
            return running, [command_line(words) for words in self._waiting], self._failed

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._running = self._worker = None
                    return
                self._running = self._waiting.popleft()
            with tempfile.TemporaryFile("w+") as errors:
                process = subprocess.Popen(
                    _argv(self._running),
                    cwd=self._work_folder,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,  # events.jsonl has it
                    stderr=errors,
                    start_new_session=True,  # a Ctrl-C at the page's terminal is not for it
                )
                while process.poll() is None:
                    time.sleep(_LOOK)
                errors.seek(0)
                text = errors.read()
            with self._lock:
                self._failed = failure(process.returncode, text) or self._failed


def _argv(words: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "finetune", *words]
