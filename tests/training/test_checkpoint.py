from pathlib import Path

import pytest
import torch

from finetune.errors import RunError
from finetune.training import checkpoint
from finetune.training.optim import make_optimizer


def state(step: int, optimizer: str = "adamw") -> dict:
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    made = make_optimizer(optimizer, [weight], learning_rate=0.1)
    weight.square().sum().backward()
    made.step()
    return {
        "weights": {"a.weight": weight.detach().clone()},
        "optimizer": made.state_dict(),
        "ema": {"a.weight": torch.ones(2, 3)},
        "scaler": {},
        "step": step,
        "updates": step - 1,
    }


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "prodigy", "sgd"])
def test_what_is_saved_loads_the_same_without_pickle(tmp_path: Path, optimizer: str) -> None:
    saved = state(3, optimizer)
    folder = checkpoint.save(tmp_path, saved)
    assert folder.name == "checkpoint-3"
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    loaded = checkpoint.load(folder)
    assert torch.equal(loaded["weights"]["a.weight"], saved["weights"]["a.weight"])
    assert torch.equal(loaded["ema"]["a.weight"], torch.ones(2, 3))
    assert loaded["step"] == 3
    assert loaded["optimizer"]["param_groups"] == saved["optimizer"]["param_groups"]
    for index, slots in saved["optimizer"]["state"].items():
        for name, value in slots.items():
            other = loaded["optimizer"]["state"][index][name]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def test_old_ones_go_only_after_the_new_one_stands(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        checkpoint.save(tmp_path, state(step), keep=2)
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [10, 100]
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-100"
    assert not list(tmp_path.glob(".*"))


def test_the_one_just_saved_is_never_pruned(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(600))
    saved = checkpoint.save(tmp_path, state(550), keep=1)
    assert [path for _, path in checkpoint.checkpoints(tmp_path)] == [saved]


def test_a_limit_above_their_number_keeps_all(tmp_path: Path) -> None:
    for step in range(1, 5):
        checkpoint.save(tmp_path, state(step), keep=6)
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [1, 2, 3, 4]


def test_what_lies_after_a_resumed_step_goes(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        checkpoint.save(tmp_path, state(step))
    checkpoint.discard_after(tmp_path, 10)
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [5, 10]


@pytest.mark.parametrize("file", ["optimizer", "ema", "trainable"])
def test_a_checkpoint_with_a_file_missing_is_refused(tmp_path: Path, file: str) -> None:
    folder = checkpoint.save(tmp_path, state(1))
    (folder / f"{file}.safetensors").unlink()
    with pytest.raises(RunError, match="is not a readable checkpoint"):
        checkpoint.load(folder)


def test_a_torn_save_is_never_taken_for_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-6.part").mkdir()
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.save(tmp_path, state(7)).is_dir()
    assert not list(tmp_path.glob(".*"))


def test_a_damaged_checkpoint_is_one_line(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, state(1))
    path = folder / "trainable.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunError, match="checkpoint-1 is not a readable checkpoint"):
        checkpoint.load(folder)
