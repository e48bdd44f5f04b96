import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.batch import Batch
from finetune.cache.encode import encode
from finetune.cache.encoded_dataset import EncodedDataset
from finetune.data.image_folder import ImageFolder
from finetune.data.loader import batches
from finetune.errors import RunError
from finetune.models.loading import DiffusionModel, load_model
from finetune.models.lora import add_lora, trainable
from finetune.training import checkpoint
from finetune.training.ema import Ema
from finetune.training.metrics import NotFinite
from finetune.training.noise_prediction import NoisePrediction
from finetune.training.optimizers import make_optimizer, parameter_groups
from finetune.training.trainer import Trainer
from tests.small_trainer import small_batch, small_trainer

MakeTrainer = Callable[..., tuple[DiffusionModel, Trainer]]


@pytest.fixture(scope="module")
def encoded(
    pictures: Path, make_pictures: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> EncodedDataset:
    folder = make_pictures(tmp_path_factory.mktemp("eight"), count=8)
    return encode(ImageFolder(folder, prompt="a disc", resolution=64), load_model("tiny"))


def make(
    method: str = "full",
    lr: float = 1e-2,
    dropout: float = 0.0,
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
    **options: object,
) -> tuple[DiffusionModel, Trainer]:
    model = load_model("tiny")
    if method == "lora":
        add_lora(model.unet, rank=4, dropout=dropout)
        for parameter in trainable(model.unet):  # B starts at zero, where A has no gradient
            parameter.data += 0.01
    else:
        model.unet.requires_grad_(True)
    fused: dict[str, Any] = {} if optimizer is torch.optim.Adafactor else {"fused": True}
    made = optimizer(trainable(model.unet), lr=lr, **fused)  # pyright: ignore[reportCallIssue]
    objective = NoisePrediction(model.scheduler, snr_gamma=5.0)
    return model, Trainer(model.unet, model.encoder, objective, made, **options)


def steps(encoded: EncodedDataset, count: int, batch_size: int = 8) -> Iterator[Batch]:
    return batches(encoded, batch_size=batch_size, steps=count)


def gradient(trainer: Trainer) -> Tensor:
    return torch.cat([p.grad.flatten() for p in trainer.parameters.values() if p.grad is not None])


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.parameters.values()])


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("micro", [2, 3])
def test_micro_batches_give_the_gradient_of_the_whole_batch(encoded: EncodedDataset, method: str, micro: int) -> None:
    batch = next(steps(encoded, 1))
    batch = replace(batch, weight=torch.tensor([1.0, 2, 0.5, 1, 1, 3, 1, 1]))
    _, whole = make(method)
    _, cut = make(method, micro_batch_size=micro)
    whole.backward(whole.prepare(batch))
    cut.backward(cut.prepare(batch))
    assert (gradient(whole) - gradient(cut)).norm() <= 1e-5 * gradient(whole).norm()


def test_five_sgd_steps_change_the_weights_alike_however_the_batch_is_cut(encoded: EncodedDataset) -> None:
    """Five examples a step over eight: the second step of each epoch is a short one, of three."""
    changes = []
    for micro in (None, 2):
        _, trainer = make(micro_batch_size=micro)
        before = weights(trainer)
        for batch in steps(encoded, 5, batch_size=5):
            trainer.step(batch)
        changes.append(weights(trainer) - before)
    assert changes[0].norm() > 1e-3
    assert (changes[0] - changes[1]).norm() <= 1e-4 * changes[0].norm()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_only_what_should_learn_changes(encoded: EncodedDataset, method: str) -> None:
    model, trainer = make(method)
    parts = {
        "unet": model.unet.state_dict(),
        "vae": model.encoder.vae.state_dict(),
        "text_encoder": model.conditioner.text_encoder.state_dict(),
    }
    before = {(part, name): t.clone() for part, state in parts.items() for name, t in state.items()}
    for batch in steps(encoded, 3, batch_size=4):
        trainer.step(batch)
    changed = {key for key, old in before.items() if not torch.equal(old, parts[key[0]][key[1]])}
    assert changed == {("unet", name) for name in trainer.parameters}
    assert all(("lora_" in name) == (method == "lora") for _, name in changed)


def test_a_step_reports_weighted_loss_norm_before_clipping_and_rate(encoded: EncodedDataset) -> None:
    batch = next(steps(encoded, 1))
    _, trainer = make(max_grad_norm=1e-3, learning_rate=lambda step: 0.5 / (step + 1))
    before = weights(trainer)
    losses = trainer.backward(trainer.prepare(batch))
    norm = gradient(trainer).double().norm().item()
    trainer.optimizer.zero_grad()
    metrics = trainer.step(batch)
    assert metrics.loss == pytest.approx(losses.mean().item(), rel=1e-6)
    assert metrics.grad_norm == pytest.approx(norm, rel=1e-4)
    assert (metrics.step, metrics.lr, metrics.examples) == (1, 0.5, 8)
    assert (weights(trainer) - before).norm().item() == pytest.approx(0.5 * 1e-3, rel=1e-3)  # SGD: rate x clipped norm
    assert trainer.step(batch).lr == 0.25


@pytest.mark.parametrize(
    ("optimizer", "micro", "precision"),
    [
        (torch.optim.AdamW, None, None),
        (torch.optim.AdamW, 2, None),
        (torch.optim.AdamW, None, torch.bfloat16),
        (torch.optim.SGD, None, None),
        (torch.optim.Adafactor, None, None),
    ],
)
def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_example(
    encoded: EncodedDataset, micro: int | None, precision: torch.dtype | None, optimizer: type[torch.optim.Optimizer]
) -> None:
    examples = 2 if precision else 4  # without AVX512, bf16 takes seconds a step
    batch, whole = (next(steps(encoded, 1, batch_size=examples)) for _ in range(2))
    batch.latent_params[1] = float("nan")
    model, trainer = make(micro_batch_size=micro, optimizer=optimizer, precision=precision)
    trainer.step(whole)
    before, working = weights(trainer), {name: t.clone() for name, t in model.unet.state_dict().items()}
    message = rf"step 2: the loss is not finite for {batch.ids[1]};"
    if optimizer is torch.optim.Adafactor:  # it cannot be told on the device, so the step itself waits
        with pytest.raises(RunError, match=message):
            trainer.step(batch)
    else:
        metrics = trainer.step(batch)
        with pytest.raises(RunError, match=message):
            trainer.step(whole)  # which changes nothing either
        with pytest.raises(RunError, match=message):
            print(metrics.loss)
    assert torch.equal(before, weights(trainer))
    assert all(torch.equal(working[name], tensor) for name, tensor in model.unet.state_dict().items())
    assert all(p.grad is None for p in trainer.parameters.values())
    trainer.step(whole)  # who catches the error may go on
    assert not torch.equal(before, weights(trainer))


def overflowing(overflows: int, **options: object) -> Trainer:
    """A trainer in fp16 (on the CPU) whose gradient is infinite in its first steps."""
    trainer, batch = small_trainer("full", "sgd", precision=torch.float16, **options), small_batch()
    calls = iter(range(1000))
    parameter = next(iter(trainer.masters.working.values()))
    parameter.register_hook(lambda grad: grad * float("inf") if next(calls) < overflows else grad)
    before = weights(trainer)
    for _ in range(overflows):
        assert trainer.step(batch).grad_norm is None
        assert torch.equal(before, weights(trainer))
    assert trainer.step(batch).grad_norm is not None
    assert not torch.equal(before, weights(trainer))
    return trainer


def test_an_fp16_overflow_skips_the_step_and_lowers_the_scale() -> None:
    assert overflowing(2).scaler.get_scale() == 2**16 / 4


def test_schedule_and_average_wait_while_fp16_skips_steps() -> None:
    trainer = overflowing(2, learning_rate=lambda update: (1e-4, 2e-4)[update])
    assert (trainer.steps_done, trainer.updates) == (3, 1)
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-4  # the rate of the first update, at the third step
    for name, parameter in trainer.parameters.items():  # the first update replaces the average, a third would not
        assert torch.equal(trainer.ema.shadow[name], parameter)


def test_fp16_that_only_overflows_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.training.trainer.MAX_OVERFLOWS", 3)
    overflowing(3)
    with pytest.raises(RunError, match=r"the gradient's norm is (inf|nan)"):
        overflowing(4)


def test_dropout_is_drawn_anew_at_each_step_and_is_the_same_in_each_run(encoded: EncodedDataset) -> None:
    batch = next(steps(encoded, 1, batch_size=4))
    losses = []
    for _ in range(2):
        _, trainer = make("lora", lr=0.0, dropout=0.5)
        losses.append([trainer.step(batch).loss for _ in range(2)])
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_training_lowers_the_loss_on_a_fixed_batch(encoded: EncodedDataset, precision: torch.dtype | None) -> None:
    batch = next(steps(encoded, 1, batch_size=2 if precision else 8))  # without AVX512, bf16 takes seconds a step
    model, _ = make("lora")
    optimizer = torch.optim.AdamW(trainable(model.unet), lr=1e-2)
    objective = NoisePrediction(model.scheduler)
    trainer = Trainer(model.unet, model.encoder, objective, optimizer, precision=precision)
    losses = [trainer.step(batch).loss for _ in range(5)]
    assert losses[-1] < 0.9 * losses[0]


def test_a_loaded_state_goes_on_bit_for_bit(encoded: EncodedDataset) -> None:
    def fresh() -> Trainer:
        model = load_model("tiny")
        add_lora(model.unet, rank=4, dropout=0.1)
        optimizer = torch.optim.AdamW(trainable(model.unet), lr=1e-3)
        learned = {n: p for n, p in model.unet.named_parameters() if p.requires_grad}
        objective = NoisePrediction(model.scheduler)
        return Trainer(model.unet, model.encoder, objective, optimizer, ema=Ema(learned))

    straight, first, second = fresh(), fresh(), fresh()
    whole = list(steps(encoded, 6, batch_size=4))
    expected = [straight.step(batch).as_dict() for batch in whole]
    got = [first.step(batch).as_dict() for batch in whole[:3]]
    second.load_state_dict(first.state_dict())
    got += [second.step(batch).as_dict() for batch in batches(encoded, batch_size=4, steps=6, start=3)]
    assert got == expected
    assert torch.equal(weights(straight), weights(second))
    assert straight.ema is not None
    assert second.ema is not None
    assert all(torch.equal(t, second.ema.shadow[n]) for n, t in straight.ema.shadow.items())


def test_a_state_of_other_parameters_is_refused() -> None:
    _, full = make("full")
    _, lora = make("lora")
    with pytest.raises(RunError, match="other parameters"):
        lora.load_state_dict(full.state_dict())


def lora_trainer(optimizer: str = "adamw", *, ema: bool = False, b_factor: float = 1.0, **options: Any) -> Trainer:
    model = load_model("tiny")
    add_lora(model.unet, rank=2, target_modules=["attn2.to_q"])
    learned = {name: p for name, p in model.unet.named_parameters() if p.requires_grad}
    made = make_optimizer(optimizer, parameter_groups(learned, {}, b_factor), learning_rate=1e-3, **options)
    return Trainer(model.unet, model.encoder, NoisePrediction(model.scheduler), made, ema=Ema(learned) if ema else None)


def moments(trainer: Trainer) -> dict[str, Tensor]:
    return {name: trainer.optimizer.state[p]["exp_avg"] for name, p in trainer.parameters.items()}


def test_hyperparameters_of_a_resumed_run_are_its_own_and_moments_the_checkpoints(
    encoded: EncodedDataset, tmp_path: Path
) -> None:
    """LoRA+ cuts the parameters into other groups, so that the optimizer counts them in another order."""
    first = lora_trainer(weight_decay=0.01)
    for batch in steps(encoded, 2):
        first.step(batch)
    saved = checkpoint.load(checkpoint.save(tmp_path, first.state_dict()))
    second = lora_trainer(weight_decay=5.0, b_factor=16.0)
    second.load_state_dict(saved)
    assert [group["weight_decay"] for group in second.optimizer.param_groups] == [5.0, 5.0]
    assert [group["factor"] for group in second.optimizer.param_groups] == [1.0, 16.0]
    before, after = moments(first), moments(second)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    second.step(next(steps(encoded, 1)))


def test_an_ema_that_the_checkpoint_lacks_starts_from_its_weights(encoded: EncodedDataset) -> None:
    first, second = lora_trainer(), lora_trainer(ema=True)
    first.step(next(steps(encoded, 1)))
    second.load_state_dict(first.state_dict())
    assert second.ema is not None
    assert all(torch.equal(second.ema.shadow[name], weight) for name, weight in first.parameters.items())


def test_the_state_of_another_optimizer_is_refused(encoded: EncodedDataset) -> None:
    first = lora_trainer("sgd")
    first.step(next(steps(encoded, 1)))
    with pytest.raises(RunError, match=r"optimizer is SGD, whose state AdamW cannot take over: .*--init_lora"):
        lora_trainer("adamw").load_state_dict(first.state_dict())


def test_prodigys_estimate_is_state_and_its_weight_decay_is_not(encoded: EncodedDataset) -> None:
    first, second = lora_trainer("prodigy"), lora_trainer("prodigy", weight_decay=0.5)
    for batch in steps(encoded, 2):
        first.step(batch)
    second.load_state_dict(first.state_dict())
    (before,), (after,) = first.optimizer.param_groups, second.optimizer.param_groups
    assert [after[name] for name in ("d", "k", "d_numerator")] == [before[name] for name in ("d", "k", "d_numerator")]
    assert (before["weight_decay"], after["weight_decay"]) == (0.01, 0.5)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_nothing_of_a_loaded_checkpoint_stays_mapped(optimizer: str, encoded: EncodedDataset, tmp_path: Path) -> None:
    first, second = lora_trainer(optimizer), lora_trainer(optimizer, ema=True)
    first.step(next(steps(encoded, 1)))
    folder = checkpoint.save(tmp_path, first.state_dict())
    second.load_state_dict(checkpoint.load(folder))
    gc.collect()
    assert str(folder) not in Path("/proc/self/maps").read_text()


def test_a_block_that_learns_at_rate_zero_stays_as_it_is(encoded: EncodedDataset) -> None:
    model = load_model("tiny")
    add_lora(model.unet, rank=2, target_modules=["attn2.to_q"])
    learned = {name: p for name, p in model.unet.named_parameters() if p.requires_grad}
    optimizer = make_optimizer("adamw", parameter_groups(learned, {"down_blocks": 0.0}), learning_rate=1e-3)
    trainer = Trainer(
        model.unet, model.encoder, NoisePrediction(model.scheduler), optimizer, learning_rate=lambda step: 0.5
    )
    before = {name: weight.detach().clone() for name, weight in trainer.parameters.items()}
    assert trainer.step(next(steps(encoded, 1))).lr == 0.5
    changed = {
        name.split(".")[0] for name, weight in trainer.parameters.items() if not torch.equal(weight, before[name])
    }
    assert changed == {"mid_block", "up_blocks"}


def test_a_base_model_that_is_not_finite_is_named(encoded: EncodedDataset) -> None:
    trainer = lora_trainer()
    name, weight = next((n, p) for n, p in trainer.unet.named_parameters() if not p.requires_grad)
    weight.data.view(-1)[0] = float("nan")
    with pytest.raises(NotFinite, match=rf"The base model's own weights are not finite: {name}"):
        trainer.step(next(steps(encoded, 1))).as_dict()
