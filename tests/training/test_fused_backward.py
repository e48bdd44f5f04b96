from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune.batch import Batch
from finetune.errors import RunError
from finetune.models.encoders import PixelEncoder
from finetune.training import stochastic_rounding
from finetune.training.metrics import NotFinite
from finetune.training.optimizers import make_optimizer
from finetune.training.trainer import Trainer


class ThreeLayers(nn.Module):
    """And one that has no part in what they compute. `poisoned`, the first one's gradient is not finite."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.first, self.second, self.last = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
            self.unused = nn.Linear(2, 1)
        self.poisoned = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).sigmoid()
        if self.poisoned:  # 0 beside a slope that is infinite
            hidden = hidden + 0 * (hidden - hidden).sqrt()
        return self.last(self.second(hidden).sigmoid())


class ToOne:
    """The loss is each example's squared distance from 1, times `scale`."""

    scale = 1.0

    def sample(self, x0: Tensor, keys: Tensor) -> Tensor:
        return x0

    def loss(self, network: Any, drawn: Tensor, cond: Any, unet_channels: Tensor | None) -> Tensor:
        return (network(drawn.flatten(1).bfloat16()).float() - 1).square().mean(dim=1) * self.scale


def batch(size: int = 4) -> Batch:
    latent_params = (torch.arange(size * 12).reshape(size, 3, 2, 2) * 5 % 256).to(torch.uint8)
    return Batch(
        latent_params=latent_params,
        cond={},
        keys=torch.arange(size),
        time_ids=torch.zeros(size, 6),
        ids=tuple("abcdefgh"[:size]),
        weight=torch.ones(size),
    )


def trainer(name: str, *, in_backward: bool, **more: Any) -> Trainer:
    net = ThreeLayers()
    optimizer = make_optimizer(name, net.parameters(), learning_rate=1e-2)
    options = {"precision": torch.bfloat16, "masters": False, "max_grad_norm": 0.0} | more
    return Trainer(net, PixelEncoder(), ToOne(), optimizer, in_backward=in_backward, **options)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's matrix and its bias are a piece."""
    monkeypatch.setattr(stochastic_rounding, "PIECE", 12 * 12 + 12)


@pytest.mark.parametrize("piece", [1, 12 * 12 + 12, 12 * 12 + 12 + 3, 10_000])
@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd", "adamw8bit"])
def test_it_learns_the_same_bits_as_updates_after_the_backward_pass(
    name: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stochastic_rounding, "PIECE", piece)
    ours, plain = trainer(name, in_backward=True), trainer(name, in_backward=False)
    for _ in range(5):
        a, b = ours.step(batch()), plain.step(batch())
        assert a.loss == b.loss
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=2**-7)  # theirs is added up in bf16
    assert ours.updates == plain.updates == 5
    assert all(torch.equal(p, plain.parameters[name]) for name, p in ours.parameters.items())
    assert not torch.equal(ours.parameters["first.weight"], ThreeLayers().first.weight.bfloat16())


def gradients_there(trainer: Trainer) -> list[list[str]]:
    """At each call of the optimizer, the weights whose gradients are kept beside those that it updates."""
    there: list[list[str]] = []

    def look(*_: Any) -> None:
        there.append([name for name, p in trainer.parameters.items() if p.grad is not None])

    trainer.optimizer.register_step_pre_hook(look)
    return there


def test_the_gradient_of_one_piece_is_there_at_a_time() -> None:
    ours, plain = trainer("adafactor", in_backward=True), trainer("adafactor", in_backward=False)
    kept, beside = gradients_there(ours), gradients_there(plain)
    ours.step(batch())
    plain.step(batch())
    assert kept == [[], [], []]
    assert max(map(len, beside)) == 4  # of six, when the first two are being updated
    assert all(p.grad is None for p in ours.parameters.values())


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.parameters.items()}


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_changes_no_weight(scale: float) -> None:
    ours = trainer("adamw", in_backward=True)
    ours.step(batch())
    before, made = weights(ours), [int(slots["step"]) for slots in ours.optimizer.state.values()]
    ours.objective.scale = scale  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(NotFinite, match=r"step 2: the loss is not finite for .*; no weight was changed"):
        ours.step(batch())
    assert all(torch.equal(p, before[name]) for name, p in ours.parameters.items())
    assert made == [int(slots["step"]) for slots in ours.optimizer.state.values()] == [1] * 6
    assert all(p.grad is None for p in ours.parameters.values())


def test_a_gradient_that_is_not_finite_stops_there_and_says_so() -> None:
    ours = trainer("adamw", in_backward=True)
    ours.step(batch())
    before = weights(ours)
    ours.unet.poisoned = True
    with pytest.raises(NotFinite, match=r"step 2: the gradient's norm is nan .*; later layers were changed already"):
        ours.step(batch())
    same = {name for name, p in ours.parameters.items() if torch.equal(p, before[name])}
    assert same == {"first.weight", "first.bias", "unused.weight", "unused.bias"}


def test_what_cannot_be_done_on_the_way_is_refused() -> None:
    for more in ({"max_grad_norm": 1.0}, {"masters": True}, {"max_bad_steps": 2}):
        with pytest.raises(ValueError, match="in_backward: masters=False, max_grad_norm=0"):
            trainer("adamw", in_backward=True, **more)
    parts = trainer("adamw", in_backward=True, micro_batch_size=2)
    with pytest.raises(RunError, match="step 1 is of 2 micro-batches"):
        parts.step(batch())


def test_memory_that_does_not_suffice_ends_the_step() -> None:
    """Begun anew in smaller parts, it would find some weights updated already."""
    ours = trainer("adamw", in_backward=True)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("not enough")

    ours.optimizer.register_step_pre_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        ours.step(batch())
    assert ours.steps_done == 0
