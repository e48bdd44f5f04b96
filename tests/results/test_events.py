"""events.jsonl: what a run does while it does it."""

import json
import logging
import os
from pathlib import Path

import psutil
import pytest

from finetune.errors import Interrupted, RunError
from finetune.log_handlers import labelled, logging_to
from finetune.results.events import EventHandler, Events


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_what_came_before_the_folder_follows_its_beginning(tmp_path: Path) -> None:
    events = Events()
    events.emit("said", text="early \udcff")
    with events.written_to(tmp_path, step=3, total=9, anew=False):
        events.set_phase("training", 3)
        metadata = lines(tmp_path)
    assert [line["event"] for line in metadata] == ["begin", "said", "phase"]
    assert (metadata[0]["pid"], metadata[0]["step"], metadata[0]["total"]) == (os.getpid(), 3, 9)
    assert metadata[0]["started"] == psutil.Process().create_time()
    assert metadata[1]["text"] == "early \udcff"
    assert lines(tmp_path)[-1] | {"at": 0} == {"at": 0, "event": "end", "state": "done", "text": ""}


@pytest.mark.parametrize(
    ("error", "state"), [(RunError("no luck"), "failed"), (Interrupted("stopped at 4", 130), "stopped")]
)
def test_how_it_ended_is_the_last_that_it_tells(tmp_path: Path, error: Exception, state: str) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "older"}\n')
    with pytest.raises(type(error)), Events().written_to(tmp_path, step=0, total=9, anew=False):
        raise error
    assert [line["event"] for line in lines(tmp_path)] == ["older", "begin", "end"]
    assert (lines(tmp_path)[-1]["state"], lines(tmp_path)[-1]["text"]) == (state, str(error))
    with pytest.raises(ZeroDivisionError), Events().written_to(tmp_path, step=0, total=9, anew=True):
        raise ZeroDivisionError
    assert [line["event"] for line in lines(tmp_path)] == ["begin", "end"]
    assert lines(tmp_path)[-1]["state"] == "failed"


def test_progress_is_told_now_and_then_and_in_the_end(tmp_path: Path) -> None:
    events = Events()
    with events.written_to(tmp_path, step=0, total=1, anew=False):
        for done in range(1, 1001):
            events.progress("encoding images", done, 1000)
    done = [line["done"] for line in lines(tmp_path) if line["event"] == "progress"]
    assert done[0] == 1
    assert done[-1] == 1000
    assert len(done) < 10


def test_what_is_logged_is_an_event_for_each_line(tmp_path: Path) -> None:
    events, log = Events(), logging.getLogger("finetune.run.summary")
    with events.written_to(tmp_path, step=0, total=1, anew=False), logging_to(EventHandler(events)):
        log.info("one %s", "and a half")
        log.warning("two\nthree")
        log.info("tiny", extra=labelled("Model"))
    log.info("four")
    said = [line["text"] for line in lines(tmp_path) if line["event"] == "said"]
    assert said == ["one and a half", "note         two", "three", "Model        tiny"]
