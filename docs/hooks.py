"""Writes the reference of all options into its page, from the declarations that `--help` reads."""

import dataclasses
import typing
from typing import Any

from finetune.arguments import what_follows
from finetune.options import SECTIONS, meanings

MARKER = "<!-- options -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marker by a table for each section of options."""
    return markdown.replace(MARKER, "\n\n".join(map(_section, SECTIONS, SECTIONS.values())))


def _section(name: str, section: type) -> str:
    hints, texts = typing.get_type_hints(section), meanings(section)
    rows = [_row(field, hints[field.name], texts[field.name]) for field in dataclasses.fields(section)]
    return "\n".join([f"## {name.capitalize()}", "", section.__doc__ or "", "", *rows])


def _row(field: dataclasses.Field[Any], hint: Any, meaning: str) -> str:
    indented = meaning.replace("\n", "\n    ")
    default = "" if field.default in (None, "", ()) else f" Default: `{field.default}`."
    return f"`--{field.name}{what_follows(field.name, hint)}`\n:   {indented}{default}\n"
