"""No room on the disk, no folder, no memory, no workers: one line, a code, and what was there stays whole."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import run, start, typed
from tests.faults.settings import small_files_at

FULL = ("File too large", "No space left on device")


def assert_told(said: str, *words: str) -> None:
    """The last line says what went wrong, and nothing else does."""
    assert "Traceback" not in said, said
    last = said.splitlines()[-1]
    assert last.startswith("finetune-unet: "), said
    assert any(word in last for word in words), last


def test_a_full_disk_during_a_save(words: list[str], folder: Path, equal_after: Callable[[Path], None]) -> None:
    """The second save finds room for less than the smallest of its files."""
    ended = run(words, folder, partial(small_files_at, ".checkpoint-4.part", 0, 4000))
    assert ended.code == 1
    assert_told(ended.said, *FULL)
    assert [path.name for path in folder.glob("out/*checkpoint*")] == ["checkpoint-2"]
    equal_after(folder)


def test_a_full_disk_during_the_export(words: list[str], folder: Path, equal_after: Callable[[Path], None]) -> None:
    ended = run(words, folder, partial(small_files_at, ".export.part", 0, 4000))
    assert ended.code == 1
    assert_told(ended.said, *FULL)
    assert not (folder / "out/pytorch_lora_weights.safetensors").exists()
    assert not (folder / "out/result.json").exists()
    equal_after(folder)


def test_a_full_disk_while_encodings_are_kept(options: dict[str, object], folder: Path) -> None:
    given = typed({**options, "cache_dir": folder / "cache"})
    ended = run(given, folder, partial(small_files_at, ".part", 0, 4000))  # of the first shard
    assert ended.code == 1
    assert_told(ended.said, *FULL, "disk I/O error")  # of the shard, or of the index
    assert not list((folder / "cache").rglob("*.part"))
    assert run(given, folder).code == 0


def test_a_disk_that_is_really_full(options: dict[str, object], folder: Path) -> None:
    """A file system of 200 KB, and checkpoints that are larger."""
    (folder / "out").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder / "out")]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        ended = run(typed({**options, "lora_target_modules": ["to_q", "to_k"], "rank": 32}), folder)
        assert ended.code == 1, ended.said
        assert_told(ended.said, *FULL)
        assert not list(folder.glob("out/.checkpoint*"))
    finally:
        subprocess.run(["umount", str(folder / "out")], check=True)


def test_an_output_folder_that_cannot_be_written(options: dict[str, object], folder: Path) -> None:
    ended = run(typed({**options, "output_dir": "/proc/out"}), folder)
    assert ended.code == 2
    assert_told(ended.said, "output_dir /proc/out cannot be written")


def test_an_output_folder_that_vanishes(
    options: dict[str, object], folder: Path, equal_after: Callable[[Path], None]
) -> None:
    started = start(typed({**options, "max_train_steps": 1000}), folder)
    started.wait_for(folder / "out/metrics.jsonl")
    (folder / "out").rename(folder / "gone")
    ended = started.ended()
    assert ended.code == 1
    assert_told(ended.said, "No such file or directory")
    equal_after(folder)


def test_a_worker_that_is_killed_ends_the_run_in_one_line(options: dict[str, object], folder: Path) -> None:
    more = {"max_train_steps": 1000, "live_encoding": True, "dataloader_num_workers": 2}
    started = start(typed({**options, **more}), folder)
    started.wait_for(folder / "out/metrics.jsonl")
    children = Path(f"/proc/{started.process.pid}/task/{started.process.pid}/children").read_text().split()
    assert len(children) >= 2
    os.kill(int(children[0]), signal.SIGKILL)
    began = time.monotonic()
    ended = started.ended(60)
    assert time.monotonic() - began < 60
    assert ended.code == 1
    assert_told(ended.said, "worker")


def scarce_from_the_third_step() -> None:
    """After two forward passes, the UNet has memory for one picture at a time."""
    import torch

    from finetune.training.noise_prediction import NoisePrediction

    passes, loss = [0], NoisePrediction.loss

    def scarce(self: NoisePrediction, unet: Any, noised: Any, *others: Any) -> Any:
        passes[0] += 1
        if passes[0] > 2 and len(noised.t) > 1:
            raise torch.OutOfMemoryError("not enough")
        return loss(self, unet, noised, *others)

    NoisePrediction.loss = scarce


def test_memory_that_does_not_suffice_from_the_third_step_on(options: dict[str, object], folder: Path) -> None:
    given = typed({**options, "train_batch_size": 2, "gradient_accumulation_steps": None, "lora_dropout": None})
    plain, short = run(given, folder / "plain"), run(given, folder / "short", scarce_from_the_third_step)
    assert (plain.code, short.code) == (0, 0), short.said
    assert short.said.count("out of memory: from step 3 on 1 image at a time") == 1
    ours, theirs = (
        [json.loads(line) for line in (folder / name / "out/metrics.jsonl").read_text().splitlines()]
        for name in ("short", "plain")
    )
    assert ours[:2] == theirs[:2]
    assert ours[2]["loss"] == pytest.approx(theirs[2]["loss"], rel=1e-5)
    assert ours[2]["grad_norm"] == pytest.approx(theirs[2]["grad_norm"], rel=1e-5)
