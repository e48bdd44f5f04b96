import math
from typing import Any

import pytest
import torch
from diffusers.optimization import get_scheduler
from transformers.optimization import get_inverse_sqrt_schedule, get_wsd_schedule

from finetune.errors import RunError, UsageError
from finetune.training.learning_rate import learning_rate


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)


def assert_equal(theirs: Any, schedule: str, warmup: int, **more: Any) -> None:
    for step in range(40):
        ours = learning_rate(step, peak=3e-4, schedule=schedule, warmup=warmup, total=40, **more)
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-15), step
        theirs.optimizer.step()
        theirs.step()


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "polynomial"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_learning_rate_equals_diffusers_schedulers(schedule: str, warmup: int) -> None:
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, optimizer(), num_warmup_steps=warmup, num_training_steps=40)
    assert_equal(theirs, schedule, warmup)


@pytest.mark.parametrize("warmup", [0, 7])
def test_restarts_and_powers_equal_diffusers(warmup: int) -> None:
    common: Any = {"num_warmup_steps": warmup, "num_training_steps": 40}
    restarts = get_scheduler("cosine_with_restarts", optimizer(), num_cycles=3, **common)
    assert_equal(restarts, "cosine_with_restarts", warmup, cycles=3)
    assert_equal(get_scheduler("polynomial", optimizer(), power=2.0, **common), "polynomial", warmup, power=2.0)


@pytest.mark.parametrize("warmup", [0, 7])
def test_inverse_sqrt_and_wsd_equal_transformers(warmup: int) -> None:
    assert_equal(get_inverse_sqrt_schedule(optimizer(), warmup), "inverse_sqrt", warmup)
    theirs = get_wsd_schedule(optimizer(), num_warmup_steps=warmup, num_decay_steps=10, num_training_steps=40)
    assert_equal(theirs, "wsd", warmup, decay_steps=10)
    theirs = get_wsd_schedule(optimizer(), num_warmup_steps=warmup, num_decay_steps=8, num_training_steps=40)
    assert_equal(theirs, "wsd", warmup)


def test_rex_is_its_formula_and_lr_end_is_the_last_rate() -> None:
    z = 10 / 40
    assert learning_rate(10, peak=1.0, schedule="rex", warmup=0, total=40) == (1 - z) / (0.5 + 0.5 * (1 - z))
    for schedule in ("linear", "cosine", "polynomial", "rex", "wsd"):
        rates = [learning_rate(step, peak=1.0, schedule=schedule, warmup=4, total=40, end=0.2) for step in (4, 40)]
        assert rates == pytest.approx([1.0, 0.2]), schedule
    restarts = [
        learning_rate(s, peak=1.0, schedule="cosine_with_restarts", warmup=0, total=40, end=0.2, cycles=2)
        for s in (10, 19, 20)
    ]
    assert restarts == pytest.approx([0.6, 0.2 + 0.4 * (1 + math.cos(math.pi * 0.95)), 1.0])


def halved(step: int, *, peak: float, warmup: int, total: int) -> float:
    return peak * 0.5**step if step < total - warmup else math.nan


def nothing(step: int, **_: Any) -> None:
    pass


def test_a_schedule_by_import_path() -> None:
    def rate(step: int, name: str = "halved") -> float:
        path = f"tests.training.test_learning_rate:{name}"
        return learning_rate(step, peak=1.0, schedule=path, warmup=1, total=6)

    assert rate(3) == 0.125
    with pytest.raises(
        RunError, match=r"test_learning_rate:halved returned nan for step 5: expected a number, 0 or more"
    ):
        rate(5)
    with pytest.raises(RunError, match="returned None for step 0"):
        rate(0, "nothing")
    with pytest.raises(UsageError, match="has no other"):
        rate(0, "other")
