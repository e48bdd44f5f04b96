"""How often a run can pause for something else (grids, validation), from what that and its first steps have taken."""

from fractions import Fraction
from math import ceil
from pathlib import Path
from statistics import median

from finetune.results import tracking

FIRST_STEPS = 6
"""After so many steps of training it is known how long one takes."""


def measured_interval(folder: Path, what: str, total: int, *, share: float, most: int) -> int | None:
    """`eval_interval` by what timings.jsonl has noted; None while that does not suffice.

    It is read from the file, so that a resumed run pauses at the steps at which it would have paused before.

    Args:
        folder: of the run.
        what: "grid" or "validation", as it was noted.
        total, share, most: as in `eval_interval`.
    """
    records = tracking.timings(folder)
    took = [record[f"{what}_seconds"] for record in records if f"{what}_seconds" in record]
    first = [record["seconds"] for record in records if "seconds" in record and 1 < record["step"] <= FIRST_STEPS]
    if not took or len(first) < FIRST_STEPS - 1:
        return None
    return eval_interval(took[0], median(first), total, share=share, most=most)


def eval_interval(pause: float, step: float, total: int, *, share: float, most: int) -> int | None:
    """Steps between pauses, so that all of them take no more than a share of the time; None: no room for any.

    Args:
        pause: seconds that the first has taken.
        step: seconds that a step of training takes.
        total: steps of the run.
        share: of the run's time.
        most: pauses, however short they are.
    """
    after_first = min(most, int(share * total * step / pause)) - 1
    return ceil(total / after_first) if after_first > 1 else None


def should_run(step: int, every: int | Fraction | None) -> bool:
    """True at the first step at or after each multiple of `every`; None and 0 are never."""
    return bool(every) and step // every > (step - 1) // every
