"""Real tiny objects that many tests share: drawn pictures, and the embedded model in a cache folder of its own."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from PIL import Image, ImageDraw

from finetune.log_handlers import TextHandler, install

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("untimed")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # a worker for each core: threads of their own would only wait for one another
    os.environ["OMP_NUM_THREADS"] = "1"  # of the programs that tests start
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def messages_on_standard_output() -> None:
    """As the command shows them; pytest's own handlers would count as a configuration of the user."""
    install(TextHandler())


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's cache folder is none of a test's business."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def global_generator_untouched() -> Iterator[None]:
    """Law 1: no draw of ours touches torch's global generator."""
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(before, torch.random.get_rng_state()), "a draw touched torch's global generator"


@pytest.fixture(scope="session")
def make_pictures() -> Callable[..., Path]:
    """Fill a folder with drawn pictures of several shapes, `00.png`, `01.png` ..."""

    def make(folder: Path, count: int = 6, captions: bool = False) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            width, height = ((80, 64), (64, 96), (72, 72))[number % 3]
            picture = Image.new("RGB", (width, height), (40 * number % 256, 90, 255 - 30 * number % 256))
            ImageDraw.Draw(picture).ellipse((8 + number % 42, 8, 50, 50), fill=(255, 20 * number % 256, 0))
            picture.save(folder / f"{number:02d}.png")
            if captions:
                (folder / f"{number:02d}.txt").write_text(f"a red disc, number {number}")
        return folder

    return make


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory, make_pictures: Callable[..., Path]) -> Path:
    """Six pictures with captions beside them."""
    return make_pictures(tmp_path_factory.mktemp("data") / "discs", captions=True)
