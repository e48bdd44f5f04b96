import pytest
import torch
from diffusers.optimization import get_scheduler

from finetune.errors import UsageError
from finetune.training.optim import learning_rate, make_optimizer


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "polynomial"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_learning_rate_equals_diffusers_schedulers(schedule: str, warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=40)
    for step in range(40):
        ours = learning_rate(step, peak=3e-4, schedule=schedule, warmup=warmup, total=40)
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-15), step
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("name", ["adamw", "adafactor", "prodigy", "sgd"])
def test_each_optimizer_moves_the_weights_downhill(name: str) -> None:
    weight = torch.nn.Parameter(torch.full((4, 4), 2.0))
    optimizer = make_optimizer(name, [weight], learning_rate=1.0 if name == "prodigy" else 0.1)
    weight.square().sum().backward()
    optimizer.step()
    assert (weight < 2).all()


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(UsageError, match="allowed is adamw"):
        make_optimizer("adamm", [], learning_rate=1.0)
