import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from finetune.cli import main
from finetune.commands import preview, sample
from finetune.config import TrainConfig
from finetune.errors import ModelError, UsageError
from finetune.models.tiny import tiny_folder
from finetune.recipe import fine_tune


@pytest.fixture(autouse=True)
def global_generator_untouched() -> None:
    """Loading an adapter through diffusers draws from the global generator."""


@pytest.fixture(scope="module")
def lora_run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "out"
    return fine_tune(
        TrainConfig(
            data=str(pictures),
            output_dir=str(folder),
            max_train_steps=3,
            learning_rate=0.1,
            rank=4,
            num_inference_steps=0,
        )
    )


def test_sample_draws_what_a_plain_pipeline_draws(lora_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", "--model", str(lora_run), "--prompt", "a red disc", "--seed", "5", "--num_images", "2"]
    assert main([*words, "--num_inference_steps", "3"]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert paths == [lora_run / "samples/a-red-disc-5.png", lora_run / "samples/a-red-disc-6.png"]
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder())
    base = draw(pipeline, 6)
    pipeline.load_lora_weights(str(lora_run))
    picture = np.asarray(Image.open(paths[1]))
    assert np.array_equal(picture, draw(pipeline, 6))
    assert not np.array_equal(picture, base)


def draw(pipeline: StableDiffusionPipeline, seed: int) -> np.ndarray:
    source = torch.Generator().manual_seed(seed)
    return np.asarray(pipeline("a red disc", generator=source, num_inference_steps=3, guidance_scale=3).images[0])


def test_sample_draws_from_a_base_model_into_the_named_folder(tmp_path: Path) -> None:
    sample.run(sample.Options(model="tiny", prompt=("x", "y"), num_inference_steps=1, output=str(tmp_path / "out")))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["1-x-0.png", "2-y-0.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "tiny"}, "give --prompt"),
        ({"model": "ddpm"}, "ddpm is untrained"),
        ({"model": "tiny", "prompt": ("x",), "num_images": 0}, "--num_images 0: expected 1 or more"),
        ({"model": "tiny", "prompt": ("x",), "resolution": 66}, "the nearest: 64 and 72"),
        ({"model": "nowhere", "prompt": ("x",)}, "no such folder"),
        ({"model": "tiny", "prompt": ("x",), "mixed_precision": "fp16"}, "a CPU cannot"),
        ({"model": "tiny", "prompt": ("x",), "output": __file__ + "/out"}, "cannot be written"),
    ],
)
def test_sample_refuses_what_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sample.run(sample.Options(**options))


def test_an_unfinished_run_says_how_to_finish_it(lora_run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text((lora_run / "config.toml").read_text())
    with pytest.raises(UsageError, match="has not exported anything yet"):
        sample.run(sample.Options(model=str(tmp_path), prompt=("x",)))


def test_preview_shows_the_pixels_and_names_long_captions(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "sheet.png"
    words = ("--data", str(pictures), "--trigger", "x" * 70, "--output", str(sheet), "--max_pictures", "4")
    assert main(["preview", *words]) == 0
    said = capsys.readouterr().out
    assert "4 of 6 images, 3 sizes (72x56: 2, 48x80: 2, 64x64: 2)" in said
    assert "05.png: 82 tokens, of which the model reads 75" in said
    pixels = np.asarray(Image.open(sheet))
    assert pixels.shape == (8 + 192 + 4 * 14 + 8, 8 + 4 * 200, 3)
    assert (pixels[8 + 96, 8 + 96] == (255, 0, 0)).all()  # the disc in the middle of the first picture


def test_preview_shows_where_the_trigger_would_read_well(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pictures, tmp_path / "data")
    (tmp_path / "data/00.txt").write_text("a photo of a disc")
    preview.run(
        preview.Options(output=str(tmp_path / "sheet.png")), TrainConfig(data=str(tmp_path / "data"), trigger="sks")
    )
    where = "note: the trigger is put in front of 1 caption; to place it yourself: 'a photo of [trigger] disc'"
    assert where in capsys.readouterr().out.splitlines()


def test_preview_says_where_it_cannot_write(pictures: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere/sheet.png cannot be written"):
        preview.run(preview.Options(output="nowhere/sheet.png"), TrainConfig(data=str(pictures)))


def test_preview_is_not_written_among_the_pictures(pictures: Path) -> None:
    with pytest.raises(UsageError, match="lies inside --data"):
        preview.run(preview.Options(output=str(pictures / "sheet.png")), TrainConfig(data=str(pictures)))


def test_a_damaged_lora_is_told_in_one_line(lora_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(lora_run, tmp_path / "run")
    lora = run / "pytorch_lora_weights.safetensors"
    lora.write_bytes(lora.read_bytes()[:-10])
    with pytest.raises(ModelError, match=r"pytorch_lora_weights\.safetensors cannot be loaded: "):
        sample.run(sample.Options(model=str(run), prompt=("x",)))


def test_words_that_tiny_does_not_know_are_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = sample.Options(
        model="tiny", prompt=("a red zebra", "a zebra"), num_inference_steps=1, output=str(tmp_path)
    )
    sample.run(options)
    assert capsys.readouterr().err.count("tiny does not know, and spells: zebra\n") == 1
    sample.run(sample.Options(model="tiny", prompt=("a red circle",), num_inference_steps=1, output=str(tmp_path)))
    assert "does not know" not in capsys.readouterr().err


def test_sample_writes_over_nothing(lora_run: Path, tmp_path: Path) -> None:
    words = ["sample", "--model", str(lora_run), "--prompt", "a disc", "--num_inference_steps", "1"]
    for number in (1, 2, 3):
        assert main([*words, "--output", str(tmp_path)]) == 0
        assert len(list(tmp_path.glob("*.png"))) == number
    assert (tmp_path / "a-disc-0 (3).png").exists()
