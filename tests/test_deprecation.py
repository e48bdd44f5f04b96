"""Attributes under their names of before."""

import pytest

import finetune
from finetune.deprecation import Renamed


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
    ],
)
def test_methods_of_public_classes_go_on_working(owner: str, old: str, new: str) -> None:
    kind = getattr(finetune, owner)
    with pytest.warns(DeprecationWarning, match=f"{owner}.{old} is now {owner}.{new}"):
        assert getattr(kind, old) is getattr(kind, new)
