"""The sections of a report, as HTML that needs no network."""

import base64
import io
import json
import math
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from finetune.atomic_io import each_json_line, json_lines
from finetune.results import metrics_log
from finetune.results.curves import LossCurve, curve, spread
from finetune.training.validation import BANDS

SHEET = "pictures.jpg"
"""The contact sheet, in a run folder."""

_WIDEST = 1200
"""Pixels of a picture in the report."""

_ROOM = 3_500_000
"""Bytes of pictures, as base64 makes them a third larger: the report stays below 5 MB."""

_SLIDE = "this.previousElementSibling.lastElementChild.style.clipPath='inset(0 0 0 '+this.value+'%)'"


def table(rows: Mapping[str, str]) -> str:
    """Two columns: name and text."""
    cells = [f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>' for name, text in rows.items()]
    return f"<table>{''.join(cells)}</table>" if cells else ""


def before_after(folder: Path, step: int) -> str:
    """The first grid and the last up to `step`, one over the other, with a slider; nothing where there are not both."""
    grids = {at: path for at, path in _steps(folder).items() if at <= step}
    if len(grids) < 2:
        return ""
    first, last = min(grids), max(grids)
    before, after = (_embedded(grids[at], f"images at step {at}")[0] for at in (first, last))
    slider = f'<input type="range" value="50" aria-label="how much of the image is before" oninput="{_SLIDE}">'
    caption = f"Left: step {first}. Right: step {last}{_copies(folder, last)}."
    return f'<div class="pair">{before}{after}</div>{slider}<p>{caption}</p>'


def grids(folder: Path) -> str:
    """The first and the last grid above; as many of those between as there is room for, evenly chosen."""
    grids, room, sections = _steps(folder), _ROOM, []
    for step in sorted(grids)[1:-1]:
        picture, size = _embedded(grids[step], f"images at step {step}")
        if size > room / 3:  # the first and the last take as much each
            break
        room -= size
        sections.append(f"<details><summary>step {step}{_copies(folder, step)}</summary>{picture}</details>")
    return "".join(sections)


def _copies(folder: Path, step: int) -> str:
    """What is known of near copies in a grid."""
    records = {line["step"]: line for line in json_lines(folder / metrics_log.COPIES)}
    return f": {of_copies(records[step])}" if step in records else ""


def of_copies(record: Mapping[str, Any]) -> str:
    """What a line of copies.jsonl says."""
    return f"{record['copies']} of {record['pictures']} are near copies of training images"


def last_grid(folder: Path) -> str:
    """The last grid alone."""
    grids = _steps(folder)
    return _embedded(grids[max(grids)], f"images at step {max(grids)}")[0] if grids else ""


def pictures(folder: Path) -> str:
    """Some of the pictures that it learns from, with their captions."""
    path = folder / SHEET
    return _embedded(path, "images that are trained on, with their captions")[0] if path.exists() else ""


def _steps(folder: Path) -> dict[int, Path]:
    """Step -> its grid."""
    matches = [(re.fullmatch(r"step-(\d+)\.png", path.name), path) for path in (folder / "samples").glob("step-*.png")]
    return {int(match[1]): path for match, path in matches if match}


def _embedded(path: Path, alt: str) -> tuple[str, int]:
    """A picture inside the page, and its bytes."""
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((_WIDEST, 4 * _WIDEST))
    small.save(file := io.BytesIO(), "JPEG", quality=85)
    content = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/jpeg;base64,{content}">', len(content)


def validation(folder: Path) -> str:
    """How the loss on held-out pictures has changed, in all and by noise."""
    lines = _validations(folder)
    if not lines:
        return ""
    figures = []
    for name, key in (("", "change"), *((f", {band} noise", f"change_{band}") for band in BANDS)):
        changes = [(line["step"], *line[key]) for line in spread(lines)]
        points = [(0.0, 0.0), *((step, mean) for step, mean, _, _ in changes)]
        band = [(0.0, 0.0, 0.0), *((step, low, high) for step, _, low, high in changes)]
        drawn = curve(f"change of the validation loss{name}", points, band=band, level=0.0)
        figures.append(
            f"<figure>{drawn}<figcaption>Change since step 0{name}, with its 95 % interval</figcaption></figure>"
        )
    best = min(lines, key=lambda line: line["loss"])
    mean, low, high = best["change"]
    best_line = f"least at step {best['step']}: {mean:+.4f} since the start (95 %: {low:+.4f} to {high:+.4f})"
    rest = f"<details><summary>By noise</summary>{''.join(figures[1:])}</details>"
    return f"<p>The loss on images that are held out was {best_line}.</p>{figures[0]}{rest}"


def _validations(folder: Path) -> list[dict[str, Any]]:
    """Return the validations after the first that used the same pictures, noise and timesteps as the last."""
    lines = json_lines(folder / metrics_log.VALIDATION)
    return [line for line in lines if "change" in line and line.get("of") == lines[-1].get("of")]


def forgetting(folder: Path) -> str:
    """What the forgetting meter has said."""
    lines = json_lines(folder / metrics_log.FORGETTING)
    if len(lines) < 2:
        return ""
    descriptions = {
        "forgetting": "of the effect of unrelated prompts has changed",
        "with_trigger": "with the trigger",
    }
    summary = ", ".join(f"{lines[-1][name]:.1%} {what}" for name, what in descriptions.items() if name in lines[-1])
    drawn = curve(
        "forgetting, in percent", [(line["step"], 100 * line["forgetting"]) for line in spread(lines)], level=0.0
    )
    caption = "In percent. 0: prompts have the same effect as before; 100: as far off as a network that ignores prompts"
    return f"<p>In the end {summary}.</p><figure>{drawn}<figcaption>{caption}</figcaption></figure>"


def evaluations(folder: Path) -> str:
    """The values of evaluators that have no section of their own, a curve each."""
    points = dict[str, list[tuple[float, float]]]()
    for line in json_lines(folder / metrics_log.EVALUATIONS):
        for key, value in line.items():
            if key not in ("step", "name") and isinstance(value, (int, float)) and math.isfinite(value):
                points.setdefault(f"{line['name']}: {key}", []).append((line["step"], value))
    return "".join(
        f"<figure>{curve(name, spread(some))}<figcaption>{escape(name)}</figcaption></figure>"
        for name, some in points.items()
        if len(some) > 1
    )


def loss(folder: Path) -> str:
    """The training loss."""
    losses = _losses(folder)
    if losses.last_step is None:
        return ""
    drawn = curve("training loss", losses.averages, faint=losses.losses)
    return f"<figure>{drawn}<figcaption>Of each step, and smoothed over about 20</figcaption></figure>"


def _losses(folder: Path) -> LossCurve:
    lines = each_json_line(folder / metrics_log.METRICS)
    return LossCurve((line["step"], line["loss"]) for line in lines if line["loss"] is not None)


def ledger(folder: Path) -> str:
    """What became of every file that was found."""
    path = folder / "ledger.json"
    if not path.exists():
        return ""
    counts = json.loads(path.read_text(encoding="utf-8"))
    rows = {name.replace("_", " "): str(count) for name, count in counts.items() if name != "skipped"}
    rows |= {f"skipped: {why}": str(count) for why, count in counts["skipped"].items()}
    bad = [f"{line['path']}: {line['reason']}" for line in json_lines(folder / "quarantine.jsonl")]
    join_limited = "".join(f"<li>{escape(text)}</li>" for text in bad[:100])
    return table(rows) + (f"<h3>Quarantined</h3><ul>{join_limited}</ul>" if join_limited else "")


def in_short(folder: Path) -> dict[str, str]:
    """What a run has come to, in a few figures: name -> text."""
    figures: dict[str, str] = {}
    losses = _losses(folder)
    if losses.last_step is not None:
        figures["steps"] = f"{losses.last_step:.0f}"
        figures["training loss, smoothed"] = f"{losses.last_average:.4f}"
    if checks := _validations(folder):
        best = min(checks, key=lambda line: line["loss"])
        figures["validation loss, least"] = f"{best['loss']:.4f} at step {best['step']}"
        mean, low, high = best["change"]
        figures["its change since the start"] = f"{mean:+.4f} (95 %: {low:+.4f} to {high:+.4f})"
    if drifts := json_lines(folder / metrics_log.FORGETTING):
        figures["forgetting"] = f"{drifts[-1]['forgetting']:.1%}"
    if grids := json_lines(folder / metrics_log.COPIES):
        figures["images in the end"] = of_copies(grids[-1])
    return figures
