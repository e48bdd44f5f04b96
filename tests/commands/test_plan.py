"""What `plan` says of a run that is not started."""

import re
from pathlib import Path

import pytest

from finetune.cli import main
from finetune.config import TrainConfig
from finetune.recipe import fine_tune
from tests.small_models import small_pipeline


@pytest.fixture
def plan(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)

    def planned(*words: str, code: int = 0, steps: int = 60) -> str:
        given = ["--data", str(pictures), "--train_batch_size", "2", "--max_train_steps", str(steps)]
        assert main(["plan", *given, *words]) == code
        said = capsys.readouterr()
        return said.err if code else said.out

    return planned


def row(said: str, name: str) -> str:
    found = re.search(rf"^{name.title()} +(.+)$", said, re.MULTILINE)
    assert found, said
    return found[1]


def test_two_steps_are_timed_and_nothing_is_kept(plan, tmp_path: Path) -> None:
    time = row(plan(), "Time")
    seconds = re.fullmatch(r"about (\d+) s of steps, at the speed of 2 steps tried here", time)
    assert seconds
    assert 1 <= int(seconds[1]) < 90
    assert not list(tmp_path.iterdir())


def test_an_earlier_run_says_how_long_it_takes(plan, pictures: Path) -> None:
    config = TrainConfig(
        data=str(pictures), output_dir="runs/dog", train_batch_size=2, max_train_steps=5, num_inference_steps=0
    )
    fine_tune(config)
    assert "at the speed of runs/dog" in row(plan(), "Time")
    assert "tried here" in row(plan("--runs", "elsewhere"), "time")


def test_a_run_of_one_step_is_timed_by_it(plan) -> None:
    said = plan("--lr_warmup_steps", "0", steps=1)
    assert row(said, "Time").endswith("at the speed of 1 step tried here")


def test_no_step_is_timed_where_none_is_wanted(plan) -> None:
    assert row(plan("--timed_steps", "0"), "time") == "not known: no run like this one"


def test_what_is_written_is_said(plan) -> None:
    assert re.fullmatch(
        r"about encodings of [\d.]+ [MG]B in .+, 1 checkpoint of [\d.]+ MB, exports of [\d.]+ MB; [\d.]+ GB free",
        row(plan("--timed_steps", "0"), "disk"),
    )


def test_a_gpu_that_is_not_here_is_planned_for(plan, tmp_path: Path) -> None:
    small_pipeline("sd15").save_pretrained(tmp_path / "sd")
    said = plan("--model", str(tmp_path / "sd"), "--resolution", "64", "--memory", "6")
    assert row(said, "Memory").endswith(" GB of the 6.0 GB planned for")
    assert "mixed_precision bf16" in row(said, "Decided")
    assert row(said, "Time") == "not known: no run like this one"
    refused = plan("--model", str(tmp_path / "sd"), "--resolution", "64", "--memory", "0.01", code=2)
    assert "of the 0.0 GB planned for; " in refused
    assert "--train_batch_size 1" in refused
