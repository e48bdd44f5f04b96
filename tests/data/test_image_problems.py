"""Images that are worth a look before training."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from finetune.cli import main
from finetune.data.image_problems import find_problems


def drawn(seed: int, size: tuple[int, int] = (640, 512)) -> Image.Image:
    """A picture with sharp edges, unlike any of another seed."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(rng.integers(0, 255, 3).tolist()))
    for _ in range(12):
        x, y, side = rng.integers(0, 400), rng.integers(0, 400), rng.integers(40, 200)
        ImageDraw.Draw(image).rectangle((x, y, x + side, y + side), fill=tuple(rng.integers(0, 255, 3).tolist()))
    return image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed in range(3):
        drawn(seed).save(tmp_path / f"{seed}.png")
    return tmp_path


def found(folder: Path) -> set[tuple[str, str]]:
    return {(problem.image, problem.kind) for problem in find_problems(folder, 512)}


def test_sharp_images_of_the_resolution_are_no_problem(folder: Path) -> None:
    assert found(folder) == set()


def test_each_kind_of_problem_is_found(folder: Path) -> None:
    image = drawn(0)
    (folder / "cut.jpg").write_bytes(_jpeg(drawn(3), folder)[:3000])
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    drawn(4).resize((500, 400)).save(folder / "small.png")
    drawn(5).filter(ImageFilter.GaussianBlur(4)).save(folder / "soft.png")
    (folder / "twin.png").write_bytes((folder / "1.png").read_bytes())
    image.crop((30, 20, 630, 500)).save(folder / "z-part.jpg", quality=70)
    (folder / "2.txt").write_bytes(b"caf\xe9 and more")
    Image.new("L", (64, 51)).save(folder / "1.mask.png")
    expected = {"cut.jpg": "unreadable", "phone.heic": "unreadable", "small.png": "small", "soft.png": "blurred"}
    expected |= {"twin.png": "copy", "z-part.jpg": "copy", "2.png": "caption", "1.png": "mask"}
    assert found(folder) == set(expected.items())


def _jpeg(image: Image.Image, folder: Path) -> bytes:
    image.save(path := folder.parent / "whole.jpg")
    return path.read_bytes()


def test_the_command_prints_and_writes_them(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (folder / "twin.png").write_bytes((folder / "1.png").read_bytes())
    output = tmp_path / "out.json"
    assert main(["check", "--data", str(folder), "--output", str(output)]) == 0
    assert capsys.readouterr().out.splitlines() == ["twin.png: the same file as 1.png", "1 copy"]
    assert json.loads(output.read_text()) == [{"image": "twin.png", "kind": "copy", "text": "the same file as 1.png"}]
    assert main(["check", "--data", str(folder / "gone")]) == 2
    assert main(["check", "--data", str(folder), "--output", str(folder)]) == 2
