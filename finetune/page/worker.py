"""Worker: runs short commands one after the other in a process that has imported the libraries."""

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from finetune.page.processes import CommandResult, command_line


class Worker:
    """Runs commands that end soon and write nothing but what they are asked to.

    Args:
        work: folder where commands run.
    """

    def __init__(self, work: Path) -> None:
        self._work, self._lock = work, threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    @property
    def process_id(self) -> int | None:
        """Of the process, once there is one."""
        return self._process.pid if self._process else None

    def warm_up(self) -> None:
        """Start the process, so that the first command need not wait for it."""
        if self._lock.acquire(blocking=False):  # else it is at work
            try:
                self._started()
            finally:
                self._lock.release()

    def end(self) -> None:
        """End the process, unless it is at work: it may hold memory of the GPU, which a run needs."""
        if self._lock.acquire(blocking=False):
            try:
                if self._process is not None:
                    self._process.kill()
                    self._process.wait()
            finally:
                self._lock.release()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "finetune.command_server"],
                cwd=self._work,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # a Ctrl-C at the page's terminal ends it by closing its input
            )
        return self._process

    def run(self, words: Sequence[str], *, timeout: float = 120) -> CommandResult:
        """Run a command, after those before it.

        Args:
            words: of the command, without the program's name.
            timeout: seconds after which it is killed.

        Returns:
            What it has printed, or why it failed.
        """
        with self._lock:
            process = self._started()
            line = _asked(process, words, timeout)
            if not line and process.wait() == 0:  # it had been idle for long, and ended just now
                process = self._started()
                line = _asked(process, words, timeout)
            if not line:
                why = f"no answer in {timeout:.0f} seconds, or ended with code {process.wait()}"
                return CommandResult(False, f"{command_line(words)}: {why}")
            return CommandResult(**json.loads(line))


def _asked(process: subprocess.Popen[str], words: Sequence[str], timeout: float) -> str:
    """The line that a process answers with; empty where it has ended, or was killed after `timeout` seconds."""
    assert process.stdin is not None
    assert process.stdout is not None
    killer = threading.Timer(timeout, process.kill)
    killer.start()
    try:
        process.stdin.write(json.dumps(list(words)) + "\n")
        process.stdin.flush()
        return process.stdout.readline()
    except BrokenPipeError:
        return ""
    finally:
        killer.cancel()
