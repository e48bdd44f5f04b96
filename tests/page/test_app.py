"""The page over HTTP, with the real commands behind it."""

import base64
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image
from starlette.testclient import TestClient

from finetune.errors import UsageError
from finetune.page.allowed_paths import AllowedPaths
from finetune.page.app import Page, build
from finetune.page.serving import Certificate, serve
from finetune.page.visitors import Visitor
from finetune.training.checkpoint import checkpoints

NASTY = "</script><script>alert(1)</script>\u202e"


@pytest.fixture
def page(tmp_path: Path, make_pictures: Callable[..., Path]) -> Iterator[Page]:
    make_pictures(tmp_path / "pics", count=3)
    page = Page(AllowedPaths([tmp_path], tmp_path))
    yield page
    for name in page.places.run_names():  # a test that failed leaves a run, which outlives it as it should
        if process := page.events(name).process():
            process.kill()


@pytest.fixture
def client(page: Page) -> TestClient:
    return TestClient(build(page))


def until(holds: Callable[[], Any], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


def form(page: Page, steps: int = 2, more: str = "", **fields: str) -> dict[str, str]:
    more = f"--train_batch_size 1 --rank 2 --num_inference_steps 1 --forgetting_prompts 0 {more}"
    given = {"data": str(page.places.work / "pics"), "model": "tiny", "prompt": "a cat", "steps": str(steps)}
    return given | {"more": more} | fields


def begun(page: Page) -> bool:
    return "pics-tiny" in page.places.run_names() and bool(page.events("pics-tiny").step)


def written_run(page: Page, *events: dict[str, Any], pid: int = 1, started: float = 0, host: str = "") -> Path:
    run = page.places.runs / "nasty"
    (run / "samples").mkdir(parents=True)
    begin = {"event": "begin", "pid": pid, "started": started, "host": host, "step": 0, "total": 3}
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in (begin, *events)))
    return run


def test_a_run_is_started_watched_stopped_resumed_and_downloaded(page: Page, client: TestClient) -> None:
    assert "There are no runs yet" in client.get("/").text
    home = client.post("/new/start", data=form(page, steps=5000))
    assert ": pics, tiny" in home.text
    assert "--max_train_steps 5000" in home.text
    until(lambda: begun(page))
    assert "of 5000" in client.get("/runs/pics-tiny").text
    assert "of 5000" in client.get("/").text
    client.post("/runs/pics-tiny/stop")
    until(lambda: page.events("pics-tiny").state == "stopped" and not page.queue.jobs())
    assert checkpoints(page.places.runs / "pics-tiny")
    done = page.events("pics-tiny").step["step"]
    stopped = client.post("/runs/pics-tiny/stop")
    assert (stopped.status_code, "pics-tiny: it is not running" in stopped.text) == (400, True)
    assert "Resume" in client.get("/runs/pics-tiny").text
    client.post("/runs/pics-tiny/resume")
    until(lambda: page.events("pics-tiny").step.get("step", 0) > done)
    assert page.events("pics-tiny").begun["step"] == done
    client.post("/runs/pics-tiny/stop")
    until(lambda: page.events("pics-tiny").state == "stopped")
    sample = re.search(r'src="(/runs/pics-tiny/samples/[^"]*)"', client.get("/runs/pics-tiny").text)
    assert sample is not None
    assert client.get(sample[1]).content[:4] == b"\x89PNG"
    assert client.get(f"{sample[1]}?small").content[:2] == b"\xff\xd8"


def test_stop_pressed_again_sends_no_second_signal(page: Page, client: TestClient) -> None:
    """It would end the run without a checkpoint."""
    code = "import signal, time\nsignal.signal(signal.SIGINT, lambda *_: print('asked', flush=True))\n"
    code += "print('ready', flush=True)\nwhile True: time.sleep(0.05)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        written_run(page, pid=process.pid, started=psutil.Process(process.pid).create_time(), host=platform.node())
        for _ in range(3):
            assert "Stopping after this step" in client.post("/runs/nasty/stop").text
        assert process.stdout.readline() == "asked\n"
        time.sleep(0.3)
        process.kill()
        assert process.stdout.read() == ""


def test_what_fails_is_said_and_those_behind_it_go_on(page: Page, client: TestClient) -> None:
    client.post("/new/start", data=form(page, more="--lr_warmup_steps 9"))
    client.post("/new/start", data=form(page))
    until(lambda: begun(page) and page.events("pics-tiny").state == "done" and len(page.queue.jobs()) == 1)
    (failed,) = page.queue.jobs()
    home = client.get("/").text
    assert "lr_warmup_steps = 9" in failed.error
    assert "lr_warmup_steps = 9" in home
    edit = re.search(r'href="(/new\?[^"]*)"', home)
    assert edit is not None
    assert 'value="a cat"' in client.get(edit[1].replace("&amp;", "&")).text
    assert "Failed" not in client.post(f"/queue/{failed.id}/remove").text
    shown = client.get("/runs/pics-tiny").text
    files = re.findall(r'href="(/runs/pics-tiny/files/[^"]*)"', shown)
    assert files == [f"/runs/pics-tiny/files/{name}.safetensors" for name in ("pics-tiny", "pytorch_lora_weights")]
    assert "ComfyUI: models/loras/" in shown
    got = client.get(files[0])
    assert got.content == (page.places.runs / "pics-tiny/pics-tiny.safetensors").read_bytes()
    assert "sandbox" in client.get("/runs/pics-tiny/report").headers["content-security-policy"]
    start = base64.b64encode((page.places.work / "pics/00.png").read_bytes()).decode()
    drawing = {"run": "pics-tiny", "prompt": "a cat", "num_inference_steps": "2", "num_images": "2"}
    drawn = client.post("/draw", data=drawing | {"strength": "0 1", "image": start}).text
    images = re.findall(r'src="(/runs/pics-tiny/generated/[^"]*)"', drawn)
    assert len(set(images)) == 4
    assert "--denoising_strength=0.75 --adapter_strength=0<" in drawn
    assert client.get(images[0]).content[:4] == b"\x89PNG"
    assert client.get(images[0]).content != client.get(images[2]).content
    assert all(image in client.get("/draw", params={"run": "pics-tiny"}).text for image in images)
    assert client.get("/runs/pics-tiny/generated/history.jsonl").status_code == 404
    for wrong, why in (
        ({"strength": "x"}, "expected numbers"),
        ({"image": "%"}, "not base64"),
        ({"run": "x"}, "no run"),
    ):
        assert why in client.post("/draw", data=drawing | wrong).text


def test_images_and_plan_before_a_run(page: Page, client: TestClient) -> None:
    """All by one process that stays."""
    looked = client.post("/new/look", data=form(page)).text
    assert "3 of 3 images" in looked
    assert looked.count("data:image/png") == 1
    first = page.worker.process_id
    plan = client.post("/new/plan", data=form(page)).text
    assert "2 of batch size 1, learning rate 0.002" in plan
    assert "finetune-unet --model tiny --data" in plan
    assert re.search(r'<meter value="[\d.]+" max="[\d.]+"', plan)
    wrong = client.post("/new/plan", data=form(page, more="--lr_warmup_steps 9")).text
    assert "lr_warmup_steps = 9" in wrong
    assert "expected what lies in" in client.post("/new/plan", data=form(page, data="")).text
    assert page.worker.process_id == first
    page.worker.end()
    assert "3 of 3 images" in client.post("/new/look", data=form(page)).text  # another one
    assert page.worker.process_id != first


@pytest.mark.slow
def test_the_time_of_a_run_by_two_steps(page: Page, client: TestClient) -> None:
    assert "at the speed of 2 steps tried here" in client.post("/new/trial", data=form(page, steps=5)).text


def test_what_is_wrong_stands_on_the_page_with_what_was_filled_in(page: Page, client: TestClient) -> None:
    for fields, message in (
        ({"data": "/etc"}, "expected what lies in"),
        ({"model": ""}, "model: choose one"),
        ({"steps": "many"}, "expected a whole number"),
        ({"more": "--output_dir /etc"}, "is for the command line"),
    ):
        answer = client.post("/new/start", data=form(page) | fields)
        assert answer.status_code == 400
        assert message in answer.text
        assert 'value="a cat"' in answer.text
        assert message in client.post("/new/plan", data=form(page) | fields).text
    assert not page.queue.jobs()
    assert "no run in" in client.post("/draw", data={"run": "../x"}).text
    shown = client.post("/new/plan", data={"data": "/etc", "model": "tiny"}, headers={"hx-request": "true"})
    assert (shown.status_code, "expected what lies in" in shown.text) == (200, True)


@pytest.mark.parametrize("path", ["/runs/gone", "/runs/%2E%2E", "/runs/gone/events", "/runs/gone/report", "/elsewhere"])
def test_what_is_not_there_is_said(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_a_form_that_is_too_large_is_refused(client: TestClient) -> None:
    assert client.post("/new/start", data={"more": "x" * 100_000}).status_code == 413


def test_nothing_that_is_shown_is_taken_for_markup(page: Page, client: TestClient) -> None:
    written_run(
        page, {"event": "said", "text": NASTY}, {"event": "end", "state": "failed", "text": NASTY},
    )  # fmt: skip
    shown = client.get("/runs/nasty").text + client.post("/new/start", data=form(page, data=NASTY, prompt=NASTY)).text
    assert "<script>" not in shown
    assert shown.count("&lt;script&gt;") >= 4


def test_events_of_another_hand_are_neither_markup_nor_a_way_out(
    page: Page, client: TestClient, tmp_path: Path
) -> None:
    run = written_run(
        page,
        {"event": "validation", "step": "<script>1</script>", "loss": 1, "change": [1, 1, 1]},
        {"event": "validation", "step": 1, "loss": 1, "change": ["<script>", 1, 1]},
        {"event": "copies", "step": 7, "copies": "<script>2</script>", "pictures": 3},
        {"event": "step", "step": 1, "loss": 0.5, "left": 1e300, "images_per_second": 1, "peak_memory_gb": 1},
        {"event": "picture", "step": 5, "path": "../../secret.png"},
        {"event": "picture", "step": 6, "path": str(tmp_path / "secret.png")},
        {"event": "picture", "step": 7, "path": "samples/step-7.png"},
        {"event": "validation"},
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (run / "samples/step-7.png").symlink_to(tmp_path / "secret.png")
    (run / "stolen.safetensors").symlink_to(tmp_path / "secret.png")
    (run / "report.html").symlink_to(tmp_path / "secret.png")
    events = page.events("nasty")
    assert (events.validations, events.copies, events.pictures) == ({}, {}, {7: "samples/step-7.png"})
    shown = client.get("/runs/nasty").text
    assert "<script>" not in shown
    assert "stolen" not in shown
    for path in ("samples/samples/step-7.png", "files/stolen.safetensors", "files/config.toml", "report",
                 "files/..%2F..%2Fsecret.png", "samples/%2E%2E/%2E%2E/secret.png"):  # fmt: skip
        assert client.get(f"/runs/nasty/{path}").status_code == 404


def test_a_link_among_the_pictures_leads_nowhere(
    page: Page, client: TestClient, tmp_path_factory: pytest.TempPathFactory
) -> None:
    secret = tmp_path_factory.mktemp("secret") / "a.png"
    Image.new("RGB", (64, 64)).save(secret)
    (page.places.work / "pics/leak.png").symlink_to(secret)
    shown = client.post("/new/look", data=form(page)).text
    assert "1 link out of the folder" in shown
    assert "data:image" not in shown


def test_two_runs_are_compared_on_one_axis(page: Page, client: TestClient) -> None:
    for name, steps in (("short", 60), ("long", 120)):
        (page.places.runs / name / "samples").mkdir(parents=True)
        events = [{"event": "begin", "pid": 1, "started": 0, "host": "", "step": 0, "total": steps}]
        events += [{"event": "step", "step": step, "loss": 1 / step} for step in range(1, steps + 1)]
        lines = "".join(json.dumps(event) + "\n" for event in events)
        (page.places.runs / name / "events.jsonl").write_text(lines)
        options = f'[adapter]\nrank = {steps}\nlora_type = "lora"\n[output]\noutput_dir = "{name}"\n'
        (page.places.runs / name / "config.toml").write_text(options)
    shown = client.get("/compare", params={"run": ["short", "long"]}).text
    assert 'data-runs="[&#34;short&#34;, &#34;long&#34;]"' in shown
    assert re.findall(r'<th scope="row">(\w+)</th><td>(\d+)</td><td>(\d+)</td>', shown) == [("rank", "60", "120")]
    (loss,) = client.get("/runs/long/curves").json()
    assert (loss["title"], loss["steps"][-1], loss["faint"][1]) == ("Training loss", 120, 0.5)
    assert client.get("/compare", params={"run": "../etc"}).status_code == 404


def test_a_run_is_deleted_and_restored(page: Page, client: TestClient) -> None:
    run = written_run(page, {"event": "end", "state": "done", "text": ""})
    assert "Restore" in client.post("/runs/nasty/delete").text
    assert page.places.run_names() == []
    assert not run.exists()
    written_run(page, {"event": "end", "state": "done", "text": ""})
    client.post("/runs/nasty/delete")
    assert sorted(page.places.deleted_runs()) == ["nasty", "nasty-2"]
    client.post("/deleted/nasty/restore")
    assert (page.places.run_names(), page.places.deleted_runs()) == (["nasty"], ["nasty-2"])
    assert "no such run was deleted" in client.post("/deleted/x/restore").text
    assert client.post("/runs/x/delete").status_code == 404


def test_a_run_that_goes_on_is_not_deleted(page: Page, client: TestClient) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        started = psutil.Process(process.pid).create_time()
        run = written_run(page, pid=process.pid, started=started, host=platform.node())
        assert "it runs; stop it first" in client.post("/runs/nasty/delete").text
        assert run.is_dir()
        process.kill()


@pytest.mark.parametrize(
    ("events", "verdict"),
    [
        ([("validation", 5, 0.8, [-0.2, -0.3, -0.1])], "Learning: the validation loss has fallen by 20.0%."),
        (
            [("validation", 5, 0.7, [-0.3, -0.4, -0.2]), ("validation", 9, 0.8, [-0.2, -0.3, -0.1])],
            "Learning: the validation loss has fallen by 20.0%; it was lowest at step 5.",
        ),
        ([("validation", 5, 1.2, [0.2, 0.1, 0.3])], "Overfitting: the validation loss is 20.0% above"),
        ([("validation", 5, 1.0, [0.0, -0.1, 0.1])], "The validation loss has not clearly changed yet."),
        ([("forgetting", 0, 0.0, None), ("forgetting", 9, 0.57, None)], "Forgetting: 57% of the effect of unrelated"),
    ],
)
def test_a_run_is_described_in_words(page: Page, events: list[Any], verdict: str) -> None:
    lines = [
        {"event": kind, "step": step} | ({"loss": x, "change": change} if change else {"forgetting": x})
        for kind, step, x, change in events
    ]
    written_run(page, *lines)
    (found,) = page.view("nasty").verdicts
    assert found.startswith(verdict)


def test_a_port_in_use_is_named(page: Page) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"--port {port} at 127.0.0.1: .*; give another"):
            serve(build(page), host="127.0.0.1", port=port, visitors={"secret": Visitor("")})


def test_a_certificate_that_cannot_be_read_is_named(page: Page, tmp_path: Path) -> None:
    (tmp_path / "wrong.pem").write_text("no certificate")
    for certificate in (tmp_path / "gone.pem", tmp_path / "wrong.pem"):
        tls = Certificate(certificate, certificate)
        with pytest.raises(UsageError, match="--certificate and --private_key: "):
            serve(build(page), host="127.0.0.1", port=0, visitors={"secret": Visitor("")}, tls=tls)


def test_a_disk_that_takes_no_file_is_named(page: Page, client: TestClient) -> None:
    page.places.runs.mkdir()
    (page.places.runs / ".queue").write_text("")
    answer = client.post("/new/start", data=form(page))
    assert (answer.status_code, "File exists" in answer.text) == (400, True)
