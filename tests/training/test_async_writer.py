import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.errors import RunError
from finetune.training import async_writer, checkpoint
from finetune.training.async_writer import AsyncWriter, copied
from tests.small_trainer import small_batch, small_trainer


def test_what_is_written_is_the_state_of_its_step_however_far_training_is(tmp_path: Path) -> None:
    trainer = small_trainer("lora")
    trainer.step(small_batch())
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
    expected = checkpoint.save(tmp_path / "here", trainer.state_dict())
    copy, later = copied(trainer.state_dict()), threading.Event()
    assert copy is not None

    def write() -> None:
        later.wait()
        checkpoint.save(tmp_path / "there", copy)

    with AsyncWriter() as under_way:
        under_way.begin(write)
        for _ in range(2):
            trainer.step(small_batch()).as_dict()
        later.set()
    for path in expected.iterdir():
        assert (tmp_path / "there" / expected.name / path.name).read_bytes() == path.read_bytes()


def test_tensors_are_copied_to_the_host_in_their_plain_order() -> None:
    weight = torch.arange(48.0).view(2, 2, 3, 4).to(memory_format=torch.channels_last).requires_grad_()
    state = {
        "weights": {"w": weight},
        "optimizer": {"state": {0: {"step": torch.ones(())}}, "param_groups": [{"lr": 1}]},
    }
    copy = copied(state)
    assert copy is not None
    with torch.no_grad():
        weight.zero_()
    assert copy["weights"]["w"].flatten().tolist() == list(range(48))
    assert copy["weights"]["w"].is_contiguous()
    assert copy["optimizer"]["state"][0]["step"] == 1


def test_where_memory_is_short_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_writer, "SPARE", 1e15)
    assert copied({"weights": {"w": torch.ones(1)}}) is None


def failing() -> None:
    raise OSError("the disk is full")


def test_an_error_of_any_kind_reaches_the_run() -> None:
    def broken() -> None:
        raise RuntimeError("a device is missing")

    with AsyncWriter() as under_way:
        under_way.begin(broken)
        with pytest.raises(RuntimeError, match="a device is missing"):
            under_way.wait()


def test_what_went_wrong_is_raised_once_by_whoever_asks_next() -> None:
    under_way = AsyncWriter()
    under_way.begin(failing)
    with pytest.raises(OSError, match="the disk is full"):
        under_way.wait()
    under_way.check()
    under_way.begin(failing)
    with pytest.raises(OSError, match="the disk is full"):
        under_way.begin(lambda: None)
    with pytest.raises(OSError, match="the disk is full"), under_way:
        under_way.begin(failing)


def left_with(error: BaseException, write: Callable[[], object]) -> None:
    """An error comes while something is being written."""
    with AsyncWriter() as under_way:
        under_way.begin(write)
        raise error


def test_the_error_that_is_on_its_way_is_the_one_to_be_told_and_writing_ends_first() -> None:
    written = []

    def write() -> None:
        time.sleep(0.1)
        written.append(1)

    with pytest.raises(RunError, match="the loss"):
        left_with(RunError("the loss"), write)
    assert written == [1]


def test_an_interrupt_leaves_at_once() -> None:
    go = threading.Event()
    with pytest.raises(KeyboardInterrupt):
        left_with(KeyboardInterrupt(), go.wait)
    go.set()


def test_a_checkpoint_loads_from_what_was_copied(tmp_path: Path) -> None:
    trainer = small_trainer("full")
    trainer.step(small_batch())
    copy = copied(trainer.state_dict())
    assert copy is not None
    folder = checkpoint.save(tmp_path, copy)
    other = small_trainer("full")
    other.load_state_dict(checkpoint.load(folder))
    assert trainer.step(small_batch()).loss == other.step(small_batch()).loss
    assert load_file(folder / "trainable.safetensors").keys() == trainer.parameters.keys()
