from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers.optimization import get_scheduler

from finetune.cache.encode import encode
from finetune.data.image_folder import ImageFolder
from finetune.data.loader import batches
from finetune.errors import UsageError
from finetune.models.families import FAMILIES, defaults
from finetune.models.loading import load_model
from finetune.models.lora import add_lora, trainable
from finetune.training import checkpoint
from finetune.training.objective import NoisePrediction
from finetune.training.optimizers import learning_rate, make_optimizer
from finetune.training.trainer import Trainer


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


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adafactor", "prodigy", "sgd"])
def test_each_optimizer_moves_the_weights_downhill(name: str) -> None:
    weight = torch.nn.Parameter(torch.full((4, 4), 2.0))
    optimizer = make_optimizer(name, [weight], learning_rate=1.0 if name == "prodigy" else 0.1)
    weight.square().sum().backward()
    optimizer.step()
    assert (weight < 2).all()


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
OPTIMIZERS = ["adamw", "adamw8bit", "adafactor", "prodigy", "sgd"]
LEARNS = [(name, "lora") for name in OPTIMIZERS] + [("adamw", "full")]


@pytest.mark.parametrize(
    ("name", "method"),
    LEARNS + [pytest.param(name, "full", marks=pytest.mark.slow) for name in OPTIMIZERS[1:]],
)
def test_each_optimizer_learns_with_its_default_rate(pictures: Path, name: str, method: str) -> None:
    family, steps = FAMILIES["tiny"], 14
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


@pytest.mark.parametrize("name", ["adamw8bit", "prodigy"])
def test_optimizers_of_other_packages_go_on_to_the_same_bits(name: str, tmp_path: Path) -> None:
    def fresh() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        weight = torch.nn.Parameter(
            torch.linspace(-1, 1, 64 * 128).view(64, 128)
        )  # bitsandbytes leaves small ones whole
        return weight, make_optimizer(name, [weight], learning_rate=0.5 if name == "prodigy" else 1e-2)

    def train(weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            weight.grad = torch.linspace(1, 2 + step, weight.numel()).view_as(weight)
            optimizer.step()

    straight, optimizer = fresh()
    train(straight, optimizer, range(6))
    weight, optimizer = fresh()
    train(weight, optimizer, range(3))
    state = {"weights": {"w": weight.detach()}, "optimizer": optimizer.state_dict(), "ema": {}, "scaler": {}}
    saved = checkpoint.load(checkpoint.save(tmp_path, state | {"step": 3, "updates": 3}))
    resumed, optimizer = fresh()
    resumed.data.copy_(saved["weights"]["w"])
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, optimizer, range(3, 6))
    assert torch.equal(straight, resumed)
    if name == "adamw8bit":
        tensors = [value for slots in optimizer.state.values() for value in slots.values() if torch.is_tensor(value)]
        assert torch.uint8 in {tensor.dtype for tensor in tensors}


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(UsageError, match="choose one of adamw"):
        make_optimizer("adamm", [], learning_rate=1.0)
