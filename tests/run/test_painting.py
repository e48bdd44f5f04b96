"""Runs of inpainting models."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline
from PIL import Image, ImageDraw

from finetune.cli import main
from finetune.config import TrainConfig
from finetune.data.image_folder import ImageFolder
from finetune.errors import UsageError
from finetune.models.image_condition import ConditionImages
from finetune.models.loading import load_model
from finetune.models.model_info import locate
from finetune.models.tiny import tiny_folder
from finetune.recipe import fine_tune
from finetune.results.sampling import draw_pictures
from tests.tiny_inpainting import make_inpainting
from tests.tiny_sdxl import make_tiny_sdxl

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(autouse=True)
def global_generator_untouched() -> None:
    """Loading an adapter through diffusers draws from the global generator."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inpainting(tiny_folder(), tmp_path_factory.mktemp("model") / "inpainting")


@pytest.fixture(scope="module")
def data(make_pictures: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures, the first of which has a mask."""
    folder = make_pictures(tmp_path_factory.mktemp("data") / "discs")
    with Image.open(folder / "00.png") as picture:
        mask = Image.new("L", picture.size)
    ImageDraw.Draw(mask).rectangle((0, 0, 40, 64), fill="white")
    mask.save(folder / "00.mask.png")
    return folder


def config(model: Path, data: Path, out: Path, **options: object) -> TrainConfig:
    settings: dict[str, object] = {
        "model": str(model), "data": str(data), "prompt": "a red disc", "output_dir": str(out), "max_train_steps": 4,
        "train_batch_size": 2, "learning_rate": 0.01, "num_inference_steps": 2, "eval_batch_size": 1,
        "sample_prompts": ("a red disc",), "forgetting_prompts": 4, "random_flip": True, "checkpointing_steps": 2,
        "aspect_ratio_bucketing": False, "mixed_precision": "no",
    }  # fmt: skip
    return TrainConfig(**(settings | options))  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def run(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fine_tune(config(model, data, tmp_path_factory.mktemp("run") / "out", validation_fraction=0.4))


def painted(pipeline: DiffusionPipeline, picture: Image.Image, mask: Image.Image) -> np.ndarray:
    assert isinstance(pipeline, StableDiffusionInpaintPipeline | StableDiffusionXLInpaintPipeline)
    pipeline.set_progress_bar_config(disable=True)
    (drawn,) = pipeline(
        "a red disc", image=picture, mask_image=mask, strength=1.0, num_inference_steps=2, guidance_scale=3.0,
        height=picture.height, width=picture.width, generator=torch.Generator().manual_seed(5),
    ).images  # fmt: skip
    return np.asarray(drawn)


def test_the_lora_paints_in_diffusers_what_sample_paints(
    run: Path, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("image", "mask"):  # of a shape that the model can take, so that both see the same pixels
        whole = Image.open(data / ("00.png" if name == "image" else "00.mask.png")).resize((72, 56))
        whole.save(tmp_path / f"{name}.png")
    words = ["sample", "--model", str(run), "--prompt", "a red disc", "--seed", "5", "--num_inference_steps", "2"]
    pictures = ["--image", str(tmp_path / "image.png"), "--mask", str(tmp_path / "mask.png"), "--guidance_scale", "3"]
    assert main([*words, *pictures, "--output", str(tmp_path)]) == 0
    ours = np.asarray(Image.open(capsys.readouterr().out.strip()))
    assert ours.shape == (56, 72, 3)
    pipeline = DiffusionPipeline.from_pretrained(model)
    hole = Image.open(tmp_path / "image.png"), Image.open(tmp_path / "mask.png")
    base = painted(pipeline, *hole)
    pipeline.load_lora_weights(str(run))
    assert np.array_equal(ours, painted(pipeline, *hole))
    assert not np.array_equal(ours, base)


def test_grids_paint_the_hole_of_the_first_picture(run: Path, model: Path, data: Path) -> None:
    with Image.open(run / "samples/step-0.png") as sheet:
        first = sheet.crop([int(side) for side in sheet.info["first"].split()])
    pictures, loaded = ImageFolder(data, "a red disc", resolution=64), load_model(model)
    middle = Image.fromarray(np.pad(np.full((32, 32), 255, np.uint8), 16))
    drawn = []
    for index in range(6):
        image, mask = pictures[index].image, pictures.companion(index, "mask")
        placed = pictures.sample(index).crop(0)
        own = middle if mask is None else Image.fromarray(placed.pixels(mask)[0].numpy())
        shown = ConditionImages(Image.fromarray(placed.pixels(image).permute(1, 2, 0).numpy()), own)
        drawn += draw_pictures(loaded, ["a red disc"], [0], resolution=64, num_inference_steps=2, condition=shown)[0]
    trained = [number for number, picture in enumerate(drawn) if np.array_equal(picture.resize(first.size, 0), first)]
    assert trained in ([0], [1], [2])  # not those that are held out, of which there are two


def test_validation_and_forgetting_are_measured(run: Path) -> None:
    validation = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in validation][::3] == [0]
    forgetting = [json.loads(line) for line in (run / "forgetting.jsonl").read_text().splitlines()]
    assert forgetting[-1]["forgetting"] > 0
    assert not (run / "copies.jsonl").exists()  # most of a painted picture is a training picture


def test_a_run_that_is_resumed_equals_one_that_went_through(run: Path, model: Path, data: Path, tmp_path: Path) -> None:
    first = config(model, data, tmp_path / "out", validation_fraction=0.4, max_train_steps=2, lr_warmup_steps=0)
    fine_tune(first)
    more = config(model, data, tmp_path / "out", validation_fraction=0.4, resume_from_checkpoint="latest")
    assert (fine_tune(more) / LORA).read_bytes() == (run / LORA).read_bytes()


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_full_training_exports_a_pipeline_that_paints(
    family: str, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if family == "sdxl":
        model = make_inpainting(make_tiny_sdxl(tmp_path / "base"), tmp_path / "xl")
    assert locate(str(model)).family.name == f"{family}-inpainting"
    options = {"method": "full", "learning_rate": 1e-4, "live_encoding": True, "sample_prompts": ()}
    out = fine_tune(config(model, data, tmp_path / "out", **options, num_inference_steps=0, forgetting_prompts=0))
    told = capsys.readouterr().out
    assert "Masks        1, for other images random, another at each visit; the model paints white areas" in told
    pipeline = DiffusionPipeline.from_pretrained(out)
    picture, mask = (Image.open(data / name).resize((64, 64)) for name in ("00.png", "00.mask.png"))
    ours = draw_pictures(
        load_model(out), ["a red disc"], [5], resolution=64, num_inference_steps=2, guidance_scale=3.0,
        condition=ConditionImages(picture, mask),
    )[0][0]  # fmt: skip
    assert np.array_equal(np.asarray(ours), painted(pipeline, picture, mask))


def test_class_pictures_are_remembered_as_the_base_answers_to_them(model: Path, data: Path, tmp_path: Path) -> None:
    options = {"class_data": str(tmp_path / "class"), "class_prompt": "a disc", "num_class_images": 2}
    out = fine_tune(config(model, data, tmp_path / "out", **options, prior_prediction=True, num_inference_steps=1))
    assert len(list((tmp_path / "class").iterdir())) == 2  # drawn by the model, all of them painted
    assert json.loads((out / "ledger.json").read_text())["trained"] == 8


def test_what_makes_no_sense_is_told(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"masked_loss cannot be used with .*: masks say where it paints"):
        fine_tune(config(model, data, tmp_path / "out", masked_loss=True))
    picture = str(data / "00.png")
    assert main(["sample", "--model", str(model), "--prompt", "x", "--image", picture]) == 2
    assert main(["sample", "--model", "tiny", "--prompt", "x", "--image", picture, "--mask", picture]) == 2
