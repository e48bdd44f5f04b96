from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.cache.disk import SHARDS
from finetune.cli import main


@pytest.fixture
def folder(tmp_path: Path, make_pictures: Callable[..., Path]) -> Path:
    return make_pictures(tmp_path / "pictures", captions=True)


def told(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """What the command prints, or its complaint."""
    main([str(word) for word in argv])
    output = capsys.readouterr()
    return output.err + output.out


def test_encoding_telling_verifying_and_pruning(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ("--cache_dir", tmp_path / "cache")
    train = ("--model", "tiny", "--data", folder, "--max_train_steps", 3, "--num_inference_steps", 0, *cache)
    assert "6 images (6 new)" in told(capsys, "cache", "encode", *train)
    assert "6 images (all cached)" in told(capsys, *train, "--output_dir", tmp_path / "run")
    information = told(capsys, "cache", "info", *cache)
    assert "6 images encoded" in information
    assert "7 captions encoded" in information
    assert "2 shards" in information
    assert "13 encodings as written, 0 damaged" in told(capsys, "cache", "verify", *cache)
    for shard in (tmp_path / "cache" / SHARDS).iterdir():
        shard.write_bytes(shard.read_bytes()[:-1])
    assert "11 encodings as written, 2 damaged" in told(capsys, "cache", "verify", *cache)
    assert "0.0 MB freed" in told(capsys, "cache", "prune", "--unused_days", 1, *cache)
    assert " 0.0 MB freed" not in told(capsys, "cache", "prune", "--unused_days", 0, *cache)
    assert list((tmp_path / "cache" / SHARDS).iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("info --cache_dir {}/nothing", "cache_dir {}/nothing: no encodings are kept there"),
        ("verify --cache_dir none", "cache_dir none: no encodings are kept there"),
        ("prune", "cache prune needs --unused_days or --max_gb"),
        ("prune --unused_days -1", "--unused_days -1: expected 0 or more"),
        ("prune --max_gb nan", "--max_gb nan: expected a number"),
        ("encode --data {} --cache_dir none", "cache_dir none cannot be used here: nothing would be kept"),
        ("encode --data {} --live_encoding", "live_encoding cannot be used here: nothing would be kept"),
        ("encode --data {} --cache_dir {}/file", "cache_dir {}/file: "),
        ("clean", "cache takes a command after it: encode, info, verify, prune"),
    ],
)
def test_wrong_use_is_told_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], argv: str, message: str
) -> None:
    (folder / "file").write_text("")
    complaint = told(capsys, "cache", *argv.replace("{}", str(folder)).split())
    assert complaint.startswith(f"finetune-unet: {message.replace('{}', str(folder))}")
    assert complaint.count("\n") == 1


def test_help_of_encoding_is_that_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--learning_rate" in told(capsys, "cache", "encode", "--help")
