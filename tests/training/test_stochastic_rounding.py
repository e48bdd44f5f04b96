import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune.batch import Batch
from finetune.models.encoders import PixelEncoder
from finetune.training import stochastic_rounding
from finetune.training.optimizers import make_optimizer
from finetune.training.stochastic_rounding import StochasticRounding, round_at_random_
from finetune.training.trainer import Trainer


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rounded_at_random(x: Tensor, generator: torch.Generator) -> Tensor:
    """What `round_at_random_` makes of it, which is in bf16."""
    found = x.clone()
    round_at_random_(found, generator)
    assert torch.equal(found, found.bfloat16().float())
    return found.bfloat16()


def test_a_number_between_two_of_bf16_becomes_either_as_often_as_it_is_near() -> None:
    x = torch.full((100_000,), 1 + 0.25 / 128)  # a quarter of the way from 1 to the next
    found = rounded_at_random(x, generator())
    assert set(found.tolist()) == {1.0, 1.0078125}
    share = (found > 1).float().mean().item()
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / len(x))
    assert torch.equal(found, rounded_at_random(x, generator()))
    assert not torch.equal(found, rounded_at_random(x, generator(1)))


def test_what_bf16_has_stays() -> None:
    x = torch.tensor([0.0, -0.0, 1.0, -2.5, 3.3895e38, 1e-40]).bfloat16()
    for seed in range(20):
        assert torch.equal(rounded_at_random(x.float(), generator(seed)), x)


def test_negative_numbers_are_rounded_without_bias() -> None:
    x = torch.linspace(-3, 3, 10_001)
    mean = torch.stack([rounded_at_random(x, generator(seed)).float() for seed in range(400)]).mean(0)
    spacing = 2.0 ** (x.abs().clamp(min=1e-9).log2().floor() - 7)
    assert ((mean - x) / spacing).abs().max() < 5 * 0.5 / math.sqrt(400)


class Linear:
    """Predicts y = w x; the loss is each example's squared error."""

    def sample(self, x0: Tensor, keys: Tensor) -> Tensor:
        return x0

    def loss(self, network: Any, drawn: Tensor, cond: Any, unet_channels: Tensor | None) -> Tensor:
        return (network(drawn.flatten(1).to(network.weight.dtype)).float() - 1).square().mean(dim=1)


def network(width: int = 12) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Linear(width, width)


def batch(size: int = 4) -> Batch:
    latent_params = (torch.arange(size * 12).reshape(size, 3, 2, 2) * 5 % 256).to(torch.uint8)
    time_ids = torch.zeros(size, 6)
    return Batch(
        latent_params=latent_params,
        cond={},
        keys=torch.arange(size),
        time_ids=time_ids,
        ids=tuple("abcdefgh"[:size]),
        weight=torch.ones(size),
    )


def trainer(name: str = "adamw", *, masters: bool = False, rate: float = 1e-2, **more: Any) -> Trainer:
    net = network()
    optimizer = make_optimizer(name, net.parameters(), learning_rate=rate)
    return Trainer(net, PixelEncoder(), Linear(), optimizer, precision=torch.bfloat16, masters=masters, **more)


@pytest.mark.parametrize(("name", "rate"), [("adamw", 0.01), ("adafactor", 0.1), ("sgd", 0.3), ("adamw8bit", 0.01)])
def test_it_learns_what_fp32_masters_learn_to_the_width_of_bf16(name: str, rate: float) -> None:
    rounded, kept = trainer(name, rate=rate), trainer(name, rate=rate, masters=True)
    ours, theirs = ([trainer.step(batch()).loss for _ in range(60)] for trainer in (rounded, kept))
    assert theirs[-1] < 0.5 < theirs[0]
    assert ours[-1] == pytest.approx(theirs[-1], abs=0.05)
    for parameter in rounded.parameters.values():
        assert parameter.dtype == torch.bfloat16
        assert parameter.grad is None
    assert all(held.numel() == 0 and held.grad is None for held in rounded.masters.held.values())


def test_updates_too_small_for_bf16_arrive() -> None:
    """1e-4 beside 1 is a hundredth of what bf16 can tell apart; rounded to nearest, no weight would ever move."""
    net = network()
    with torch.no_grad():
        net.weight.fill_(1.0)
        net.bias.fill_(1.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    masters = StochasticRounding(net)
    for step in range(100):
        for parameter in masters.parameters.values():
            parameter.grad = torch.full_like(parameter, 1e-4)
        masters.update(optimizer.step, step)
    assert net.weight.float().mean().item() == pytest.approx(0.99, abs=0.002)


def test_pieces_change_nothing_but_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trainer("adamw")
    monkeypatch.setattr(stochastic_rounding, "PIECE", 12)
    pieces = trainer("adamw")
    assert [len(t.masters.pieces) for t in (whole, pieces)] == [1, 2]
    a, b = whole.step(batch()), pieces.step(batch())
    assert a.loss == b.loss
    assert a.grad_norm == b.grad_norm
    for name, slots in enumerate(whole.optimizer.state.values()):
        other = list(pieces.optimizer.state.values())[name]
        assert all(torch.equal(value, other[slot]) for slot, value in slots.items())


def test_adafactor_keeps_a_row_and_a_column_of_a_convolution() -> None:
    with torch.random.fork_rng(devices=[]):
        net = nn.Conv2d(6, 5, 3)
    optimizer = make_optimizer("adafactor", net.parameters(), learning_rate=0.1)
    masters = StochasticRounding(net)
    before = net.weight.float().clone()
    for parameter in masters.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    masters.update(optimizer.step, 0)
    kept = {slot: tuple(value.shape) for slot, value in optimizer.state[masters.held["weight"]].items()}
    assert (kept["row_var"], kept["col_var"]) == ((5, 1), (1, 54))
    assert net.weight.shape == (5, 6, 3, 3)
    assert (net.weight.float() < before).all()


def test_a_bad_step_changes_no_weight() -> None:
    ours = trainer(max_bad_steps=2)
    ours.step(batch())
    before = {name: p.detach().clone() for name, p in ours.parameters.items()}
    bad = batch()
    bad.weight[0] = float("nan")
    ours.step(bad)
    assert all(torch.equal(p, before[name]) for name, p in ours.parameters.items())
    assert all(p.grad is None for p in ours.parameters.values())
    ours.step(batch())
    assert any(not torch.equal(p, before[name]) for name, p in ours.parameters.items())


def test_micro_batches_are_added_up() -> None:
    whole, split = trainer(), trainer(micro_batch_size=2)
    a, b = whole.step(batch()), split.step(batch())
    assert b.loss == pytest.approx(a.loss, rel=1e-6)
    assert b.grad_norm == pytest.approx(a.grad_norm, rel=2**-6)  # each sum is rounded to bf16


@pytest.mark.parametrize("name", ["adamw", "adafactor", "adamw8bit"])
def test_it_goes_on_from_its_state_with_the_same_bits(name: str) -> None:
    straight, first, second = trainer(name), trainer(name), trainer(name)
    for _ in range(3):
        straight.step(batch())
        first.step(batch())
    second.load_state_dict(first.state_dict())
    a, b = [[t.step(batch()).loss for _ in range(3)] for t in (straight, second)]
    assert a == b
    assert all(torch.equal(p, second.parameters[name]) for name, p in straight.parameters.items())
