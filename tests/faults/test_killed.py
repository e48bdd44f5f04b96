"""Killed anywhere, and begun again with the same words: the same files to the last byte."""

import random
import shutil
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

SHARES = 6
"""Tests into which points are dealt, for several cores."""


def killed_everywhere(
    part: str,
    share: int,
    words: list[str],
    folder: Path,
    equal_after: Callable[[Path], None],
    *,
    shares: int = SHARES,
    earlier: Path | None = None,
) -> int:
    """Kill a run before each of its file operations on what `part` says, and see what becomes of it.

    Args:
        part: a pattern, found in the paths.
        share: the points from this one on, each `shares`th.
        earlier: what is in its output folder before; None: nothing.
    """
    for number in range(share, 1000, shares):
        place = folder / str(number)
        if earlier is not None:
            shutil.copytree(earlier, place / "out")
        ended = run(words, place, partial(signal_at, part, number))
        if ended.code == 0:
            return number
        assert ended.code == -signal.SIGKILL, ended.said
        equal_after(place)
    raise AssertionError("it does not end")


@pytest.mark.parametrize("share", range(SHARES))
def test_at_every_point_of_a_save(share: int, words: list[str], folder: Path) -> None:
    """Two saves, the second of which deletes what the first has left."""
    keeping_one = [*words, "--checkpoints_total_limit", "1"]
    assert run(keeping_one, folder).code == 0
    straight = digests(folder / "out")

    def equal_after(place: Path) -> None:
        ended = run(keeping_one, place)
        assert ended.code == 0, ended.said
        assert digests(place / "out") == straight

    points = killed_everywhere("checkpoint-", share, keeping_one, folder, equal_after)
    assert points > 30


def test_where_its_folder_becomes_a_runs(words: list[str], folder: Path, equal_after: Callable[[Path], None]) -> None:
    assert killed_everywhere("data.json", 0, words, folder, equal_after, shares=1) > 2


@pytest.mark.slow
@pytest.mark.parametrize("share", range(SHARES))
def test_at_every_file_operation_of_a_run_that_replaces_another(
    share: int, words: list[str], straight: dict[str, str], folder: Path
) -> None:
    assert run([*words, "--seed", "1"], folder).code == 0
    replacing = [*words, "--overwrite_output_dir"]

    def equal_after(place: Path) -> None:
        ended = run(replacing, place)
        assert ended.code == 0, ended.said
        assert digests(place / "out") == straight

    assert killed_everywhere("out", share, replacing, folder, equal_after, earlier=folder / "out") > 100


@pytest.mark.slow
@pytest.mark.parametrize("share", range(SHARES))
def test_at_every_file_operation_of_a_run(
    share: int, words: list[str], folder: Path, equal_after: Callable[[Path], None]
) -> None:
    assert killed_everywhere("out", share, words, folder, equal_after) > 100


def killed_at_random(seed: int, words: list[str], folder: Path, longest: float) -> int:
    """Start a run until it ends by itself, each time killed after up to `longest` seconds; answers how often."""
    source = random.Random(seed)
    for number in range(1000):
        started = start(words, folder)
        time.sleep(source.uniform(0.5, longest))
        if started.process.is_alive():
            started.kill() if source.random() < 0.5 else started.process.kill()  # with its workers, or it alone
        ended = started.ended()
        if ended.code == 0:
            return number
        assert ended.code == -signal.SIGKILL, ended.said
    raise AssertionError("it does not end")


WORKERS = {"live_encoding": True, "dataloader_num_workers": 2, "max_train_steps": 12}
GRIDS = {"num_inference_steps": 2, "sample_every": 3, "eval_batch_size": 1}


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))])
def test_at_random_moments_with_workers_and_grids(seed: int, options: dict[str, object], folder: Path) -> None:
    long = typed({**options, **WORKERS, **GRIDS})
    expected = run(long, folder / "straight")
    assert expected.code == 0, expected.said
    kills = 0
    for attempt in range(100):
        place = folder / str(attempt)
        kills += killed_at_random(100 * seed + attempt, long, place, longest=6)
        assert digests(place / "out") == digests(folder / "straight/out")
        if kills >= 5:
            break


def test_stopped_after_every_step_and_asked_once_more_when_all_is_done(
    words: list[str], straight: dict[str, str], folder: Path
) -> None:
    """After the first, in the middle and at the end of an epoch of three."""
    for step in (1, 2, 3):
        ended = run([*words, "--max_train_minutes", "1e-6"], folder)
        assert ended.code == 124
        assert f"stopped at step {step} of 4 after max_train_minutes" in ended.last_line
    assert run([*words, "--max_train_minutes", "1e-6"], folder).code == 0
    changed = {name for name, digest in digests(folder / "out").items() if straight.get(name) != digest}
    assert changed == {"config.toml"} | _of_steps(folder, 1, 3)
    again = run(words, folder)
    assert (again.code, "this run is finished" in again.last_line) == (0, True)


def _of_steps(folder: Path, *steps: int) -> set[str]:
    """What a checkpoint of these steps leaves that the straight run has none of."""
    files = [path for step in steps for path in folder.glob(f"out/checkpoint-{step}/*")]
    files += [folder / f"out/out-{step:06d}.safetensors" for step in steps]
    return {str(path.relative_to(folder / "out")) for path in files}


def test_the_real_command_in_a_fresh_process(
    words: list[str], folder: Path, equal_after: Callable[[Path], None]
) -> None:
    command = subprocess.Popen([sys.executable, "-m", "finetune", *words], cwd=folder, stdout=subprocess.DEVNULL)
    log = folder / "out/metrics.jsonl"
    while not (log.exists() and log.stat().st_size):
        assert command.poll() is None
        time.sleep(0.005)
    command.kill()
    assert command.wait() == -signal.SIGKILL
    equal_after(folder)
