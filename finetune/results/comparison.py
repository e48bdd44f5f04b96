"""The comparison page of several runs: differing options, figures, curves and images."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from finetune.atomic_io import write_whole
from finetune.results import report_sections
from finetune.results.report import page


def write_comparison(path: Path, runs: Sequence[Path], settings: Sequence[Mapping[str, Any]]) -> None:
    """Write a page that needs no network.

    Args:
        path: to write.
        runs: run folders.
        settings: of each, all options by name.
    """
    names = [run.resolve().name for run in runs]
    different = {
        option: [_formatted(each.get(option)) for each in settings]
        for option in settings[0]
        if any(each.get(option) != settings[0][option] for each in settings)
    }
    figures = [report_sections.in_short(run) for run in runs]
    names_of_figures = dict.fromkeys(figure for each in figures for figure in each)
    rows = {figure: [each.get(figure, "") for each in figures] for figure in names_of_figures}
    drawn = {
        "Pictures": report_sections.last_grid,
        "Validation": report_sections.validation,
        "Forgetting": report_sections.forgetting,
    }
    sections = {"Results": _columns(names, rows), "Options that differ": _columns(names, different)}
    for heading, draw in (drawn | {"Loss": report_sections.loss}).items():
        columns = [f"<div><h3>{escape(name)}</h3>{draw(run)}</div>" for name, run in zip(names, runs, strict=True)]
        sections[heading] = f'<div class="runs">{"".join(columns)}</div>'
    write_whole(path, page(" and ".join(names), sections))


def _columns(names: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A table with a column for each run."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("", *names))
    lines = [
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(text)}</td>" for text in texts)}</tr>'
        for name, texts in rows.items()
    ]
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>" if lines else "<p>Nothing.</p>"


def _formatted(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)
