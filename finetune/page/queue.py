"""Queue: training commands, one after the other, kept in a file so that they outlive the page."""

import json
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import psutil

from finetune.atomic_io import write_whole
from finetune.errors import INTERRUPTED, UsageError
from finetune.page.processes import argv, command_line, last_error_line

FOLDER = ".queue"
"""In `runs/`: the list, and what the commands have printed."""
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """A training command in the queue."""

    id: str
    words: tuple[str, ...]
    state: Literal["waiting", "running", "failed"] = "waiting"
    pid: int = 0
    started: float = 0.0
    """When its process was created, in seconds since 1970: another process may get its number."""
    error: str = ""

    @property
    def command(self) -> str:
        """What a person would type."""
        return command_line(self.words)

    @property
    def values(self) -> dict[str, str]:
        """Option, with its dashes -> the word after it."""
        return dict(zip(self.words, self.words[1:], strict=False))

    @property
    def title(self) -> str:
        """The folders that it is about, and its model."""
        named = [self.values[option] for option in ("--data", "--output_dir", "--model") if option in self.values]
        return ", ".join(Path(name).name for name in named)

    def process(self) -> psutil.Process | None:
        """Its process, if it lives."""
        try:
            process = psutil.Process(self.pid)
            alive = process.create_time() == self.started and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return None
        return process if alive else None


class Queue:
    """Training commands, one after the other.

    The one that runs goes on when the page is closed, and those that wait are found again by the next page.

    Args:
        work: where they run; the list is in `runs/.queue` there.
    """

    def __init__(self, work: Path) -> None:
        self._work_folder, self._folder = work, work / "runs" / FOLDER
        self._file = self._folder / "jobs.json"
        self._lock = threading.Lock()
        self._jobs: list[Job] = []
        with suppress(FileNotFoundError):
            kept = json.loads(self._file.read_text(encoding="utf-8"))
            self._jobs = [Job(**{**job, "words": tuple(job["words"])}) for job in kept]
        self._worker: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None
        with self._lock:
            self._begin()

    def jobs(self) -> list[Job]:
        """Those that failed, run and wait, in this order of being added."""
        with self._lock:
            return list(self._jobs)

    def add(self, words: Sequence[str]) -> None:
        """Start this training, when those before it have ended."""
        with self._lock:
            self._jobs.append(Job(secrets.token_hex(4), tuple(words)))
            self._keep()
            self._begin()

    def remove(self, name: str) -> None:
        """Take a job that waits or has failed out of the list. Raises UsageError for one that runs or is not there."""
        with self._lock:
            job = next((job for job in self._jobs if job.id == name), None)
            if job is None or job.state == "running":
                raise UsageError(f"job {name}: {'it runs; stop its run' if job else 'not in the queue'}")
            self._jobs.remove(job)
            self._keep()

    def _keep(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_whole(self._file, json.dumps([asdict(job) for job in self._jobs], indent=1))

    def _begin(self) -> None:
        todo = any(job.state != "failed" for job in self._jobs)
        if todo and (self._worker is None or not self._worker.is_alive()):
            self._worker = threading.Thread(target=self._work, daemon=True)
            self._worker.start()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            code = self._ended(job)
            log = self._log(job)
            text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
            error = failure(code, text)
            log.unlink(missing_ok=True)
            with self._lock:
                place = [other.id for other in self._jobs].index(job.id)
                self._jobs[place : place + 1] = [replace(job, state="failed", error=error)] if error else []
                self._keep()

    def _next(self) -> Job | None:
        """The job that runs, of an earlier page, or the next one, started."""
        with self._lock:
            for place, job in enumerate(self._jobs):
                if job.state == "running":
                    return job
                if job.state == "waiting":
                    self._jobs[place] = started = self._started(job)
                    self._keep()
                    return started
            self._worker = None
            return None

    def _started(self, job: Job) -> Job:
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._log(job).open("w") as errors:
            process = subprocess.Popen(
                argv(job.words),
                cwd=self._work_folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # events.jsonl has it
                stderr=errors,
                start_new_session=True,  # a Ctrl-C at the page's terminal is not for it
            )
        self._process = process
        with suppress(psutil.Error):  # it has ended already
            return replace(job, state="running", pid=process.pid, started=psutil.Process(process.pid).create_time())
        return replace(job, state="running", pid=process.pid)

    def _ended(self, job: Job) -> int | None:
        """Wait for a job, and return its exit code; None for one that an earlier page has started."""
        if self._process is not None and self._process.pid == job.pid:
            return self._process.wait()
        while job.process() is not None:
            time.sleep(_POLL_SECONDS)
        return None

    def _log(self, job: Job) -> Path:
        return self._folder / f"{job.id}.log"


def failure(code: int | None, stderr: str) -> str:
    """Why a run has failed, by its exit code and what it has printed; "" where it has ended or kept a checkpoint.

    `code` is None where nobody waited for it: then the last line decides, which names the command in errors only.
    """
    line = last_error_line(stderr)
    if code is None:
        return line if line.startswith("finetune-unet: ") and "is kept" not in line else ""
    saved = code == 128 + signal.SIGINT and line != f"finetune-unet: {INTERRUPTED}"
    return line if code and not saved else ""
