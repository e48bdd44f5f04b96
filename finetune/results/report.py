"""report.html: a self-contained report of a run, without network access.

It is made from the run folder alone, so it can be written at any time, and again.
"""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from finetune.atomic_io import write_whole
from finetune.results import report_sections
from finetune.results.curves import STYLE as CURVES

REPORT = "report.html"

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2021; --paper: #fdfcf9; --faint: #c9c4ba; --mark: #0b6e99; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e4da; --paper: #1c1e20; --faint: #55585c; --mark: #6fc3e8; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
svg, img { width: 100%; height: auto; } svg { background: none; } figure { margin: 1rem 0; }
table { border-collapse: collapse; } th, td { vertical-align: top; } td { padding-right: 1rem; }
th { text-align: left; font-weight: normal; padding-right: 1.5rem; overflow-wrap: normal; }
pre { overflow-x: auto; border: 1px solid var(--faint); padding: .75rem; }
.pair { position: relative; } .pair img + img { position: absolute; left: 0; top: 0; clip-path: inset(0 0 0 50%); }
.runs { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 2rem; }
input[type=range] { width: 100%; accent-color: var(--mark); }
"""

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
    folder: Path,
    *,
    step: int,
    facts: Mapping[str, str],
    given: Mapping[str, Any],
    derived: Mapping[str, Any],
    load: Mapping[str, str],
) -> Path:
    """Write `report.html` into a run folder, from what is there.

    Args:
        folder: of the run.
        step: whose weights are the result, or the last one yet.
        facts: what to say of it first: name -> text.
        given: options that were given, and differ from their defaults.
        derived: those that the run decided by itself.
        load: how to use the result: program -> what to do there.
    """
    sections = {
        "": report_sections.table(facts),
        "Before and after": report_sections.before_after(folder, step),
        "Validation": report_sections.validation(folder),
        "Forgetting": report_sections.forgetting(folder),
        "Evaluations": report_sections.evaluations(folder),
        "Loss": report_sections.loss(folder),
        "Samples during training": report_sections.grids(folder),
        "Training images": report_sections.pictures(folder),
        "Use it": "".join(f"<h3>{escape(name)}</h3><pre>{escape(text)}</pre>" for name, text in load.items()),
        "Files": report_sections.ledger(folder),
        "Options that were given": report_sections.table({name: str(value) for name, value in given.items()}),
        "Options that were chosen automatically": report_sections.table(
            {name: str(value) for name, value in derived.items()}
        ),
    }
    write_whole(folder / REPORT, page(folder.resolve().name, sections))
    return folder / REPORT


def page(title: str, sections: Mapping[str, str]) -> str:
    """A whole page: title, and heading -> HTML; what is empty is left out."""
    body = "\n".join(
        f"<section>{f'<h2>{escape(name)}</h2>' if name else ''}\n{html}</section>"
        for name, html in sections.items()
        if html
    )
    return _PAGE.format(title=escape(title), style=_STYLE + CURVES, body=body)
