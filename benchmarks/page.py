"""The page with much to show, in a real browser: 200 runs, 100,000 events, 100,000 images, and a run that goes on.

    pip install playwright     # and Chromium
    python benchmarks/page.py --work /tmp/page

Prints each figure with its aim. What the page can do is tested in tests/page/browser.
"""

import argparse
import json
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from PIL import Image
from playwright.sync_api import Page, sync_playwright

RUNS, EVENTS, IMAGES = 200, 100_000, 100_000
STEP_SECONDS = 0.25
"""Of the run that goes on."""

SCROLL = """async () => {
    const times = [];
    await new Promise((done) => {
        let last = performance.now();
        const frame = (now) => {
            times.push(now - last);
            last = now;
            window.scrollBy(0, 300);
            times.length < 180 ? requestAnimationFrame(frame) : done();
        };
        requestAnimationFrame(frame);
    });
    return times.sort((a, b) => a - b)[171];
}"""
"""The 95th percentile of the milliseconds between frames while the page scrolls by 300 pixels a frame."""


def make_runs(folder: Path) -> None:
    """Run folders that have ended, the first with `EVENTS` steps."""
    for number in range(RUNS):
        run, steps = folder / f"run-{number:03d}", EVENTS if number == 0 else 500
        (run / "samples").mkdir(parents=True)
        events: list[dict[str, Any]] = [
            {"event": "begin", "pid": 1, "started": 0, "host": "", "step": 0, "total": steps}
        ]
        events += [step_event(step) for step in range(1, steps + 1)]
        events.append({"event": "picture", "step": steps, "path": f"samples/step-{steps}.png"})
        events.append({"event": "end", "state": "done", "text": ""})
        (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        Image.new("RGB", (600, 400), (number, 90, 120)).save(run / f"samples/step-{steps}.png")


def step_event(step: int) -> dict[str, Any]:
    measured = {"lr": 1e-4, "images_per_second": 3.0, "peak_memory_gb": 5.0, "left": 100, "at": time.time()}
    return {"event": "step", "step": step, "loss": 1 / step**0.1} | measured


def make_images(folder: Path) -> None:
    folder.mkdir()
    Image.new("RGB", (512, 512), "red").save(first := folder / "000000.jpg")
    for number in range(IMAGES):
        if number:
            shutil.copyfile(first, folder / f"{number:06d}.jpg")
        (folder / f"{number:06d}.txt").write_text(f"a cat, number {number}, tag{number % 50}")


@contextmanager
def live_run(folder: Path) -> Iterator[Callable[[], int]]:
    """A run of this process that writes a step every `STEP_SECONDS`; gives its last step."""
    (folder / "samples").mkdir(parents=True)
    process, ended, steps = psutil.Process(), threading.Event(), [0]
    begin = {"event": "begin", "pid": process.pid, "started": process.create_time(), "host": platform.node()}

    def write() -> None:
        with (folder / "events.jsonl").open("w") as file:
            file.write(json.dumps(begin | {"step": 0, "total": 2000}) + "\n")
            file.write(json.dumps({"event": "phase", "name": "training"}) + "\n")
            while not ended.wait(STEP_SECONDS):
                steps[0] += 1
                file.write(json.dumps(step_event(steps[0])) + "\n")
                file.flush()

    thread = threading.Thread(target=write)
    thread.start()
    yield lambda: steps[0]
    ended.set()
    thread.join()


def opened(page: Page, address: str, selector: str) -> str:
    """Seconds until a page shows something."""
    clock = time.perf_counter()
    page.goto(address)
    page.locator(selector).first.wait_for()
    return f"{time.perf_counter() - clock:.2f} s"


def watch(page: Page, home: str, folder: Path, server: psutil.Process) -> None:
    """How late the steps of a run appear, and what watching it costs."""
    with live_run(folder) as last_step:
        time.sleep(1)
        opened(page, f"{home}/runs/{folder.name}", ".uplot")
        before, clock, late = sum(server.cpu_times()[:2]), time.perf_counter(), []
        for _ in range(20):
            page.wait_for_timeout(1000)
            label = page.locator("figure [role=img]").first.get_attribute("aria-label") or ""
            shown = re.search(r"at step ([\d.]+)", label)
            late.append((last_step() - float(shown[1] if shown else 0)) * STEP_SECONDS)
        share = (sum(server.cpu_times()[:2]) - before) / (time.perf_counter() - clock)
    say("a running run: point on the chart, worst of 20", f"{max(late):.2f} s", "1 s")
    say("a running run: the server's share of a core, per tab", f"{100 * share:.1f} %", "2 %")


def say(what: str, figure: str, aim: str = "") -> None:
    print(f"{what:<56} {figure:<12} {f'aim: {aim}' if aim else ''}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder that is not there yet; 500 MB")
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    options = parser.parse_args()
    work: Path = options.work.resolve()
    work.mkdir()
    make_runs(work / "runs")
    make_images(work / "images")
    command = [sys.executable, "-m", "finetune", "ui", "--data", str(work), "--work", str(work), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as playwright:
        assert server.stdout is not None
        address = server.stdout.readline().split()[-1]
        home = address.partition("/?")[0]
        browser = playwright.chromium.launch(executable_path=options.chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        process = psutil.Process(server.pid)
        say("memory of the server at its start", f"{process.memory_info().rss / 1e6:.0f} MB")
        say("200 runs, never read before", opened(page, address, ".card"))
        say("200 runs", opened(page, home, ".card"), "2 s")
        say("a run with 100,000 events", opened(page, f"{home}/runs/run-000", ".uplot"), "2 s")
        watch(page, home, work / "runs/live", process)
        say("a wall of 100,000 images", opened(page, f"{home}/images/wall?folder={work / 'images'}", ".tile img"))
        say("scrolling it: 95th percentile between frames", f"{page.evaluate(SCROLL):.1f} ms", "20 ms")
        clock = time.perf_counter()
        page.get_by_role("searchbox").fill("number 77777")
        page.get_by_text("1 image", exact=True).wait_for()
        say("finding one of them, with 0.2 s of waiting for keys", f"{time.perf_counter() - clock:.2f} s")
        say("memory of the server", f"{process.memory_info().rss / 1e6:.0f} MB")
        browser.close()
        server.send_signal(signal.SIGINT)


if __name__ == "__main__":
    main()
