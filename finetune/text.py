"""Counts and lists in messages."""

from collections.abc import Sequence


def pluralize(number: int, noun: str) -> str:
    """ "1 caption", "2 captions"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def pluralize_float(number: float, noun: str) -> str:
    """ "1 epoch", "4.53 epochs", and "under 0.01 epochs" of what is smaller."""
    if number < 0.01:
        return f"under 0.01 {noun}s"
    text = f"{number:.0f}" if number >= 1000 else f"{number:.3g}"
    return f"{text} {noun}{'' if text == '1' else 's'}"


def join_limited(names: Sequence[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def duration(seconds: float) -> str:
    """ "40 s", "12 min", "3.4 h": how long something takes, as far as an estimate knows it."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.3g} h"
