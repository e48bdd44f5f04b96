"""A run followed by its events."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from finetune.results.event_reader import RunEvents


def begin(step: int = 0, **more: object) -> dict:
    me = {"pid": os.getpid(), "started": psutil.Process().create_time(), "host": platform.node()}
    return {"at": 1.0, "event": "begin", "step": step, "total": 9} | me | more


def step(number: int, loss: float | None = 0.5) -> dict:
    return {"at": 2.0, "event": "step", "step": number, "loss": loss}


def write(folder: Path, *events: dict, mode: str = "a", tail: str = "") -> None:
    with (folder / "events.jsonl").open(mode) as file:
        file.write("".join(json.dumps(event) + "\n" for event in events) + tail)


def test_it_takes_in_what_is_new_by_whole_lines(tmp_path: Path) -> None:
    follower = RunEvents(tmp_path)
    assert not follower.read()
    assert follower.state == "unknown"
    write(tmp_path, begin(), {"event": "said", "text": "hello"}, step(1), step(2, None), tail='{"event": "st')
    assert follower.read()
    assert (follower.state, list(follower.said), follower.loss.losses) == ("running", ["hello"], [(1, 0.5)])
    assert not follower.read()
    write(tmp_path, tail='ep", "step": 3, "loss": 1.5}\nno json\n[1]\n')
    assert follower.read()
    assert follower.loss.losses == [(1, 0.5), (3, 1.5)]
    assert follower.loss.averages == [(1, 0.5), (3, 0.55)]


def test_a_part_that_begins_again_forgets_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    measured = [
        {"event": kind, "step": at, "path": f"samples/step-{at}.png"}
        for kind in ("validation", "copies", "picture")
        for at in (0, 4)
    ]
    write(tmp_path, begin(), *[step(number) for number in range(1, 6)], *measured, {"event": "end", "state": "stopped"})
    follower = RunEvents(tmp_path)
    follower.read()
    assert follower.state == "stopped"
    write(tmp_path, begin(step=3))
    follower.read()
    assert follower.state == "running"
    assert [at for at, _ in follower.loss.losses] == [at for at, _ in follower.loss.averages] == [1, 2, 3]
    assert list(follower.validations) == list(follower.copies) == list(follower.pictures) == [0]


def test_a_process_that_died_without_a_word_is_told_from_one_that_lives(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    write(tmp_path, begin(pid=process.pid, started=psutil.Process(process.pid).create_time()))
    follower = RunEvents(tmp_path)
    follower.read()
    assert (follower.state, follower.process().pid) == ("running", process.pid)
    process.kill()
    process.wait()
    assert (follower.state, follower.process()) == ("cut off", None)
    write(tmp_path, begin(started=1.0))  # the number of a process that is another one now
    follower.read()
    assert follower.state == "cut off"
    write(tmp_path, begin(host="elsewhere"))
    follower.read()
    assert (follower.state, follower.process()) == ("cut off", None)


@pytest.mark.parametrize("again", [False, True])
def test_a_folder_that_is_deleted_or_begun_anew_is_forgotten(tmp_path: Path, again: bool) -> None:
    write(tmp_path, begin(), *[step(number) for number in range(1, 6)])
    follower = RunEvents(tmp_path)
    follower.read()
    (tmp_path / "events.jsonl").unlink()
    if again:
        write(tmp_path, begin(), step(1, 0.25))
    assert follower.read()
    assert follower.loss.losses == ([(1, 0.25)] if again else [])
    assert follower.state == ("running" if again else "unknown")
