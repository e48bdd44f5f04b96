"""Queue: training commands, one after the other, kept in a file so that they outlive the page."""

import json
import os
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil

from finetune.atomic_io import write_whole
from finetune.errors import INTERRUPTED, UsageError
from finetune.page.processes import argv, command_line, last_error_line
from finetune.run.device_users import device_users

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
    device: str = ""
    """The GPU, by its number, that it runs on; empty: whichever the command takes."""
    waits_for: tuple[str, ...] = ()
    """Run folders of other processes that train there."""

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
    """Training commands, one after the other on each device.

    Those that run go on when the page is closed, and those that wait are found again by the next page. None begins
    while another process of this user trains on the device, also one that was started in a terminal.

    Args:
        work: where they run; the list is in `runs/.queue` there.
        devices: numbers of the GPUs to use; none: the one that the command takes, whichever that is.
    """

    def __init__(self, work: Path, devices: Sequence[str] = ()) -> None:
        self._work_folder, self._folder = work, work / "runs" / FOLDER
        self._devices = tuple(devices) or ("",)
        self._file = self._folder / "jobs.json"
        self._lock = threading.Lock()
        self._jobs: list[Job] = []
        with suppress(FileNotFoundError):
            kept = json.loads(self._file.read_text(encoding="utf-8"))
            self._jobs = [_job(fields) for fields in kept]
        self._workers: dict[str, threading.Thread] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
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

    def move_up(self, name: str) -> None:
        """Let a job that waits run before the one that waits before it. Raises UsageError for any other job."""
        with self._lock:
            waiting = [place for place, job in enumerate(self._jobs) if job.state == "waiting"]
            place = next((place for place in waiting if self._jobs[place].id == name), None)
            if place is None:
                raise UsageError(f"job {name}: it does not wait")
            if place != waiting[0]:
                before = waiting[waiting.index(place) - 1]
                self._jobs[before], self._jobs[place] = self._jobs[place], self._jobs[before]
                self._keep()

    def _keep(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_whole(self._file, json.dumps([asdict(job) for job in self._jobs], indent=1))

    def _begin(self) -> None:
        if all(job.state == "failed" for job in self._jobs):
            return
        lost = {job.device for job in self._jobs if job.state == "running"}  # of a page with other devices
        for device in {*self._devices, *lost}:
            if device not in self._workers:
                worker = threading.Thread(target=self._work, args=(device,), daemon=True)
                self._workers[device] = worker
                worker.start()

    def _work(self, device: str) -> None:
        while (job := self._next(device)) is not None:
            code = self._ended(job)
            log = self._log(job)
            text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
            error = failure(code, text)
            log.unlink(missing_ok=True)
            with self._lock:
                self._processes.pop(job.id, None)
                place = [other.id for other in self._jobs].index(job.id)
                self._jobs[place : place + 1] = [replace(job, state="failed", error=error)] if error else []
                self._keep()

    def _next(self, device: str) -> Job | None:
        """The job that runs on a device, of an earlier page, or the next one, started when nobody else trains there."""
        while True:
            with self._lock:
                job = self._running(device)
                waiting = [place for place, job in enumerate(self._jobs) if job.state == "waiting"]
                if job is None and (not waiting or device not in self._devices):
                    del self._workers[device]
                    return None
                others = self._others(device) if job is None else ()
                if job is None and not others:
                    job = self._jobs[waiting[0]] = self._started(replace(self._jobs[waiting[0]], device=device))
                    self._keep()
                if job is not None:
                    return job
                first = self._jobs[waiting[0]]
                if first.waits_for != others:
                    self._jobs[waiting[0]] = replace(first, waits_for=others)
            time.sleep(_POLL_SECONDS)

    def _running(self, device: str) -> Job | None:
        return next((job for job in self._jobs if (job.state, job.device) == ("running", device)), None)

    def _others(self, device: str) -> tuple[str, ...]:
        """Run folders of the processes that train on a device and are none of the queue's."""
        ours = {job.pid for job in self._jobs if job.state == "running"}
        return tuple(
            user.output_dir
            for user in device_users()
            if user.pid not in ours and (not device or user.device == f"cuda:{device}")
        )

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
                env=os.environ | ({"CUDA_VISIBLE_DEVICES": job.device} if job.device else {}),
            )
        self._processes[job.id] = process
        job = replace(job, waits_for=())
        with suppress(psutil.Error):  # it has ended already
            return replace(job, state="running", pid=process.pid, started=psutil.Process(process.pid).create_time())
        return replace(job, state="running", pid=process.pid)

    def _ended(self, job: Job) -> int | None:
        """Wait for a job, and return its exit code; None for one that an earlier page has started."""
        if job.id in self._processes:
            return self._processes[job.id].wait()
        while job.process() is not None:
            time.sleep(_POLL_SECONDS)
        return None

    def _log(self, job: Job) -> Path:
        return self._folder / f"{job.id}.log"


def _job(fields: dict[str, Any]) -> Job:
    """A job from the file of the list."""
    tuples = {name: tuple(fields.get(name, ())) for name in ("words", "waits_for")}
    return Job(**{**fields, **tuples})


def failure(code: int | None, stderr: str) -> str:
    """Why a run has failed, by its exit code and what it has printed; "" where it has ended or kept a checkpoint.

    `code` is None where nobody waited for it: then the last line decides, which names the command in errors only.
    """
    line = last_error_line(stderr)
    if code is None:
        return line if line.startswith("finetune-unet: ") and "is kept" not in line else ""
    saved = code == 128 + signal.SIGINT and line != f"finetune-unet: {INTERRUPTED}"
    return line if code and not saved else ""
