"""The queue: order, removal, failures, and what another page finds."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import UsageError
from finetune.page.processes import last_error_line
from finetune.page.queue import FOLDER, Queue, failure
from finetune.run.device_users import using_device


def until(holds: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def states(queue: Queue) -> list[str]:
    return [job.state for job in queue.jobs()]


def test_jobs_run_one_after_the_other_and_failures_stay(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    for command in (["preview", "--data", "gone"], ["--help"], ["convert", "--model", "gone"]):
        queue.add(command)
    until(lambda: states(queue) == ["running", "waiting", "waiting"])
    until(lambda: states(queue) == ["failed", "failed"])
    first, last = queue.jobs()
    assert first.error.startswith("finetune-unet: ")
    assert (first.words[0], last.words[0]) == ("preview", "convert")
    assert first.title == "gone"
    queue.remove(first.id)
    with pytest.raises(UsageError, match="not in the queue"):
        queue.remove(first.id)
    assert [job.id for job in Queue(tmp_path).jobs()] == [last.id]
    assert not list((tmp_path / "runs" / FOLDER).glob("*.log"))


def test_another_page_finds_what_runs_and_what_waits(tmp_path: Path) -> None:
    ui = ["ui", "--work", str(tmp_path), "--data", str(tmp_path), "--port", "0"]  # a command that does not end
    first = Queue(tmp_path)
    first.add(ui)
    first.add(["--help"])
    until(lambda: first.jobs()[0].process() is not None)
    with pytest.raises(UsageError, match="it runs; stop its run"):
        first.remove(first.jobs()[0].id)
    kept = (tmp_path / "runs" / FOLDER / "jobs.json").read_text()
    other = Path(tmp_path, "copy")  # as if the first page were gone
    (other / "runs" / FOLDER).mkdir(parents=True)
    (other / "runs" / FOLDER / "jobs.json").write_text(kept)
    found = Queue(other)
    assert states(found) == ["running", "waiting"]
    process = found.jobs()[0].process()
    assert process is not None
    process.kill()
    until(lambda: not found.jobs())
    until(lambda: states(first) in ([], ["failed"]))


def test_a_job_waits_for_what_trains_in_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    queue = Queue(tmp_path)
    with using_device("cpu", Path("/somewhere/run")):
        queue.add(["--help"])
        queue.add(["--version"])
        until(lambda: queue.jobs()[0].waits_for == ("/somewhere/run",))
        assert states(queue) == ["waiting", "waiting"]
        queue.move_up(queue.jobs()[1].id)
        assert [job.words for job in queue.jobs()] == [("--version",), ("--help",)]
        with pytest.raises(UsageError, match="it does not wait"):
            queue.move_up("other")
    until(lambda: not queue.jobs())


def test_each_gpu_has_a_run_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ui = ["ui", "--work", str(tmp_path), "--data", str(tmp_path), "--port", "0"]  # a command that does not end
    queue = Queue(tmp_path, ["0", "1", "5"])
    with using_device("cuda:1", Path("elsewhere")):
        for _ in range(3):
            queue.add(ui)
        until(lambda: states(queue) == ["running", "running", "waiting"])
        processes = {job.device: job.process() for job in queue.jobs()[:2]}
        until(lambda: all(process and process.environ() for process in processes.values()))
        assert {name: process.environ()["CUDA_VISIBLE_DEVICES"] for name, process in processes.items() if process} == {
            "0": "0",
            "5": "5",
        }
        until(lambda: queue.jobs()[2].waits_for == ("elsewhere",))
    until(lambda: states(queue) == ["running"] * 3)
    for job in queue.jobs():
        process = job.process()
        assert process is not None
        process.kill()
    until(lambda: "running" not in states(queue))


def test_a_job_whose_process_is_gone_makes_room(tmp_path: Path) -> None:
    (tmp_path / "runs" / FOLDER).mkdir(parents=True)
    job = {"id": "a", "words": ["--help"], "state": "running", "pid": 1, "started": 5.0, "error": ""}
    (tmp_path / "runs" / FOLDER / "jobs.json").write_text(json.dumps([job]))
    (tmp_path / "runs" / FOLDER / "a.log").write_text("finetune-unet: no luck\n")
    queue = Queue(tmp_path)
    until(lambda: states(queue) == ["failed"])
    assert queue.jobs()[0].error == "finetune-unet: no luck"


def test_a_complaint_is_the_last_line_that_says_something() -> None:
    assert last_error_line("\x1b[A 50%|##\r 99%|###\nfinetune-unet: no luck\n\n") == "finetune-unet: no luck"
    assert last_error_line("") == "it ended without a word"


def test_an_interrupt_without_a_checkpoint_is_a_failure() -> None:
    stopped = "finetune-unet: stopped at step 3 of 9: out/checkpoint-3 is kept\n"
    assert failure(0, "") == ""
    assert failure(130, stopped) == failure(None, stopped) == failure(None, "all is well") == ""
    assert failure(130, "finetune-unet: interrupted\n") == "finetune-unet: interrupted"
    assert failure(1, " 50%|##\rfinetune-unet: no luck\n") == "finetune-unet: no luck"
    assert failure(None, "finetune-unet: no luck\n") == "finetune-unet: no luck"
