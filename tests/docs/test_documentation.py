"""Every command and every program of the docs runs, on the embedded model and a few steps."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from finetune.cli import main, parse_train

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SD_SCRIPTS = """accelerate launch train_network.py --pretrained_model_name_or_path="model" --train_data_dir=images \\
  --network_module=networks.lora --network_dim=2 --max_train_steps=2 --resolution=64 --output_name=dog"""


@pytest.fixture(autouse=True)
def global_generator_untouched() -> None:
    """Whole runs go through diffusers pipelines, which may draw from torch's global generator."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The words of each command of ours, launched alone or by another program, in the order of the page."""
    found = []
    for line in "\n".join(blocks(page, "bash")).splitlines():
        words = shlex.split(line, comments=True)
        if "finetune-unet" in words[:1]:
            found.append(words[1:])
        elif words[:1] in (["torchrun"], ["accelerate"]):
            found.append(["parse", *words[words.index("finetune") + 1 :]])
    return found


def on_tiny(words: list[str]) -> list[str]:
    """The command for the embedded model and a few steps; folders of runs are named by their model."""
    words = [re.sub(r"images-(sd15|sdxl|sd21)", "images-tiny", word) for word in words]
    words = ["tiny" if word in ("sd15", "sd21", "sdxl") else word for word in words]
    short = {"--num_inference_steps": "1"} if words[0] == "sample" else {}
    if words[0].startswith("-"):
        short = {"--num_inference_steps": "1", "--max_train_steps": "2"}
        short |= {"--image_size": "32"} if "ddpm" in words else {} if "full" in words else {"--rank": "2"}
    if words[0] == "lora":  # whose layers a file does not tell from other models', and which has no single file
        short = {"--format": "diffusers"} if words[1] == "merge" else {"--model": "tiny"}
    return [*words, *(word for flag, value in short.items() if flag not in words for word in (flag, value))]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_pictures: Callable[..., Path]) -> Path:
    """A folder with what the commands of the docs are given."""
    for name in ("images", "more-images"):
        make_pictures(tmp_path / name, count=4, captions=True)
    (tmp_path / "train.sh").write_text(SD_SCRIPTS)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    Image.new("RGB", (64, 64)).save(tmp_path / "room.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_run(page: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands(page):
        if words[0] == "parse":
            parse_train(words[1:])
        elif words[0] == "ui":
            continue  # serves until it is stopped; tests/page starts it
        else:
            code = main(on_tiny(words))
            assert code == 0, f"{words}: {capsys.readouterr().err}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.is_relative_to(ROOT / "docs")], ids=lambda path: path.stem
)
def test_programs_run(page: Path, place: Path) -> None:
    for program in blocks(page, "python"):
        done = subprocess.run([sys.executable, "-c", program], cwd=place, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_docs_have_commands() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 30
