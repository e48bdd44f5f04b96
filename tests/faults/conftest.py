"""One small run that the faults happen to, and what it leaves when nothing happens to it."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.harness import digests, run, typed


@pytest.fixture(autouse=True)
def global_generator_untouched() -> None:
    """What runs here runs in processes of its own."""


@pytest.fixture(scope="session")
def options(pictures: Path) -> dict[str, object]:
    """A run with all that a resume could forget, of two micro-batches a step and three steps an epoch, saved twice."""
    length = {"max_train_steps": 4, "train_batch_size": 1, "gradient_accumulation_steps": 2, "lr_warmup_steps": 1}
    learned = {"rank": 2, "lora_target_modules": "attn2.to_q", "lora_dropout": 0.1, "use_ema": True}
    seen = {"caption_dropout": 0.3, "random_flip": True, "no-aspect_ratio_bucketing": True}
    kept = {
        "output_dir": "out",
        "checkpointing_steps": 2,
        "num_inference_steps": 0,
        "forgetting_prompts": 0,
    }
    return {"model": "tiny", "data": pictures, **length, **learned, **seen, **kept}


@pytest.fixture(scope="session")
def words(options: dict[str, object]) -> list[str]:
    """The same as the command takes it."""
    return typed(options)


@pytest.fixture(scope="session")
def straight(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the files of the run that nothing has happened to."""
    folder = tmp_path_factory.mktemp("straight")
    ended = run(words, folder)
    assert ended.code == 0, ended.said
    return digests(folder / "out")


@pytest.fixture
def equal_after(words: list[str], straight: dict[str, str]) -> Callable[[Path], None]:
    """Run the same command in a folder once more, and compare every file with those of the straight run."""

    def check(folder: Path) -> None:
        ended = run(words, folder)
        assert ended.code == 0, ended.said
        assert digests(folder / "out") == straight
        assert [path.name for path in (folder / "out").glob(".*")] == [".lock"]

    return check


@pytest.fixture
def folder() -> Iterator[Path]:
    """A new folder for runs, which are many, so it does not stay; its short name keeps messages to a line."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        yield Path(name)
