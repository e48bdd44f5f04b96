import math

import pytest
import torch

from finetune.training.loss_function import LossFunction

PREDICTED, TARGET = torch.tensor([0.0, 1.0, -30.0]).view(3, 1, 1, 1), torch.zeros(3, 1, 1, 1)


def test_each_loss_is_its_formula() -> None:
    c = torch.tensor([0.5, 0.5, 0.5])
    root = math.sqrt(1.25) - 0.5
    large = math.sqrt(900.25) - 0.5
    expected = {
        "l2": [0, 1, 900],
        "l1": [0, 1, 30],
        "huber": [0, root, large],
        "smooth_l1": [0, 2 * root, 2 * large],
    }
    for kind, values in expected.items():
        losses = LossFunction(kind)(PREDICTED, TARGET, c).flatten()  # pyright: ignore[reportArgumentType]
        assert losses.tolist() == pytest.approx(values, rel=1e-6), kind


def test_thresholds_follow_sd_scripts_schedules() -> None:
    progress, sigma = torch.tensor([0.0, 0.5, 0.999]), torch.tensor([0.0, 1.0, float("inf")])
    assert LossFunction("l1").thresholds(progress, sigma) is None
    schedules = {
        "snr": [1.0, 0.9 / 4 + 0.1, 0.1],
        "exponential": [1.0, 0.1**0.5, 0.1**0.999],
        "constant": [0.1, 0.1, 0.1],
    }
    for schedule, values in schedules.items():
        thresholds = LossFunction("huber", huber_schedule=schedule).thresholds(progress, sigma)  # pyright: ignore
        assert thresholds is not None
        assert thresholds.tolist() == pytest.approx(values), schedule
