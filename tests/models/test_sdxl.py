"""Stable Diffusion XL from the folder to the export, on the smallest one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from finetune.cache.encode import encode
from finetune.commands import sample
from finetune.config import TrainConfig, load_resolved
from finetune.data.image_folder import ImageFolder
from finetune.data.loader import batches
from finetune.errors import ModelError
from finetune.models.families import FAMILIES
from finetune.models.loading import load_model
from finetune.models.model_info import ModelInfo, locate
from finetune.recipe import fine_tune
from finetune.results.sampling import draw_pictures
from finetune.run.resolve_config import resolve
from tests.tiny_sdxl import make_tiny_sdxl


@pytest.fixture(autouse=True)
def global_generator_untouched() -> None:
    """Whole runs go through diffusers pipelines, which may draw from torch's global generator."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sdxl(tmp_path_factory.mktemp("models") / "xl")


def plain(folder: Path) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_it_is_known_by_its_config_and_made_of_seven_parts(folder: Path, tmp_path: Path) -> None:
    found = locate(str(folder))
    assert (found.family.name, found.resolution) == ("sdxl", 64)
    (tmp_path / "broken").mkdir()
    for part in folder.iterdir():
        if part.name != "text_encoder_2":
            (tmp_path / "broken" / part.name).symlink_to(part)
    with pytest.raises(ModelError, match=r"part missing: text_encoder_2/config\.json"):
        locate(str(tmp_path / "broken"))


def test_defaults_are_those_of_a_large_model() -> None:
    found = ModelInfo("sdxl", FAMILIES["sdxl"], folder=Path("somewhere"), resolution=1024, multiple=8)
    for method, rate in (("lora", 1e-4), ("full", 1e-6)):
        config = resolve(
            TrainConfig(model="sdxl", method=method), found, pictures=12, varied_captions=True,
            device=torch.device("cpu"),
        )  # fmt: skip
        given = config.train_batch_size, config.gradient_accumulation_steps, config.learning_rate, config.rank
        assert given == (1, 4, rate, 16)
        assert (config.resolution, config.max_train_steps) == (1024, 375)


def test_prompts_are_encoded_as_its_pipeline_encodes_them(folder: Path) -> None:
    conditioner = load_model(folder).conditioner
    expected = plain(folder).encode_prompt("a red circle", device="cpu", do_classifier_free_guidance=True)
    arguments = conditioner.pipeline_arguments("a red circle", "")
    names = "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"
    for name, tensor in zip(names, expected, strict=True):
        assert torch.equal(arguments[name], tensor)
    assert not arguments["negative_prompt_embeds"].any()
    assert conditioner.pipeline_arguments("a", "b")["negative_prompt_embeds"].any()


def test_long_captions_are_read_in_chunks_and_pooled_from_the_first(folder: Path) -> None:
    short, long = (load_model(folder, max_token_length=length).conditioner for length in (77, 150))
    caption = "a red circle " * 40
    states = long.encode([caption])
    assert states["encoder_hidden_states"].shape == (1, 152, 64)
    assert torch.equal(states["text_embeds"], short.encode([caption])["text_embeds"])
    assert torch.allclose(
        states["encoder_hidden_states"][:, :76], short.encode([caption])["encoder_hidden_states"][:, :76]
    )


def test_the_unet_is_told_size_and_crop_of_each_picture(folder: Path, pictures: Path) -> None:
    model = load_model(folder)
    encoded = encode(ImageFolder(pictures, resolution=64), model)
    (batch,) = batches(encoded, batch_size=6, steps=1)
    added = batch.cond["added_cond_kwargs"]
    assert torch.equal(added["time_ids"], batch.time_ids.float())
    assert added["time_ids"][batch.ids.index("00.png")].tolist() == [64, 80, 0, 8, 64, 64]  # height before width
    assert added["text_embeds"].shape == (6, 32)
    part = next(batch.split(2))
    assert len(part.cond["added_cond_kwargs"]["time_ids"]) == 2


def test_pictures_equal_a_plain_pipeline_call(folder: Path) -> None:
    ((drawn,),) = draw_pictures(
        load_model(folder), ["a red circle"], [3], resolution=64, num_inference_steps=3, guidance_scale=5.0
    )
    expected = plain(folder)(
        "a red circle", generator=torch.Generator().manual_seed(3), num_inference_steps=3, guidance_scale=5.0,
        height=64, width=64,
    ).images[0]  # fmt: skip
    assert np.array_equal(np.asarray(drawn), np.asarray(expected))


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_it_trains_resumes_samples_and_exports(folder: Path, pictures: Path, tmp_path: Path, method: str) -> None:
    more = {"rank": 4, "lora_alpha": 2} if method == "lora" else {}
    config = TrainConfig(
        model=str(folder), data=str(pictures), output_dir=str(tmp_path / "xl-run"), method=method, max_train_steps=2,
        checkpointing_steps=1, checkpoints_total_limit=0, learning_rate=0.01, num_inference_steps=0,
        lr_scheduler="constant", **more,
    )  # fmt: skip
    out = fine_tune(config)
    assert load_resolved(out / "config.toml").global_batch == 4
    export = out / ("xl-run.safetensors" if method == "lora" else "unet/diffusion_pytorch_model.safetensors")
    first = export.read_bytes()
    fine_tune(TrainConfig(resume_from_checkpoint=str(out / "checkpoint-1"), data=str(pictures)))
    assert export.read_bytes() == first
    sample.run(sample.Options(model=str(out), prompt=("a red disc",), num_inference_steps=3))
    drawn = np.asarray(Image.open(out / "samples/a-red-disc-0.png"))

    def draw(pipeline: StableDiffusionXLPipeline) -> np.ndarray:
        source = torch.Generator().manual_seed(0)
        picture = pipeline("a red disc", generator=source, num_inference_steps=3, height=64, width=64).images[0]
        return np.asarray(picture)

    pipeline = plain(folder if method == "lora" else out)
    if method == "lora":
        assert not np.array_equal(drawn, draw(pipeline))
        pipeline.load_lora_weights(export)
    assert np.array_equal(drawn, draw(pipeline))
