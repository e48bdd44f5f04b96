"""How numbers and lists read."""

import pytest

from finetune.text import duration, join_limited, pluralize, pluralize_float


def test_counts_and_lists() -> None:
    assert (pluralize(1, "caption"), pluralize(0, "caption")) == ("1 caption", "0 captions")
    assert join_limited(["a", "b"], most=2) == "a, b"
    assert join_limited(["a", "b", "c"], most=2) == "a, b and 1 more"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.001316, "under 0.01"), (0.5, "0.5"), (4.528, "4.53"), (12345.6, "12346")],
)
def test_numbers_of_epochs(number: float, text: str) -> None:
    assert pluralize_float(number, "epoch") == f"{text} epochs"
    assert pluralize_float(1.0, "epoch") == "1 epoch"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h"), (86400, "24 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
