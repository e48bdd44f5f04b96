"""The examples, run as a reader would run them, only smaller."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, StableDiffusionPipeline
from nbclient import NotebookClient
from PIL import Image

from finetune.models.tiny import tiny_folder

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOK = EXAMPLES / "train_a_diffusion_model.ipynb"
SMALL = f"""
DATA = {str(EXAMPLES / "butterflies")!r}
PIXEL_STEPS, LORA_STEPS, RUN_STEPS, INFERENCE_STEPS = 2, 3, 2, 4
"""


@pytest.fixture(autouse=True)
def global_generator_untouched() -> None:
    """Loading a diffusers pipeline may draw from torch's global generator."""


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the examples inherit: no network, no cache but their own, and this package."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]))


def run(script: str, *options: str | int, cwd: Path) -> str:
    """Run an example with its options and answer what it printed."""
    command = [sys.executable, str(EXAMPLES / script), *map(str, options)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def draw(pipeline: StableDiffusionPipeline) -> np.ndarray:
    """One picture, (64, 64, 3) in [0, 1]."""
    source = torch.Generator().manual_seed(0)
    pictures = pipeline("a butterfly", num_inference_steps=2, generator=source, output_type="np")
    return np.asarray(pictures.images[0])  # pyright: ignore[reportAttributeAccessIssue] # not a tuple unless asked for


def test_the_custom_loop_leaves_a_lora_that_changes_the_picture(tmp_path: Path) -> None:
    said = run("custom_loop.py", "--steps", 4, "--output", "out", cwd=tmp_path)
    assert said.splitlines()[-1] == 'pipeline.load_lora_weights("out")'
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder())
    before = draw(pipeline)
    assert np.array_equal(draw(pipeline), before)
    pipeline.load_lora_weights(str(tmp_path / "out"))
    assert not np.array_equal(draw(pipeline), before)


def test_the_loop_in_the_readme_runs_as_it_stands_and_shows_the_loss(tmp_path: Path) -> None:
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    (loop,) = [part.partition("```")[0] for part in readme.split("```python\n") if "ft.batches" in part]
    for large, small in (("sd15", "tiny"), ("./images", str(EXAMPLES / "butterflies")), ("steps=1000", "steps=10")):
        assert large in loop
        loop = loop.replace(large, small)
    command = [sys.executable, "-c", loop.replace("resolution=512", "resolution=64")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert re.fullmatch(r"step 10: loss \d\.\d{4}\n", done.stdout), done.stderr
    assert "Loading weights" not in done.stderr
    assert (tmp_path / "output/pytorch_lora_weights.safetensors").is_file()


def test_the_tutorials_own_loader_trains_a_ddpm(tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted((EXAMPLES / "butterflies").glob("*.jpg"))[:6]:
        shutil.copy(path, few)
    options = ("--data", few, "--resolution", 32, "--epochs", 1, "--num_inference_steps", 1)
    said = run("ddpm_butterflies.py", *map(str, options), "--output", "out", cwd=tmp_path)
    assert said.startswith("epoch 1 of 1: loss ")
    assert (tmp_path / "out/samples/0001.png").is_file()
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.unet.config["sample_size"] == 32
    assert isinstance(pipeline(num_inference_steps=1, output_type="pil").images[0], Image.Image)  # pyright: ignore[reportAttributeAccessIssue]


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    book = nbformat.read(NOTEBOOK, as_version=4)
    places = [place for place, cell in enumerate(book.cells) if "parameters" in cell.metadata.get("tags", [])]
    assert len(places) == 1
    book.cells.insert(places[0] + 1, nbformat.v4.new_code_cell(SMALL))
    NotebookClient(book, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    texts, pictures = outputs(book)
    assert "largest difference of a pixel, of 255: 0" in texts
    assert "the same metrics, step by step: True" in texts
    assert pictures >= 12
    assert (tmp_path / "output/lora/pytorch_lora_weights.safetensors").is_file()
    assert (tmp_path / "output/launched/result.json").is_file()


def test_the_notebook_is_stored_with_its_pictures() -> None:
    assert NOTEBOOK.stat().st_size < 1_500_000
    texts, pictures = outputs(nbformat.read(NOTEBOOK, as_version=4))
    assert "the same metrics, step by step: True" in texts
    assert pictures >= 12


def outputs(book: nbformat.NotebookNode) -> tuple[str, int]:
    """What the cells of a notebook printed, and how many pictures they show."""
    shown = [output for cell in book.cells for output in cell.get("outputs", [])]
    texts = "".join(output.text for output in shown if output.output_type == "stream")
    return texts, sum("image/png" in output.get("data", {}) for output in shown)
