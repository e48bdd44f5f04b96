"""Whole runs of several processes, compared with those of one."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from finetune.config import TrainConfig, load_resolved
from finetune.errors import Elsewhere, FinetuneError, Interrupted, UsageError
from finetune.recipe import fine_tune
from finetune.training import checkpoint
from tests.processes import together


@pytest.fixture(autouse=True)
def global_generator_untouched() -> None:
    """Whole runs go through diffusers pipelines, which may draw from torch's global generator."""


def options(pictures: Path, output: Path, **more: object) -> dict[str, object]:
    basic = {"data": str(pictures), "output_dir": str(output), "max_train_steps": 4, "train_batch_size": 2, "rank": 4}
    return basic | {"num_inference_steps": 0, "lr_scheduler": "constant", "random_flip": True, "use_ema": True} | more


def run(given: dict[str, object]) -> Path:
    return fine_tune(TrainConfig(**given))


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def weights(folder: Path) -> dict[str, list[float]]:
    return {name: w.flatten().tolist() for name, w in load_file(folder / "pytorch_lora_weights.safetensors").items()}


def assert_same_run(one: Path, other: Path) -> None:
    assert losses(one) == pytest.approx(losses(other), rel=1e-5)
    expected = weights(other)
    for name, numbers in weights(one).items():  # Adam divides by what may be near 0: rounding shows there
        assert numbers == pytest.approx(expected[name], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(("encode", "chunk"), [pytest.param("before", 0, marks=pytest.mark.slow), ("ahead", 3)])
def test_two_processes_train_the_run_that_one_trains(pictures: Path, tmp_path: Path, encode: str, chunk: int) -> None:
    """Of pictures of three shapes, so that a process may get several of them in a step; in one volume or in two."""
    more = {"encode": encode, "cache_dir": str(tmp_path / "cache"), "volume_size": chunk}
    assert together(run, options(pictures, tmp_path / "two", **more)) == [tmp_path / "two"] * 2
    alone = run(options(pictures, tmp_path / "one", num_processes=2, volume_size=chunk))
    assert_same_run(tmp_path / "two", alone)
    assert load_resolved(tmp_path / "two/config.toml").global_batch == 4
    ledger = json.loads((tmp_path / "two/ledger.json").read_text())
    assert (ledger["visits"], ledger["steps"]) == (16, 4)
    assert checkpoint.latest(tmp_path / "two") == tmp_path / "two/checkpoint-4"


def test_a_run_goes_on_with_other_numbers_of_processes_and_keeps_its_steps(pictures: Path, tmp_path: Path) -> None:
    whole = run(options(pictures, tmp_path / "whole", train_batch_size=1, num_processes=3, max_train_steps=6))
    parts = tmp_path / "parts"
    together(run, options(pictures, parts, train_batch_size=1, max_train_steps=2), world=3)
    resumed: dict[str, object] = {"output_dir": str(parts), "resume_from_checkpoint": "latest"}
    assert run(resumed | {"max_train_steps": 4}) == parts
    together(run, resumed | {"max_train_steps": 6})
    assert load_resolved(parts / "config.toml").global_batch == 3
    assert_same_run(parts, whole)


def failure(given: dict[str, object]) -> type[FinetuneError]:
    with pytest.raises(FinetuneError) as error:
        run(given)
    return type(error.value)


def test_what_the_first_refuses_ends_all(pictures: Path, tmp_path: Path) -> None:
    kinds = together(failure, options(pictures, tmp_path / "out", train_batch_size=1, num_processes=1))
    assert UsageError in kinds  # steps of one example for two processes
    assert set(kinds) <= {UsageError, Elsewhere}
    assert not (tmp_path / "out/checkpoint-4").exists()


def stopped(given: dict[str, object]) -> int:
    """Only the second process gets the signal, when the first steps are made."""
    metrics = Path(str(given["output_dir"])) / "metrics.jsonl"

    def terminate() -> None:
        while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    if os.environ["RANK"] == "1":
        threading.Thread(target=terminate, daemon=True).start()
    with pytest.raises(Interrupted) as error:
        run(given)
    return error.value.exit_code


def test_a_signal_to_one_stops_all_after_the_same_step(pictures: Path, tmp_path: Path) -> None:
    given = options(pictures, tmp_path / "out", max_train_steps=100_000, forgetting_prompts=0)
    assert together(stopped, given) == [143, 143]
    found = checkpoint.latest(tmp_path / "out")
    assert found
    assert checkpoint.record(found)["step"] == len(losses(tmp_path / "out"))
