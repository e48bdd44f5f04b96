"""The command in a process of its own that has imported everything already: to be killed, starved and compared."""

import hashlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

_SERVER = multiprocessing.get_context("forkserver")  # has imported, and computed nothing: its children may do anything
_SERVER.set_forkserver_preload(["finetune.recipe", "finetune.results.sampling", "finetune.results.verify"])

OF_THE_MACHINE = ("timings.jsonl", "events.jsonl", "report.html")
"""Files that tell of it, and so differ."""

Setting = Callable[[], None]
"""What is done in the process before the command: it may break whatever the command needs."""


@dataclass(frozen=True)
class Started:
    """A command that runs."""

    process: BaseProcess
    folder: Path
    """Where it runs, and `said.txt` is what it has said."""

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to it and all that it has started."""
        assert self.process.pid is not None
        os.killpg(self.process.pid, number)

    def ended(self, timeout: float = 120) -> "Ended":
        """Wait for its end; it has `timeout` seconds."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running after {timeout} s: {self.said()}"
        return Ended(self.process.exitcode, self.said())

    def said(self) -> str:
        """What it has said so far."""
        return (self.folder / "said.txt").read_text()

    def wait_for(self, path: Path, timeout: float = 60) -> None:
        """Until there is something at `path`."""
        limit = time.monotonic() + timeout
        while not (path.exists() and path.stat().st_size):
            assert self.process.is_alive(), self.said()
            assert time.monotonic() < limit, self.said()
            time.sleep(0.005)


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    """Negative: minus the signal that it died of."""
    said: str

    @property
    def last_line(self) -> str:
        return self.said.splitlines()[-1]


def typed(options: Mapping[str, object]) -> list[str]:
    """Options as words of the command; True is a flag alone, None leaves it out."""
    words: list[str] = []
    for name, value in options.items():
        if value is not None:
            several = value if isinstance(value, list) else [] if value is True else [value]
            words += [f"--{name}", *map(str, several)]
    return words


def start(
    words: Sequence[str], folder: Path, setting: Setting | None = None, env: Mapping[str, str] | None = None
) -> Started:
    """Start `finetune-unet` with these words in `folder`, as the leader of a process group."""
    folder.mkdir(parents=True, exist_ok=True)
    known = dict(os.environ) | dict(env or {})
    process = _SERVER.Process(target=_command, args=(list(words), folder, setting, known))
    process.start()
    (folder / "said.txt").touch()
    limit = time.monotonic() + 60
    while not (folder / "said.txt").read_text() and process.is_alive():  # its group is there
        assert time.monotonic() < limit
        time.sleep(0.002)
    return Started(process, folder)


def run(
    words: Sequence[str], folder: Path, setting: Setting | None = None, env: Mapping[str, str] | None = None
) -> Ended:
    """The same from its start to its end."""
    return start(words, folder, setting, env).ended()


def _command(words: list[str], folder: Path, setting: Setting | None, env: dict[str, str]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    said = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    print("started")
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for its workers, as in a process of its own
    if setting is not None:
        setting()
    from finetune.cli import main

    sys.exit(main(words))


def digests(run_folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a run folder but those that tell of the machine, by its path in it."""
    files = [path for path in run_folder.rglob("*") if path.is_file() and path.name not in OF_THE_MACHINE]
    return {str(path.relative_to(run_folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
