"""A followed run as HTML: progress, curves, images and log."""

import base64
import io
from datetime import timedelta
from html import escape
from pathlib import Path

from PIL import Image

from finetune.results.curves import STYLE as CURVES
from finetune.results.curves import curve, spread
from finetune.results.event_reader import RunEvents

STYLE = (
    CURVES
    + """
:root, .gradio-container { --mark: #0b6e99; --faint: #9a958b; }
.dark, .dark .gradio-container { --mark: #7cc9ec; --faint: #6d7175; --color-accent: #7cc9ec; }
.run, .told { overflow-wrap: anywhere; } .run svg { width: 100%; height: auto; }
.sheet img { max-width: 100%; height: auto; }
.run progress { width: 100%; accent-color: var(--mark); }
.run figure { margin: .5rem 0; } .run pre, .told pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.run .state { font-size: 1.15rem; font-weight: 600; margin: 0; }
"""
)

_NOTHING = "<p>No run is chosen.</p>"
_SMALL = 1024
"""Pixels of a picture on the page."""


def of_run(run: RunEvents | None) -> str:
    """Everything but the pictures."""
    if run is None:
        return _NOTHING
    sections = [_where(run), _loss(run), _validation(run), _forgetting(run)]
    log = escape("\n".join(run.said))
    sections.append(f"<details><summary>Log</summary><pre>{log}</pre></details>")
    return f'<section class="run" aria-label="{escape(run.folder.name)}">{"".join(sections)}</section>'


def _where(run: RunEvents) -> str:
    state = "stopping" if run.stopping and run.state == "running" else run.state
    total, done = run.begun.get("total", 0), run.step.get("step", run.begun.get("step", 0))
    if run.phase == "encoding" and state == "running" and run.progress:
        what, done, total = run.progress["name"], run.progress["done"], run.progress["total"]
    else:
        what = run.phase if state == "running" else state
    facts = [what, f"{done} of {total}"]
    left, speed, memory = (run.step.get(name) for name in ("left", "images_per_second", "peak_memory_gb"))
    if state == "running" and run.phase == "training" and left is not None:
        facts.append(f"{timedelta(seconds=min(left, 1e9))} left")
    if speed is not None and memory is not None:
        facts += [f"{speed:.3g} images/s", f"{memory:.1f} GB"]
    bar = f'<progress value="{done}" max="{total or 1}" aria-label="{escape(what)}"></progress>'
    why = escape(run.end["text"]) if run.end else ""
    if state == "cut off":
        why = "Its process has ended without an error message. It can be resumed."
    head = f'<p class="state">{escape(run.folder.name)}: {escape(" · ".join(facts))}</p>'
    return f"{head}{bar}{f'<p>{why}</p>' if why else ''}"


def _loss(run: RunEvents) -> str:
    if run.loss.last_step is None:
        return ""
    drawn = curve("training loss", run.loss.averages, faint=run.loss.losses)
    return f"<figure>{drawn}<figcaption>Loss: of each step, and smoothed over about 20</figcaption></figure>"


def _validation(run: RunEvents) -> str:
    lines = [line for _, line in sorted(run.validations.items()) if "change" in line]
    if not lines:
        return ""
    points = [(0.0, 0.0), *((line["step"], line["change"][0]) for line in spread(lines))]
    band = [(0.0, 0.0, 0.0), *((line["step"], *line["change"][1:]) for line in spread(lines))]
    drawn = curve("change of the validation loss", points, band=band, level=0.0)
    best = min(lines, key=lambda line: line["loss"])["step"]
    caption = f"Validation: change since step 0 with its 95% interval; lowest at step {best}"
    return f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>"


def _forgetting(run: RunEvents) -> str:
    lines = [line for _, line in sorted(run.forgetting.items())]
    if len(lines) < 2:
        return ""
    drawn = curve(
        "forgetting, in percent", [(line["step"], 100 * line["forgetting"]) for line in spread(lines)], level=0.0
    )
    caption = f"Forgetting: {lines[-1]['forgetting']:.0%} of the effect of unrelated prompts has changed"
    return f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>"


def of_queue(running: str | None, waiting: list[str], failed: str) -> str:
    """The commands that were started here."""
    lines = [f"<li><strong>now</strong> <code>{escape(running)}</code></li>"] if running else []
    lines += [f"<li><code>{escape(words)}</code></li>" for words in waiting]
    why = f'<p role="alert">The last one has failed: {escape(failed)}</p>' if failed else ""
    join_limited = "".join(lines)
    return (f"<ol>{join_limited}</ol>" if lines else "<p>Nothing is waiting.</p>") + why


def of_text(text: str) -> str:
    """What a command has printed."""
    return f'<div class="told"><pre>{escape(text)}</pre></div>'


def of_picture(path: Path, alt: str, below: str = "") -> str:
    """A picture inside the page, with words below it; words alone where there is none any more."""
    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
    except OSError:
        return f"<p>{escape(path.name)} is not there any more.</p>"
    small.thumbnail((_SMALL, 4 * _SMALL))
    small.save(file := io.BytesIO(), "JPEG", quality=88)
    content = base64.b64encode(file.getvalue()).decode()
    caption = f"<p>{escape(below)}</p>" if below else ""
    return f'<div class="sheet"><img alt="{escape(alt)}" src="data:image/jpeg;base64,{content}"></div>{caption}'
