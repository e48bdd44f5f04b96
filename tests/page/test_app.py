"""What the page's buttons do, through the functions that they call and the real commands."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune.errors import UsageError
from finetune.page import views
from finetune.page.allowed_paths import AllowedPaths
from finetune.page.app import Page, build, show_errors
from finetune.page.processes import failure, last_error_line
from finetune.page.serving import serve
from finetune.training.checkpoint import checkpoints

NASTY = "</script><script>alert(1)</script>\u202e"


@pytest.fixture
def page(tmp_path: Path, make_pictures: Callable[..., Path]) -> Iterator[Page]:
    make_pictures(tmp_path / "pics", count=3)
    page = Page(AllowedPaths([tmp_path], tmp_path))
    yield page
    for name in page.places.run_names():  # a test that failed leaves a run, which outlives it as it should
        if process := page.follower(name).process():
            process.kill()


def until(holds: Callable[[], Any], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


def form(page: Page, steps: int = 2, more: str = "") -> tuple[Any, ...]:
    more = f"--train_batch_size 1 --rank 2 --num_inference_steps 1 --forgetting_prompts 0 {more}"
    return str(page.places.work / "pics"), "tiny", "", "a cat", "", steps, False, more


def test_a_run_is_started_watched_stopped_and_resumed(page: Page) -> None:
    assert page.tick(None, None, {})[-1]["names"] == []
    page.start(*form(page, steps=5000))
    until(lambda: (run := page.follower("pics-tiny")) and run.step)
    shown = page.tick("pics-tiny", None, {})[0]
    assert "training" in shown
    assert "of 5000" in shown
    assert "--max_train_steps 5000" in page.tick("pics-tiny", None, {})[7]
    page.stop("pics-tiny")
    until(lambda: page.follower("pics-tiny").state == "stopped" and page.queue.entries()[0] is None)
    done = page.follower("pics-tiny").step["step"]
    with pytest.raises(UsageError, match="pics-tiny: it is not running"):
        page.stop("pics-tiny")
    page.resume("pics-tiny")
    until(lambda: page.follower("pics-tiny").step.get("step", 0) > done)
    page.stop("pics-tiny")
    until(lambda: page.follower("pics-tiny").state == "stopped")
    assert page.follower("pics-tiny").begun["step"] == done
    assert "data:image/jpeg" in page.picture("pics-tiny", 9)


@pytest.mark.slow
def test_what_fails_is_told_and_those_behind_it_go_on(page: Page) -> None:
    page.start(*form(page, more="--lr_warmup_steps 9"))
    page.start(*form(page))
    until(lambda: page.queue.entries()[2])
    assert "lr_warmup_steps = 9" in page.queue.entries()[2]
    until(lambda: (run := page.follower("pics-tiny")) and run.state == "done")
    plan = page.plan(*form(page))
    assert "2 of 1, learning rate 0.002" in plan
    assert "as fast as" in plan or "no run like this one" in plan
    assert page.command(*form(page)).startswith("finetune-unet --model tiny --data")
    assert "3 of 3 images" in page.preview(*form(page))


def test_what_is_wrong_stands_on_the_page(page: Page) -> None:
    assert "expected what lies in" in show_errors(page.plan)("/etc", "tiny", "", "", "", 0, False, "")
    assert "no run in" in show_errors(page.draw)("../x", "", 0, 1)
    assert page.tick("gone", "gone too", {"names": ["gone"]})[0] == views.of_run(None)


def test_nothing_that_is_shown_is_taken_for_markup(page: Page) -> None:
    run = page.places.runs / "nasty"
    (run / "samples").mkdir(parents=True)
    line = f'{{"event": "said", "text": "{NASTY}"}}\n{{"event": "end", "state": "failed", "text": "{NASTY}"}}\n'
    begin = '{"event": "begin", "pid": 1, "started": 0, "host": "", "step": 0, "total": 3}\n'
    (run / "events.jsonl").write_text(begin + line)
    for shown in (views.of_run(page.follower("nasty")), views.of_queue(NASTY, [NASTY], NASTY), views.of_text(NASTY)):
        assert "<script" not in shown
        assert "&lt;script" in shown


def test_a_complaint_is_the_last_line_that_says_something() -> None:
    assert last_error_line("\x1b[A 50%|##\r 99%|###\nfinetune-unet: no luck\n\n") == "finetune-unet: no luck"
    assert last_error_line("") == "it ended without a word"


def test_the_layout_can_be_built_and_a_port_in_use_is_told(page: Page) -> None:
    import socket

    blocks = build(page)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"--port {port} at 127.0.0.1: .*; give another"):
            serve(blocks, host="127.0.0.1", port=port, token="secret")


def test_stop_pressed_twice_sends_one_signal(page: Page) -> None:
    """A second one would end the run without a checkpoint."""
    page.start(*form(page, steps=5000))
    until(lambda: (run := page.follower("pics-tiny")) and run.step)
    for _ in range(3):
        assert "it is stopping" in page.stop("pics-tiny")
    assert "stopping" in page.tick("pics-tiny", None, {})[0]
    until(lambda: page.follower("pics-tiny").state == "stopped" and page.queue.entries()[0] is None)
    assert page.queue.entries()[2] == ""
    assert checkpoints(page.places.runs / "pics-tiny")


def test_an_interrupt_without_a_checkpoint_is_a_failure() -> None:
    assert failure(0, "") == ""
    assert failure(130, "finetune-unet: stopped at step 3 of 9: out/checkpoint-3 is kept\n") == ""
    assert failure(130, "finetune-unet: interrupted\n") == "finetune-unet: interrupted"
    assert failure(1, " 50%|##\rfinetune-unet: no luck\n") == "finetune-unet: no luck"


def test_events_of_another_hand_are_neither_markup_nor_a_way_out(page: Page, tmp_path: Path) -> None:
    run = page.places.runs / "nasty"
    (run / "samples").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (run / "samples/step-7.png").symlink_to(tmp_path / "secret.png")
    events: list[dict[str, Any]] = [
        {"event": "begin", "pid": 1, "started": 0, "host": "", "step": 0, "total": 3},
        {"event": "validation", "step": "<script>1</script>", "loss": 1, "change": [1, 1, 1]},
        {"event": "validation", "step": 1, "loss": 1, "change": ["<script>", 1, 1]},
        {"event": "copies", "step": 7, "copies": "<script>2</script>", "pictures": 3},
        {"event": "step", "step": 1, "loss": 0.5, "left": 1e300, "images_per_second": 1, "peak_memory_gb": 1},
        {"event": "picture", "step": 5, "path": "../../secret.png"},
        {"event": "picture", "step": 6, "path": str(tmp_path / "secret.png")},
        {"event": "picture", "step": 7, "path": "samples/step-7.png"},
        {"event": "validation"},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    follower = page.follower("nasty")
    assert (follower.validations, follower.copies, follower.pictures) == ({}, {}, {7: "samples/step-7.png"})
    assert "script" not in views.of_run(follower)
    assert page.picture("nasty", 0) == ""


def test_a_link_among_the_pictures_leads_nowhere(page: Page, tmp_path_factory: pytest.TempPathFactory) -> None:
    secret = tmp_path_factory.mktemp("secret") / "a.png"
    Image.new("RGB", (64, 64)).save(secret)
    (page.places.work / "pics/leak.png").symlink_to(secret)
    shown = page.preview(*form(page))
    assert "1 link out of the folder" in shown
    assert "data:image" not in shown
