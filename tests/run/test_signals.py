import os
import signal
import threading
from pathlib import Path

import pytest

from finetune.config import TrainConfig
from finetune.errors import Interrupted
from finetune.recipe import fine_tune
from finetune.run.signals import TIME_UP, LoopAction, StopConditions, catch_signals
from finetune.training import checkpoint

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(autouse=True)
def global_generator_untouched() -> None:
    """Whole runs go through diffusers pipelines, which may draw from torch's global generator."""


def options(pictures: Path, output: Path, **more: object) -> TrainConfig:
    basic = {"data": str(pictures), "output_dir": str(output), "max_train_steps": 4, "train_batch_size": 1, "rank": 2}
    return TrainConfig(**basic | {"num_inference_steps": 0} | more)


def test_the_clock_asks_for_a_checkpoint_after_the_last_and_for_a_stop_after_the_start() -> None:
    seconds = [100.0]
    conditions = StopConditions(lambda: seconds[0])
    assert conditions.poll() is LoopAction.CONTINUE
    seconds[0] += 60
    conditions.save_minutes = 1
    assert conditions.poll() is LoopAction.CHECKPOINT
    conditions.checkpoint_saved()
    assert conditions.poll() is LoopAction.CONTINUE
    seconds[0] += 59
    conditions.stop_minutes = 2
    assert conditions.poll() is LoopAction.CONTINUE
    seconds[0] += 1
    assert conditions.poll() is LoopAction.STOP
    assert conditions.exit_code == TIME_UP
    conditions.stop_request.number = signal.SIGTERM
    assert conditions.poll() is LoopAction.STOP
    assert conditions.exit_code == 143


def test_usr1_asks_for_a_checkpoint_once_and_is_then_as_before() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    conditions = StopConditions()
    with conditions.catch_sigusr1():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert conditions.poll() is LoopAction.CHECKPOINT
        conditions.checkpoint_saved()
        assert conditions.poll() is LoopAction.CONTINUE
    assert signal.getsignal(signal.SIGUSR1) == before


def test_usr1_keeps_a_checkpoint_and_the_run_goes_on(pictures: Path, tmp_path: Path) -> None:
    straight = fine_tune(options(pictures, tmp_path / "straight", max_train_steps=20))
    log, over = tmp_path / "out/metrics.jsonl", threading.Event()

    def watch() -> None:
        while not (log.exists() and log.read_text().count("\n") >= 3):
            if over.wait(0.002):
                return
        os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        out = fine_tune(options(pictures, tmp_path / "out", max_train_steps=20, checkpoints_total_limit=0))
    finally:
        over.set()
        thread.join()
    (asked, _), (last, _) = checkpoint.checkpoints(out)
    assert 3 <= asked < last == 20
    assert (out / LORA).read_bytes() == (straight / LORA).read_bytes()


def test_checkpoints_by_the_clock(pictures: Path, tmp_path: Path) -> None:
    out = fine_tune(options(pictures, tmp_path / "out", checkpointing_minutes=1e-6, checkpoints_total_limit=0))
    assert [step for step, _ in checkpoint.checkpoints(out)] == [1, 2, 3, 4]


def test_a_run_that_stops_in_time_is_ended_by_the_same_command_to_the_same_bits(pictures: Path, tmp_path: Path) -> None:
    straight = fine_tune(options(pictures, tmp_path / "straight"))
    limited = options(pictures, tmp_path / "out", max_train_minutes=1e-6)
    for step in (1, 2, 3):
        with pytest.raises(Interrupted, match=f"stopped at step {step} of 4 after max_train_minutes = 1e-06") as caught:
            fine_tune(limited)
        assert caught.value.exit_code == 124
    out = fine_tune(limited)
    assert (out / LORA).read_bytes() == (straight / LORA).read_bytes()
    assert (out / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()


def test_a_launcher_passes_on_a_signal_that_was_heard_already(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    seconds = [100.0]
    try:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
        with catch_signals(lambda: seconds[0]) as stop:
            os.kill(os.getpid(), signal.SIGINT)
            seconds[0] += 1
            os.kill(os.getpid(), signal.SIGINT)
            assert (stop.number, heard) == (signal.SIGINT, [])
            seconds[0] += 10
            os.kill(os.getpid(), signal.SIGINT)
            assert heard == [signal.SIGINT]
        monkeypatch.delenv("TORCHELASTIC_RUN_ID")
        with catch_signals(lambda: seconds[0]):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        assert heard == [signal.SIGINT] * 2
    finally:
        signal.signal(signal.SIGINT, before)
