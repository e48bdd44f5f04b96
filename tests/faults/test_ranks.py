"""What happens to one of two processes that train together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from finetune.config import TrainConfig
from finetune.errors import Interrupted
from finetune.recipe import fine_tune
from finetune.training import checkpoint
from finetune.training.metrics import NotFinite
from tests.faults.harness import typed
from tests.processes import together


def steps(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def resumed(given: dict[str, Any]) -> Path:
    return fine_tune(TrainConfig(**given))


def spoilt_in_the_second(given: dict[str, Any]) -> tuple[str, int]:
    """A run of two, of which the second reads no finite latents for its third visit."""
    from finetune.cache.image_source import CachedImages

    load, visits = CachedImages.load, [0]

    def spoil(self: CachedImages, index: int, key: int) -> Any:
        image = load(self, index, key)
        visits[0] += 1
        return image._replace(latent_params=image.latent_params * float("nan")) if visits[0] == 3 else image

    if os.environ["RANK"] == "1":
        CachedImages.load = spoil
    with pytest.raises(NotFinite) as error:
        resumed(given)
    return str(error.value), error.value.fault.step


def test_a_picture_that_is_not_finite_for_one_stops_both_before_the_update(pictures: Path, tmp_path: Path) -> None:
    given = {"data": str(pictures), "output_dir": str(tmp_path / "out"), "rank": 2, "num_inference_steps": 0}
    given |= {
        "train_batch_size": 1,
        "max_train_steps": 6,
        "checkpointing_steps": 1,
        "lora_target_modules": ["attn2.to_q"],
    }
    first, second = together(spoilt_in_the_second, given)
    assert first == second
    said, step = first
    assert step == 3
    (line,) = [json.loads(line) for line in (tmp_path / "out/faults.jsonl").read_text().splitlines()]
    (bad,) = [example["id"] for example in line["examples"] if example["loss"] == "nan"]
    assert said.startswith(f"step 3: the loss is not finite for {bad}; no weight was changed")
    assert [one["step"] for one in steps(tmp_path / "out")] == [1, 2]
    kept = checkpoint.latest(tmp_path / "out")
    assert kept is not None
    assert all(tensor.isfinite().all() for tensor in load_file(kept / "trainable.safetensors").values())
    assert together(resumed, given) == [tmp_path / "out"] * 2  # nothing is spoilt now


def test_one_that_is_killed_ends_the_other_and_the_run_resumes(pictures: Path, tmp_path: Path) -> None:
    """As torchrun launches it, in fresh processes."""
    out = tmp_path / "out"
    given = {"data": pictures, "output_dir": out, "rank": 4, "train_batch_size": 2, "num_inference_steps": 0}
    given |= {"max_train_steps": 100_000, "checkpointing_steps": 2, "lr_warmup_steps": 0, "lr_scheduler": "constant"}
    given |= {"forgetting_prompts": 0}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command = subprocess.Popen([*launcher, "-m", "finetune", *typed(given)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while checkpoint.latest(out) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(command.pid)], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    assert command.wait(60) == 1
    done = len(steps(out))
    more = {"output_dir": str(out), "resume_from_checkpoint": "latest", "max_train_steps": done + 4}
    assert together(resumed, more) == [out] * 2
    assert [one["step"] for one in steps(out)] == list(range(1, done + 5))


def stopped_while_saving(given: dict[str, Any], seconds: float) -> tuple[int, float, float]:
    """A run of two that stops at once; the first takes its time to write. Exit code, when it was written, the end."""
    save, written = checkpoint.save, [0.0]

    def slowly(*arguments: Any, **options: Any) -> Path:
        time.sleep(seconds)
        folder = save(*arguments, **options)
        written[0] = time.monotonic()
        return folder

    checkpoint.save = slowly
    with pytest.raises(Interrupted) as error:
        resumed(given)
    return error.value.exit_code, written[0], time.monotonic()


def test_none_ends_before_the_first_has_written_the_checkpoint(pictures: Path, tmp_path: Path) -> None:
    """A launcher kills the others 30 seconds after one has ended."""
    given = {"data": str(pictures), "output_dir": str(tmp_path / "out"), "rank": 2, "num_inference_steps": 0}
    given |= {"train_batch_size": 1, "max_train_steps": 6, "max_train_minutes": 1e-6, "forgetting_prompts": 0}
    (code, written, _), (other_code, _, other_ended) = together(stopped_while_saving, given, 2.0)
    assert code == other_code == 124
    assert other_ended >= written > 0
    assert checkpoint.latest(tmp_path / "out") == tmp_path / "out/checkpoint-1"
