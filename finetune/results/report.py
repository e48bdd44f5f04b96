"""report.html: a run told to somebody who was not there, in one file that needs no network.

It is made from the run folder alone, so it can be written at any time, and anew.
"""

import base64
import io
import json
import re
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from finetune.files import write_whole
from finetune.results import tracking
from finetune.results.curves import STYLE as CURVES
from finetune.results.curves import curve, smoothed, thinned
from finetune.training.validation import BANDS

REPORT = "report.html"

_WIDEST = 1200
"""Pixels of a picture in the report."""

_ROOM = 3_500_000
"""Bytes of pictures, as base64 makes them a third larger: the report stays below 5 MB."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2021; --paper: #fdfcf9; --faint: #c9c4ba; --mark: #0b6e99; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e4da; --paper: #1c1e20; --faint: #55585c; --mark: #6fc3e8; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
svg, img { width: 100%; height: auto; } svg { background: none; } figure { margin: 1rem 0; }
table { border-collapse: collapse; } th, td { vertical-align: top; }
th { text-align: left; font-weight: normal; padding-right: 1.5rem; overflow-wrap: normal; }
pre { overflow-x: auto; border: 1px solid var(--faint); padding: .75rem; }
.pair { position: relative; } .pair img + img { position: absolute; left: 0; top: 0; clip-path: inset(0 0 0 50%); }
input[type=range] { width: 100%; accent-color: var(--mark); }
"""

_SLIDE = "this.previousElementSibling.lastElementChild.style.clipPath='inset(0 0 0 '+this.value+'%)'"

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title><style>{style}</style></head>
<body><main><h1>{title}</h1>
{body}
</main></body></html>
"""


def write_report(
    folder: Path, *, step: int, about: Mapping[str, str], settings: Mapping[str, Any], load: Mapping[str, str]
) -> Path:
    """Write `report.html` into a run folder, from what is there.

    Args:
        folder: of the run.
        step: whose weights are the result, or the last one yet.
        about: what to say of it first: name -> text.
        settings: options that differ from their defaults.
        load: how to use the result: program -> what to do there.
    """
    sections = {
        "": _table(about),
        "Before and after": _before_after(folder, step),
        "Validation": _validation(folder),
        "Loss": _loss(folder),
        "Pictures on the way": _grids(folder),
        "Use it": "".join(f"<h3>{escape(name)}</h3><pre>{escape(text)}</pre>" for name, text in load.items()),
        "Every file that was found": _ledger(folder),
        "Options that differ from their defaults": _table({name: str(value) for name, value in settings.items()}),
    }
    body = "\n".join(
        f"<section>{f'<h2>{escape(name)}</h2>' if name else ''}\n{html}</section>"
        for name, html in sections.items()
        if html
    )
    title = escape(folder.resolve().name)
    write_whole(folder / REPORT, _PAGE.format(title=title, style=_STYLE + CURVES, body=body))
    return folder / REPORT


def _table(rows: Mapping[str, str]) -> str:
    cells = [f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>' for name, text in rows.items()]
    return f"<table>{''.join(cells)}</table>" if cells else ""


def _before_after(folder: Path, step: int) -> str:
    grids = {at: path for at, path in _steps(folder).items() if at <= step}
    if len(grids) < 2:
        return ""
    first, last = min(grids), max(grids)
    before, after = (_embedded(grids[at], f"pictures at step {at}")[0] for at in (first, last))
    slider = f'<input type="range" value="50" aria-label="how much of the picture is before" oninput="{_SLIDE}">'
    return f'<div class="pair">{before}{after}</div>{slider}<p>Left: step {first}. Right: step {last}.</p>'


def _grids(folder: Path) -> str:
    """The first and the last grid above; as many of those between as there is room for, evenly chosen."""
    grids, room, told = _steps(folder), _ROOM, []
    for step in sorted(grids)[1:-1]:
        picture, size = _embedded(grids[step], f"pictures at step {step}")
        if size > room / 3:  # the first and the last take as much each
            break
        room -= size
        told.append(f"<details><summary>step {step}</summary>{picture}</details>")
    return "".join(told)


def _steps(folder: Path) -> dict[int, Path]:
    """Step -> its grid."""
    found = [(re.fullmatch(r"step-(\d+)\.png", path.name), path) for path in (folder / "samples").glob("step-*.png")]
    return {int(match[1]): path for match, path in found if match}


def _embedded(path: Path, alt: str) -> tuple[str, int]:
    """A picture inside the page, and its bytes."""
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((_WIDEST, 4 * _WIDEST))
    small.save(file := io.BytesIO(), "JPEG", quality=85)
    content = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/jpeg;base64,{content}">', len(content)


def _validation(folder: Path) -> str:
    lines = [line for line in _lines(folder / tracking.VALIDATION) if "change" in line]
    if not lines:
        return ""
    told = []
    for name, key in (("", "change"), *((f", {band} noise", f"change_{band}") for band in BANDS)):
        changes = [(line["step"], *line[key]) for line in lines]
        points = [(0.0, 0.0), *((step, mean) for step, mean, _, _ in changes)]
        band = [(0.0, 0.0, 0.0), *((step, low, high) for step, _, low, high in changes)]
        drawn = curve(f"change of the validation loss{name}", points, band=band, level=0.0)
        told.append(
            f"<figure>{drawn}<figcaption>Change since step 0{name}, with its 95 % interval</figcaption></figure>"
        )
    best = min(lines, key=lambda line: line["loss"])
    mean, low, high = best["change"]
    said = f"least at step {best['step']}: {mean:+.4f} since the start (95 %: {low:+.4f} to {high:+.4f})"
    rest = f"<details><summary>By noise</summary>{''.join(told[1:])}</details>"
    return f"<p>The loss on pictures that are held out was {said}.</p>{told[0]}{rest}"


def _loss(folder: Path) -> str:
    points = [(line["step"], line["loss"]) for line in _lines(folder / tracking.METRICS) if line["loss"] is not None]
    if not points:
        return ""
    drawn = curve("training loss", thinned(smoothed(points)), faint=thinned(points))
    return f"<figure>{drawn}<figcaption>Of each step, and smoothed over about 20</figcaption></figure>"


def _ledger(folder: Path) -> str:
    path = folder / "ledger.json"
    if not path.exists():
        return ""
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = {name.replace("_", " "): str(count) for name, count in found.items() if name != "skipped"}
    rows |= {f"skipped: {why}": str(count) for why, count in found["skipped"].items()}
    bad = [f"{line['path']}: {line['reason']}" for line in _lines(folder / "quarantine.jsonl")]
    listed = "".join(f"<li>{escape(text)}</li>" for text in bad[:100])
    return _table(rows) + (f"<h3>Quarantined</h3><ul>{listed}</ul>" if listed else "")


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    """The whole lines of a file that may be written to meanwhile."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]
