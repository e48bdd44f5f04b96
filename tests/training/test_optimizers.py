from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.cache.encode import encode
from finetune.data.image_folder import ImageFolder
from finetune.data.loader import batches
from finetune.errors import UsageError
from finetune.models.families import FAMILIES, defaults
from finetune.models.loading import load_model
from finetune.models.lora import add_lora, trainable
from finetune.optimizer_table import OPTIMIZERS
from finetune.training import checkpoint
from finetune.training.learning_rate import learning_rate
from finetune.training.noise_prediction import NoisePrediction
from finetune.training.optimizer_state import load_optimizer, optimizer_state, switch_mode
from finetune.training.optimizers import make_optimizer, parse_arguments
from finetune.training.trainer import Trainer
from tests.small_trainer import small_batch, small_trainer


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_each_optimizer_moves_the_weights_downhill(name: str) -> None:
    weight = torch.nn.Parameter(torch.full((4, 4), 2.0))
    optimizer = make_optimizer(name, [weight], learning_rate=1.0 if name.startswith("prodigy") else 0.1)
    switch_mode(optimizer, "train")
    for _ in range(2):  # SOAP's first step only prepares
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
    assert weight.mean() < 2


def test_adafactor_takes_the_same_steps_one_by_one_and_all_at_once() -> None:
    def stepped(foreach: bool) -> torch.Tensor:
        weights = [torch.nn.Parameter(torch.linspace(-1, 2, size).view(*shape)) for size, shape in SHAPES.items()]
        optimizer = make_optimizer("adafactor", weights, learning_rate=0.1, foreach=foreach)
        for step in range(5):
            for weight in weights:
                weight.grad = torch.linspace(1, step - 3, weight.numel()).view_as(weight)
            optimizer.step()
        return torch.cat([weight.detach().flatten() for weight in weights])

    torch.testing.assert_close(stepped(True), stepped(False), rtol=1e-5, atol=1e-6)


SHAPES = {12: (12,), 24: (4, 6), 108: (3, 4, 3, 3)}
LEARNS = [(name, "lora") for name in OPTIMIZERS] + [("adamw", "full")]


@pytest.mark.parametrize(
    ("name", "method"),
    LEARNS + [pytest.param(name, "full", marks=pytest.mark.slow) for name in list(OPTIMIZERS)[1:]],
)
def test_each_optimizer_learns_with_its_default_rate(pictures: Path, name: str, method: str) -> None:
    family, steps = FAMILIES["tiny"], 40 if name == "prodigy_schedulefree" else 14
    suited = defaults(family, method, name, pictures=6, resolution=64, varied_captions=True)
    model = load_model("tiny")
    if method == "lora":
        add_lora(model.unet, rank=4, target_modules=suited["lora_target_modules"])
    (batch,) = batches(encode(ImageFolder(pictures, resolution=64), model), batch_size=2, steps=1)
    rate = partial(learning_rate, peak=suited["learning_rate"], schedule=suited["lr_scheduler"], warmup=1, total=steps)
    optimizer = make_optimizer(name, trainable(model.unet), learning_rate=suited["learning_rate"])
    trainer = Trainer(model.unet, model.encoder, NoisePrediction(model.scheduler), optimizer, learning_rate=rate)
    losses = [trainer.step(batch).loss for _ in range(steps)]
    assert losses[-1] < 0.9 * losses[0]
    with torch.no_grad(), trainer.ema_weights():
        averaged = trainer.objective.loss(model.unet, trainer.prepare(batch).parts[0].drawn, batch.cond).mean().item()
    assert averaged < 0.97 * losses[0]


def shaped(seed: int = 0) -> dict[str, torch.nn.Parameter]:
    """Weights of each number of dimensions; bitsandbytes leaves small ones whole."""
    shapes = {"matrix": (64, 128), "vector": (24,), "convolution": (8, 4, 3, 3)}
    source = torch.Generator().manual_seed(seed)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=source)) for name, shape in shapes.items()}


def train(weights: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    switch_mode(optimizer, "train")
    for step in steps:
        for number, weight in enumerate(weights.values()):
            weight.grad = torch.cos(torch.arange(weight.numel()) + 3.0 * step + number).view_as(weight)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(step)
            optimizer.step()


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_optimizers_go_on_from_a_checkpoint_to_the_same_bits(name: str, tmp_path: Path) -> None:
    rate = 0.5 if name.startswith("prodigy") else 1e-2
    straight = shaped()
    train(straight, make_optimizer(name, straight.values(), learning_rate=rate), range(6))
    weights = shaped()
    optimizer = make_optimizer(name, weights.values(), learning_rate=rate)
    train(weights, optimizer, range(3))
    state = {"weights": weights, "optimizer": optimizer_state(optimizer, weights), "ema": {}, "scaler": {}}
    saved = checkpoint.load(checkpoint.save(tmp_path, state | {"step": 3, "updates": 3}))
    resumed = shaped(seed=1)
    optimizer = make_optimizer(name, resumed.values(), learning_rate=rate)
    for key, weight in resumed.items():
        weight.data.copy_(saved["weights"][key])
    load_optimizer(optimizer, saved["optimizer"], resumed, resumed)
    train(resumed, optimizer, range(3, 6))
    assert all(torch.equal(weight, resumed[key]) for key, weight in straight.items())
    if name == "adamw8bit":
        tensors = [value for slots in optimizer.state.values() for value in slots.values() if torch.is_tensor(value)]
        assert torch.uint8 in {tensor.dtype for tensor in tensors}


def test_hyperparameters_of_a_resumed_optimizer_are_the_new_ones() -> None:
    weights = shaped()
    optimizer = make_optimizer("schedulefree_adamw", weights.values(), learning_rate=1e-2)
    train(weights, optimizer, range(3))
    saved = checkpoint.through_files(optimizer_state(optimizer, weights))
    changed = make_optimizer(
        "schedulefree_adamw", weights.values(), learning_rate=1e-2, arguments={"weight_decay": 0.5}
    )
    load_optimizer(changed, saved, weights, weights)
    (group,), (before,) = changed.param_groups, optimizer.param_groups
    assert group["weight_decay"] == 0.5
    assert {name: group[name] for name in ("step", "weight_sum", "lr_max")} == {
        name: before[name] for name in ("step", "weight_sum", "lr_max")
    }
    assert group["step"] == 3


def test_a_schedule_free_optimizer_is_evaluated_at_its_average_and_goes_on_unchanged() -> None:
    losses: dict[bool, list[float]] = {}
    for evaluated in (False, True):
        trainer = small_trainer("lora", "schedulefree_adamw")
        trainer.ema, learned = None, trainer.parameters.values()
        losses[evaluated] = []
        for step in range(4):
            losses[evaluated].append(trainer.step(small_batch()).loss)
            if evaluated:
                trained = [p.clone() for p in learned]
                for evaluation in (trainer.ema_weights, trainer.export_weights):
                    with evaluation():
                        moved = any(not torch.equal(p, q) for p, q in zip(learned, trained, strict=True))
                    assert moved == (step > 0)  # of one step, the average is that step
                    assert all(torch.equal(p, q) for p, q in zip(learned, trained, strict=True))
    assert losses[True] == losses[False]
    assert losses[True][3] < losses[True][0]


class Plain(torch.optim.Optimizer):
    """Gradient descent, and what subclasses spoil of it."""

    def __init__(self, params: Any, lr: float = 0.1, momentum: float = 0.0, **more: Any) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, **more})

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["steps"] = self.state[p].get("steps", 0) + 1
                p.data -= group["lr"] / self.state[p]["steps"] * p.grad


class KeepsAnObject(Plain):
    def step(self, closure: Any = None) -> None:
        super().step()
        for p in self.state:
            self.state[p]["what"] = object()


class Forgets(Plain):
    count = 0

    def step(self, closure: Any = None) -> None:
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.data -= group["lr"] * self.count * p.grad


HERE = "tests.training.test_optimizers"


def test_an_optimizer_by_import_path_with_arguments() -> None:
    optimizer = make_optimizer(f"{HERE}:Plain", shaped().values(), learning_rate=0.3, arguments={"momentum": 0.7})
    assert type(optimizer).__name__ == "Plain"
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.3, 0.7)
    rms = make_optimizer("torch.optim:RMSprop", shaped().values(), learning_rate=0.3, arguments={"centered": True})
    assert rms.param_groups[0]["centered"] is True


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (f"{HERE}:shaped", {}, "is not a class of torch optimizers"),
        (f"{HERE}:Missing", {}, "has no Missing"),
        ("no_such_package:Adam", {}, "No module named 'no_such_package'"),
        ("torch.optim:LBFGS", {}, "LBFGS.*"),
        ("torch.optim:SparseAdam", {}, "SparseAdam does not support dense gradients"),
        (f"{HERE}:KeepsAnObject", {}, "object is not JSON serializable"),
        (f"{HERE}:Forgets", {}, "goes on from its saved state ends with other weights"),
        ("adamw", {"betta": 1}, "optimizer_args betta: AdamW has no such argument"),
        ("adopt", {"betta": 1}, "optimizer_args betta: ADOPT has no such argument"),
        (f"{HERE}:Plain", {"betta": 1}, "optimizer_args betta: Plain has no such argument"),
        ("adamw", {"lr": 1}, "optimizer_args lr: give --learning_rate"),
        ("adamw", {"betas": 3}, "optimizer = 'adamw' cannot be used: "),
        ("lion", {"betas": (3.0, 0.9)}, "optimizer = 'lion' cannot be used: "),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_optimizer(name, shaped().values(), learning_rate=0.1, arguments=arguments)


def test_arguments_are_read_as_python() -> None:
    given = ["betas=0.9,0.99", "weight_decay=1e-2", "centered=True", "mode=fast", "layers=[1, 2]"]
    assert parse_arguments(given) == {
        "betas": (0.9, 0.99),
        "weight_decay": 0.01,
        "centered": True,
        "mode": "fast",
        "layers": [1, 2],
    }
    with pytest.raises(UsageError, match="optimizer_args betas: expected NAME=VALUE"):
        parse_arguments(["betas"])


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(UsageError, match="choose one of adamw"):
        make_optimizer("adamm", [], learning_rate=1.0)
