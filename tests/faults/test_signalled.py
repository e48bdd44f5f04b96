"""Signals at bad moments, clocks that go back, and two runs in one folder."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.faults.harness import digests, run, start, typed
from tests.faults.settings import signal_at


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_step_is_finished_and_kept(number: int, code: int, options: dict[str, object], folder: Path) -> None:
    long = typed({**options, "max_train_steps": 40, "lr_scheduler": "constant"})
    started = start(long, folder)
    started.wait_for(folder / "out/metrics.jsonl")
    started.kill(number)
    ended = started.ended()
    assert ended.code == code
    steps = (folder / "out/metrics.jsonl").read_text().count("\n")
    kept = f"out/checkpoint-{steps} is saved; run the same command to resume"
    assert ended.last_line == f"finetune-unet: stopped at step {steps} of 40; {kept}"
    assert (folder / f"out/checkpoint-{steps}/manifest.json").exists()


def test_the_real_command_and_its_workers_in_a_fresh_process(options: dict[str, object], folder: Path) -> None:
    """The signal is sent to all of them, as a terminal does."""
    more = {"max_train_steps": 500, "live_encoding": True, "dataloader_num_workers": 2}
    command = [sys.executable, "-m", "finetune", *typed({**options, **more})]
    running = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, start_new_session=True)
    log = folder / "out/metrics.jsonl"
    while not (log.exists() and log.stat().st_size) and running.poll() is None:
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130, said
    assert "stopped at step" in said.splitlines()[-1]
    assert "is saved" in said.splitlines()[-1]


@pytest.mark.parametrize("point", [0, 3, 8, 12])
def test_a_second_signal_during_the_save_leaves_at_once_and_tears_nothing(
    point: int, words: list[str], folder: Path, equal_after: Callable[[Path], None]
) -> None:
    ended = run(words, folder, partial(twice, point))
    assert ended.code == -signal.SIGTERM, ended.said
    assert "is saved" not in ended.said
    assert digests(folder / "out").keys().isdisjoint({"checkpoint-1/manifest.json"})
    equal_after(folder)


def twice(point: int) -> None:
    """SIGTERM when training begins, and once more at a point of the save that it asks for."""
    signal_at("timings.jsonl", 0, signal.SIGTERM)
    signal_at(".checkpoint-1.part", point, signal.SIGTERM)


def clock_goes_back() -> None:
    """The clock that tells the time of day goes back a minute each time that it is read."""
    import time

    now = [time.time()]

    def earlier() -> float:
        now[0] -= 60
        return now[0]

    time.time = earlier


def test_a_clock_that_is_set_back_changes_nothing(words: list[str], straight: dict[str, str], folder: Path) -> None:
    ended = run(words, folder, clock_goes_back)
    assert ended.code == 0, ended.said
    assert digests(folder / "out") == straight


def test_the_second_of_two_runs_in_a_folder_is_refused(options: dict[str, object], folder: Path) -> None:
    long = typed({**options, "max_train_steps": 1000})
    first = start(long, folder)
    first.wait_for(folder / "out/metrics.jsonl")
    (folder / "elsewhere").symlink_to(folder / "out")
    second = run(typed({**options, "max_train_steps": 1000, "output_dir": folder / "elsewhere"}), folder / "other")
    os.kill(first.process.pid or 0, signal.SIGTERM)
    assert first.ended().code == 143
    assert second.code == 2
    assert "another process is training in it" in second.last_line


def test_the_workers_of_a_run_that_was_killed_do_not_hold_its_folder(options: dict[str, object], folder: Path) -> None:
    given = typed({**options, "live_encoding": True, "dataloader_num_workers": 2})
    first = start(given, folder)
    first.wait_for(folder / "out/metrics.jsonl")
    first.process.kill()  # it alone; its workers notice later
    assert first.ended().code == -signal.SIGKILL
    again = run(given, folder)
    assert again.code == 0, again.said
