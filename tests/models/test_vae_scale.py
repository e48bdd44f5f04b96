"""VAEs whose latents are scaled, shifted or padded otherwise."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from finetune.config import TrainConfig
from finetune.errors import UsageError
from finetune.models.encoders import VaeEncoder
from finetune.models.loading import load_model
from finetune.models.tiny import tiny_folder
from finetune.recipe import fine_tune

PIXELS = torch.linspace(-1, 1, 32 * 32).reshape(1, 1, 32, 32).expand(1, 3, 32, 32)
KEYS = torch.tensor([3])


def latents(encoder: Any) -> Tensor:
    return encoder.sample(encoder.encode(PIXELS), KEYS)


@pytest.mark.parametrize(
    ("scale", "shift"), [((0.5,), None), (None, (0.3,)), ((0.2, 0.4, 0.3, 0.1), (0.5, -1.0, 0.0, 2.0))]
)
def test_latents_are_shifted_and_scaled_and_decode_to_the_same_picture(
    scale: tuple[float, ...] | None, shift: tuple[float, ...] | None
) -> None:
    plain, model = load_model("tiny").encoder, load_model("tiny", vae_scale=scale, vae_shift=shift)
    assert isinstance(plain, VaeEncoder)
    encoder = model.encoder
    assert isinstance(encoder, VaeEncoder)
    assert encoder.scaling_factor == plain.scaling_factor
    unscaled = latents(plain) / plain.scaling_factor
    factors = torch.tensor(scale or (plain.scaling_factor,)).view(1, -1, 1, 1)
    expected = (unscaled - torch.tensor(shift or (0.0,)).view(1, -1, 1, 1)) * factors
    assert torch.allclose(latents(encoder), expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(encoder.decode(latents(encoder)), plain.decode(latents(plain)), rtol=0, atol=1e-4)
    assert encoder.fingerprint != plain.fingerprint


def test_the_export_of_a_run_decodes_as_it_was_trained(pictures: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        data=str(pictures), output_dir=str(tmp_path / "run"), max_train_steps=1, num_inference_steps=0, method="full",
        vae_scale=[0.7], vae_shift=[0.2], forgetting_prompts=0,
    )  # fmt: skip
    run = fine_tune(config)
    pipeline: Any = StableDiffusionPipeline.from_pretrained(run)
    trained = load_model("tiny", vae_scale=[0.7], vae_shift=[0.2]).encoder
    x0 = latents(trained)
    drawn = pipeline.vae.decode(x0 / pipeline.vae.config.scaling_factor).sample
    assert torch.allclose(drawn, trained.decode(x0), rtol=0, atol=1e-5)


def test_a_shift_in_the_config_of_a_vae_reaches_the_pictures_of_pipelines(tmp_path: Path) -> None:
    """Pipelines of Stable Diffusion apply none."""
    shutil.copytree(tiny_folder(), tmp_path / "shifted")
    path = tmp_path / "shifted/vae/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shift_factor": 0.3}))
    model, expected = load_model(tmp_path / "shifted"), load_model("tiny", vae_shift=[0.3])
    assert torch.equal(latents(model.encoder), latents(expected.encoder))
    pipeline: Any = model.pipeline()
    assert pipeline.vae.config.shift_factor is None


def test_a_vae_of_reflection_padding_is_read_from_its_config(tmp_path: Path) -> None:
    shutil.copytree(tiny_folder(), tmp_path / "reflecting")
    path = tmp_path / "reflecting/vae/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_mode": "reflect"}))
    encoder, plain = load_model(tmp_path / "reflecting").encoder, load_model("tiny").encoder
    assert isinstance(encoder, VaeEncoder)
    modes = {m.padding_mode for m in encoder.vae.modules() if isinstance(m, nn.Conv2d) and any(m.padding)}
    assert modes == {"reflect"}
    assert encoder.fingerprint != plain.fingerprint
    assert not torch.allclose(encoder.encode(PIXELS), plain.encode(PIXELS), rtol=0, atol=1e-3)
    given = load_model("tiny", vae_reflection_padding=True).encoder
    assert torch.equal(given.encode(PIXELS), encoder.encode(PIXELS))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_mode": "circular"}))
    with pytest.raises(UsageError, match="padding_mode of the VAE's config is circular: expected zeros or reflect"):
        load_model(tmp_path / "reflecting")


def test_another_number_of_scales_than_channels_is_refused() -> None:
    with pytest.raises(UsageError, match=r"vae_scale = \[0.1, 0.2\]: expected 1 number, or 4, one for each channel"):
        load_model("tiny", vae_scale=[0.1, 0.2])
