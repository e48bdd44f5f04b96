"""finetune-unet sample: sizes, LoRA files and pictures to begin with."""

from pathlib import Path

import numpy
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image, ImageDraw

from finetune.commands import sample
from finetune.config import TrainConfig
from finetune.errors import ModelError, UsageError
from finetune.models.loading import load_model
from finetune.models.lora import Adapter, add_lora
from finetune.recipe import fine_tune


def drawn(tmp_path: Path, prompt: str = "a red circle", model: str = "tiny", **options: object) -> Image.Image:
    """The one picture that a command draws."""
    output = tmp_path / f"drawn-{len(list(tmp_path.glob('drawn-*')))}"
    settings = {"num_inference_steps": 2, "output": str(output)} | options
    sample.run(sample.Options(model=model, prompt=(prompt,), **settings))
    (path,) = output.iterdir()
    return Image.open(path).convert("RGB")


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    model = load_model("tiny")
    add_lora(model.unet, rank=2)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.unet.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=noise))
    adapter = Adapter.attached_to(model.unet)
    assert adapter
    path = tmp_path / "dog.safetensors"
    adapter.save_kohya(path, {})
    return path


def test_a_picture_has_the_width_and_height_that_are_named(tmp_path: Path) -> None:
    assert drawn(tmp_path, width=96, height=64).size == (96, 64)
    assert drawn(tmp_path, height=32).size == (64, 32)


def test_a_lora_file_counts_by_its_strength(tmp_path: Path, lora: Path) -> None:
    base = drawn(tmp_path).tobytes()
    assert drawn(tmp_path, lora=(str(lora),), strength=(0.0,)).tobytes() == base
    half, twice = (drawn(tmp_path, lora=(str(lora),) * n, strength=(0.5,) * n).tobytes() for n in (1, 2))
    assert base != half != twice
    assert numpy.allclose(
        numpy.frombuffer(twice, numpy.uint8),
        numpy.frombuffer(drawn(tmp_path, lora=(str(lora),)).tobytes(), numpy.uint8),
        atol=1,
    )


def test_an_ordinary_model_begins_with_a_picture_as_its_pipeline_does(tmp_path: Path) -> None:
    picture = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(picture).ellipse((16, 16, 48, 48), fill="blue")
    picture.save(tmp_path / "blue.png")
    ours = drawn(tmp_path, image=str(tmp_path / "blue.png"), denoising_strength=0.5, num_inference_steps=4, seed=3)
    model = load_model("tiny")
    pipeline = StableDiffusionImg2ImgPipeline(**model.pipeline().components, requires_safety_checker=False)
    (theirs,) = pipeline(
        "a red circle", picture, strength=0.5, num_inference_steps=4, guidance_scale=model.family.guidance_scale,
        generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip
    assert ours.tobytes() == theirs.tobytes()


def test_a_picture_keeps_its_shape(tmp_path: Path) -> None:
    Image.new("RGB", (300, 150), "green").save(tmp_path / "wide.png")
    width, height = drawn(tmp_path, image=str(tmp_path / "wide.png")).size
    assert width > height


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 100}, "100: tiny takes multiples of 8 pixels"),
        ({"width": 64, "image": "a.png"}, "--width and --height cannot be used here: the image's own shape decides"),
        ({"strength": (1.0, 2.0), "lora": ("a",)}, "1 --lora and 2 --strength: give one for each"),
        ({"lora": ("nowhere.safetensors",)}, "--lora nowhere.safetensors: no such file"),
        ({"image": "a.png", "denoising_strength": 0.0}, "--denoising_strength 0: expected above 0, up to 1"),
        ({"image": "a.png", "denoising_strength": 0.1}, "--denoising_strength 0.1 needs 10 --num_inference_steps"),
        ({"mask": "a.png"}, "--mask cannot be used: it needs --image"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        drawn(tmp_path, **options)


def test_a_lora_of_another_model_is_named(tmp_path: Path, lora: Path) -> None:
    from safetensors.torch import load_file, save_file

    wider = {
        key: torch.cat([tensor, tensor], -1) if "lora_down" in key else tensor
        for key, tensor in load_file(lora).items()
    }
    save_file(wider, tmp_path / "wide.safetensors")
    with pytest.raises(ModelError, match=r"wide\.safetensors does not fit --model tiny"):
        drawn(tmp_path, lora=(str(tmp_path / "wide.safetensors"),))


def test_the_lora_of_a_run_has_a_strength(tmp_path: Path, pictures: Path) -> None:
    options = {"max_train_steps": 2, "rank": 2, "learning_rate": 0.02, "train_batch_size": 2, "num_inference_steps": 0}
    run = fine_tune(TrainConfig(model="tiny", data=(str(pictures),), output_dir=str(tmp_path / "run"), **options))
    base, whole = drawn(tmp_path).tobytes(), drawn(tmp_path, model=str(run)).tobytes()
    assert drawn(tmp_path, model=str(run), adapter_strength=0.0).tobytes() == base
    assert base != drawn(tmp_path, model=str(run), adapter_strength=0.5).tobytes() != whole
    with pytest.raises(UsageError, match="is not a run that trained a LoRA"):
        drawn(tmp_path, adapter_strength=0.5)
