"""The output of `finetune-unet plan` as rows of a table."""

import re

from finetune.log_handlers import LABEL_WIDTH

_MEMORY = re.compile(r"about ([\d.]+) GB of the ([\d.]+) GB")


def plan_rows(printed: str) -> list[tuple[str, str]]:
    """The name and the text of each row."""
    lines = [line for line in printed.splitlines() if line.strip()]
    return [(line[:LABEL_WIDTH].strip(), line[LABEL_WIDTH:].strip()) for line in lines]


def memory_share(text: str) -> tuple[float, float] | None:
    """The GB that a run needs and those that there are, from the row of memory; None where it names none."""
    found = _MEMORY.search(text)
    return (float(found[1]), float(found[2])) if found else None
