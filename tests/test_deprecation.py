"""Attributes under their names of before."""

import pytest

import finetune
from finetune.deprecation import Renamed, renamed_arguments


class Example:
    old = Renamed("new")

    def new(self, number: int) -> int:
        return number + 1


def test_a_renamed_method_works_and_warns() -> None:
    with pytest.warns(DeprecationWarning, match=r"^Example\.old is now Example\.new$"):
        assert Example().old(1) == 2


@pytest.mark.parametrize(
    ("owner", "old", "new"),
    [
        ("Trainer", "take", "run_prepared"),
        ("Trainer", "settle", "raise_if_diverged"),
        ("Trainer", "in_full", "export_weights"),
        ("Trainer", "averaged", "ema_weights"),
        ("NoisePrediction", "moved", "step"),
        ("NoisePrediction", "velocity", "predict_v"),
        ("ImageFolder", "checked", "image_info"),
        ("Preprocess", "place", "crop"),
    ],
)
def test_methods_of_public_classes_go_on_working(owner: str, old: str, new: str) -> None:
    kind = getattr(finetune, owner)
    with pytest.warns(DeprecationWarning, match=f"{owner}.{old} is now {owner}.{new}"):
        assert getattr(kind, old) is getattr(kind, new)


@renamed_arguments(at_most="time_budget")
def budget(factor: int, *, time_budget: float | None = None) -> tuple[int, float | None]:
    """A function with an argument of another name."""
    return factor, time_budget


def test_an_argument_is_taken_by_its_old_name_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="budget: at_most is now called time_budget"):
        assert budget(2, at_most=3.0) == (2, 3.0)  # pyright: ignore[reportCallIssue]
    assert budget(2, time_budget=3.0) == (2, 3.0)
    assert budget(1) == (1, None)
    with pytest.raises(TypeError, match="unknown"):
        budget(1, unknown=1)  # pyright: ignore[reportCallIssue]
    assert (budget.__name__, budget.__doc__) == ("budget", "A function with an argument of another name.")
