"""The page in a real browser: start a run, watch it end, stop one, resume it; how fast it shows, and who can use it.

    pip install playwright && npm install axe-core     # and Chromium
    python benchmarks/page.py --axe node_modules/axe-core/axe.min.js --work /tmp/page

Prints each figure with its aim; screenshots, light and dark, wide and narrow, are left in --work to be looked at.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright  # pyright: ignore[reportMissingImports] # not one of our extras

ROOT = Path(__file__).parents[1]
PORT = 7893
MANY = 100_000


def say(what: str, figure: str, aim: str = "") -> None:
    print(f"{what:<64} {figure:<24} {f'aim: {aim}' if aim else ''}", flush=True)


def until(holds: Callable[[], bool], seconds: float) -> float:
    """Seconds until something holds."""
    clock = time.perf_counter()
    while not holds():
        if time.perf_counter() - clock > seconds:
            raise SystemExit(f"not within {seconds:.0f} s")
        time.sleep(0.02)
    return time.perf_counter() - clock


def watched(page: Page) -> str:
    found = page.locator(".run .state")
    return found.first.inner_text() if found.count() else ""


def choose(page: Page, label: str, value: str) -> None:
    page.get_by_label(label, exact=True).first.fill(value)
    page.keyboard.press("Enter")


def start(page: Page, name: str, folder: Path, steps: int) -> None:
    """Fill in the form by keyboard alone, start, and watch what comes of it."""
    page.get_by_role("tab", name="Start").press("Enter")
    choose(page, "Pictures", str(folder))
    page.get_by_label("Steps").first.fill(str(steps))
    page.keyboard.press("Tab")
    page.get_by_role("button", name="Start", exact=True).press("Enter")
    page.get_by_role("tab", name="Watch").press("Enter")
    until(lambda: name in page.get_by_label("Run", exact=True).first.input_value(), 60)


def measure_runs(page: Page, work: Path) -> None:
    """Start one and watch it end, stop one, resume it."""
    start(page, "pics-tiny", work / "pics", 40)
    lines = work / "runs/pics-tiny/events.jsonl"
    until(lambda: lines.exists() and '"step": 5,' in lines.read_text(), 120)
    delays = []
    for number in range(6, 12):
        until(lambda number=number: f'"event": "step", "step": {number},' in lines.read_text(), 60)
        shown = rf"({'|'.join(map(str, range(number, 41)))}) of 40"
        delays.append(until(lambda shown=shown: page.locator(f".run .state >> text=/{shown}/").count() > 0, 20))
    say("a running run's step on the page after the event, worst of 6", f"{max(delays):.2f} s", "2 s")
    until(lambda: "done" in watched(page), 200)
    say("a run that was started on the page has ended", watched(page))
    start(page, "more-tiny", work / "more", 400)
    until(lambda: "training" in watched(page), 120)
    page.get_by_role("button", name="Save a checkpoint and stop").press("Enter")
    until(lambda: "stopped" in watched(page), 60)
    say("a run that was stopped", watched(page))
    page.get_by_role("button", name="Resume").press("Enter")
    until(lambda: "training" in watched(page), 120)
    say("the same, resumed", watched(page))
    page.get_by_role("button", name="Save a checkpoint and stop").press("Enter")
    until(lambda: "stopped" in watched(page), 60)


def write_many(folder: Path) -> None:
    """A run folder of 100,000 steps, and one more each second."""
    (folder / "samples").mkdir(parents=True)
    begin = {"event": "begin", "pid": 1, "started": 0, "host": "elsewhere", "step": 0, "total": 2 * MANY}
    more = {"seconds": 0.1, "left": 60, "images_per_second": 10.0, "peak_memory_gb": 1.0}
    with (folder / "events.jsonl").open("w") as file:
        file.write(json.dumps({"at": time.time()} | begin) + "\n")
        for step in range(1, MANY + 1):
            on_progress = {"at": time.time(), "event": "step", "step": step, "loss": 1 / step, **more}
            file.write(json.dumps(on_progress) + "\n")


def measure_many(page: Page, work: Path) -> None:
    folder = work / "runs/many"
    write_many(folder)
    clock = time.perf_counter()
    page.reload()
    page.get_by_role("tab", name="Watch").press("Enter")
    choose(page, "Run", "many")
    until(lambda: f"{MANY} of" in watched(page), 60)
    say(f"{MANY} events shown after the page was loaded", f"{time.perf_counter() - clock:.1f} s")
    delays = []
    for step in range(MANY + 1, MANY + 6):
        on_progress = {"at": time.time(), "event": "step", "step": step, "loss": 0.1, "seconds": 0.1, "left": 60}
        with (folder / "events.jsonl").open("a") as file:
            file.write(json.dumps(on_progress | {"images_per_second": 10.0, "peak_memory_gb": 1.0}) + "\n")
        delays.append(until(lambda step=step: f"{step} of" in watched(page), 20))
    say("one more event after it, worst of 5", f"{max(delays):.2f} s", "2 s")
    shutil.rmtree(folder)
    until(lambda: "many" not in watched(page), 20)


def serious(page: Page, axe: Path) -> list[str]:
    """What axe finds that is serious or critical."""
    page.add_script_tag(path=axe)
    found: Any = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    bad = [each for each in found["violations"] if each["impact"] in ("serious", "critical")]
    return [f"{each['id']}: {each['nodes'][0]['html'][:110]} ({len(each['nodes'])})" for each in bad]


def make_thumbnail(browser: Any, address: str, work: Path, axe: Path | None) -> None:
    """Each tab, light and dark, wide and narrow."""
    for scheme in ("light", "dark"):
        for width in (1280, 390):
            page = browser.new_page(viewport={"width": width, "height": 1000}, color_scheme=scheme)
            page.goto(address)
            for tab in ("Start", "Watch", "Generate"):
                page.get_by_role("tab", name=tab).click()
                page.wait_for_timeout(2500)
                page.screenshot(path=work / f"{tab.lower()}-{scheme}-{width}.png", full_page=True)
                beyond = page.evaluate("document.documentElement.scrollWidth - innerWidth")
                found = serious(page, axe) if axe else ["axe was not given"]
                figure = f"{len(found)} serious, {max(0, beyond)} px too wide"
                say(f"{tab}, {scheme}, {width} px: axe", figure, "0, 0")
                for line in found:
                    print(f"    {line}")
            page.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Try the page in a browser.")
    parser.add_argument("--work", type=Path, required=True, help="a folder that is emptied")
    parser.add_argument("--axe", type=Path, help="axe.min.js")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    options = parser.parse_args()
    work = options.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    for name in ("pics", "more"):
        shutil.copytree(ROOT / "examples/butterflies", work / name)
    words = [sys.executable, "-m", "finetune", "ui", "--port", str(PORT), "--work", str(work), "--data", str(work)]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = server.stdout.readline().split()[-1]
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 1000})
            page.goto(address)
            page.get_by_role("button", name="Start", exact=True).wait_for()
            paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
            say("first paint", f"{paint / 1000:.2f} s", "2 s")
            measure_runs(page, work)
            measure_many(page, work)
            make_thumbnail(browser, address, work, options.axe)
            browser.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
