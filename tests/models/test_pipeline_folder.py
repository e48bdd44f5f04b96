from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

from finetune.models.loading import load_model
from finetune.models.pipeline_folder import variant_name
from finetune.models.tiny import tiny_folder
from finetune.results.export_formats import write_format
from tests.small_models import write_single_file

TOKENIZER = str(tiny_folder() / "tokenizer")


@pytest.mark.parametrize("one_file", [True, False], ids=["from one file", "from a folder"])
def test_a_folder_of_the_variant_fp16(one_file: bool, tmp_path: Path) -> None:
    base = write_single_file(tmp_path / "base.safetensors", "sd15") if one_file else tiny_folder()
    model = load_model(base, tokenizer=TOKENIZER if one_file else None)
    to = tmp_path / "half"
    assert write_format(model, to, "diffusers", "fp16", {}, variant="fp16") < 1e-2
    weights = {path.relative_to(to).as_posix() for path in to.rglob("*.safetensors")}
    stems = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
    assert weights == {f"{part}/{stem}.fp16.safetensors" for part, stem in stems.items()}
    with pytest.raises(OSError, match="no file named"):
        StableDiffusionPipeline.from_pretrained(to)
    assert StableDiffusionPipeline.from_pretrained(to, variant="fp16").unet.conv_in.weight.isfinite().all()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("config.json", "config.json"),
        ("model.safetensors", "model.fp16.safetensors"),
        ("model-00001-of-00002.safetensors", "model.fp16-00001-of-00002.safetensors"),
        ("model.safetensors.index.json", "model.safetensors.index.fp16.json"),
    ],
)
def test_files_of_a_variant_are_named_as_libraries_look_for_them(name: str, expected: str) -> None:
    assert variant_name(name, "fp16") == expected
    assert variant_name(name, None) == name
