"""Checkpoints that are not what was written, or not of this run."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.harness import digests, run, typed

FILES = ["trainable.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json", "manifest.json"]


@pytest.fixture
def stopped(words: list[str], folder: Path) -> Path:
    """A run that has stopped after its third step, with the checkpoints of its second and third."""
    for _ in range(3):
        assert run([*words, "--max_train_minutes", "1e-6", "--checkpoints_total_limit", "2"], folder).code == 124
    assert sorted(path.name for path in folder.glob("out/checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_each_file_cut_or_flipped_is_named_and_the_checkpoint_before_is_used(
    stopped: Path, words: list[str], straight: dict[str, str]
) -> None:
    for name in FILES:
        for harm in (cut, flip):
            place = stopped / f"{name}-{harm.__name__}"
            shutil.copytree(stopped / "out", place / "out")
            harm(place / "out/checkpoint-3" / name)
            ended = run(words, place)
            assert ended.code == 0, ended.said
            skipped, resuming = ended.said.splitlines()[1:3]
            assert skipped.startswith("skipped: out/checkpoint-3 is not a")
            assert name in skipped
            assert resuming == "resuming out/checkpoint-2"
            ours = digests(place / "out")
            assert {name: digest for name, digest in ours.items() if "000001" not in name} == straight


def test_latest_with_none_starts_and_with_none_valid_does_not(
    stopped: Path, words: list[str], folder: Path, straight: dict[str, str]
) -> None:
    latest = ["--resume_from_checkpoint", "latest"]
    for path in stopped.glob("out/checkpoint-*/state.json"):
        flip(path)
    before = digests(stopped / "out")
    ended = run([*words, *latest], stopped)
    assert ended.code == 1
    assert "checkpoint-3 is not a" in ended.last_line
    assert "checkpoint-2 is not a" in ended.last_line
    assert digests(stopped / "out") == before
    fresh = folder / "fresh"
    ended = run([*words, *latest], fresh)
    assert (ended.code, ended.said.splitlines()[1]) == (
        0,
        "out: no checkpoint found, starting from the beginning",
    )
    assert digests(fresh / "out") == straight


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 7}, "seed: 0 -> 7"),
        ({"resolution": 32}, "resolution: 64 -> 32"),
        ({"data": "others"}, "data: "),
        ({"method": "full"}, "method full; give --method lora"),
    ],
)
def test_what_makes_another_run_is_refused_by_name_and_changes_nothing(
    changed: dict[str, object],
    said: str,
    stopped: Path,
    options: dict[str, object],
    make_pictures: Callable[..., Path],
) -> None:
    make_pictures(stopped / "others", count=5, captions=True)
    of_lora = ("rank", "lora_target_modules", "lora_dropout") if "method" in changed else ()
    before = digests(stopped / "out")
    given = {**options, **changed, **dict.fromkeys(of_lora), "resume_from_checkpoint": "latest"}
    ended = run(typed(given), stopped)
    assert ended.code == 2, ended.said
    assert said in ended.last_line
    assert digests(stopped / "out") == before
