"""How counts and lists are said to people."""

from collections.abc import Sequence


def pluralize(number: int, noun: str) -> str:
    """ "1 caption", "2 captions"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def join_limited(names: Sequence[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
