"""Finding a model: by family, folder or hub id, and one clear line where there is none that can be trained."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects

from finetune.errors import ModelError, UsageError
from finetune.models.families import FAMILIES
from finetune.models.model_info import HUB_FILES, locate
from finetune.models.single_file import CLIP
from tests.hub_server import Hub, Repository, hub_environment
from tests.tiny_copy import copy_tiny

SD15_NEEDED = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]
SD15_OTHER = [
    ".gitattributes",
    "README.md",
    "feature_extractor/preprocessor_config.json",
    "safety_checker/config.json",
    "safety_checker/model.fp16.safetensors",
    "safety_checker/model.safetensors",
    "safety_checker/pytorch_model.bin",
    "safety_checker/pytorch_model.fp16.bin",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "text_encoder/pytorch_model.fp16.bin",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.bin",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "v1-5-pruned-emaonly.ckpt",
    "v1-5-pruned-emaonly.safetensors",
    "v1-5-pruned.ckpt",
    "v1-5-pruned.safetensors",
    "v1-inference.yaml",
    "vae/diffusion_pytorch_model.bin",
    "vae/diffusion_pytorch_model.fp16.bin",
    "vae/diffusion_pytorch_model.fp16.safetensors",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "whole"
    copy_tiny(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A model folder of one's own."""
    return shutil.copytree(whole, tmp_path / "model")


def change(path: Path, **entries: Any) -> None:
    """Set entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def refused(folder: Path) -> str:
    """The one line with which a model is refused."""
    with pytest.raises(ModelError) as caught:
        locate(str(folder))
    message = str(caught.value)
    assert message.startswith(f"--model {folder}: ")
    assert "\n" not in message
    return message


def test_an_unknown_name_is_answered_with_the_families_and_the_nearest():
    with pytest.raises(UsageError) as caught:
        locate("sd1.5")
    assert f"not one of {', '.join(FAMILIES)} or a hub id; did you mean sd15?" in str(caught.value)
    with pytest.raises(UsageError) as caught:
        locate("butterflies")
    assert "did you mean" not in str(caught.value)


def test_a_path_that_is_none_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in (str(tmp_path / "none"), "./none", "../none", "~/none", "/none", "a/b/c", "runs/none"):
        with pytest.raises(UsageError, match="no such folder, and not one of"):
            locate(name)


def test_a_folder_is_found_with_its_size(folder: Path):
    found = locate(str(folder))
    assert (found.folder, found.family.name) == (folder, "sd15")
    assert (found.resolution, found.multiple) == (64, 8)  # 16 latents of 4 pixels a side; pipelines take eights


def test_a_folder_below_home_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert locate("~/model").folder == folder


def test_the_unet_tells_the_family(folder: Path):
    change(folder / "unet/config.json", use_linear_projection=True, sample_size=[24, 32])
    found = locate(str(folder))
    assert (found.family.name, found.resolution) == ("sd21", 96)


def test_a_pixel_space_folder_needs_no_more_than_unet_and_scheduler(folder: Path):
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.rmtree(folder / part)
    config = {"_class_name": "UNet2DModel", "block_out_channels": [8, 8, 8], "sample_size": 32}
    (folder / "unet/config.json").write_text(json.dumps(config))
    found = locate(str(folder))
    assert (found.family.name, found.resolution, found.multiple) == ("ddpm", 32, 4)
    for part in ("scheduler/scheduler_config.json", "unet/diffusion_pytorch_model.safetensors"):
        (folder / part).unlink()
        assert f"part missing: {part}" in refused(folder)


@pytest.mark.parametrize(
    "part",
    [
        "unet/config.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer_config.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_a_missing_part_is_named(folder: Path, part: str):
    (folder / part).unlink()
    assert f"part missing: {part}" in refused(folder)


@pytest.mark.parametrize("part", ["tokenizer/vocab.json", "tokenizer/merges.txt"])
def test_a_tokenizer_without_its_words_is_refused(folder: Path, part: str):
    (folder / part).unlink()
    assert locate(str(folder))  # tokenizer.json holds both
    (folder / "tokenizer/tokenizer.json").unlink()
    assert f"part missing: {part}" in refused(folder)


def test_a_lora_is_not_taken_for_a_model(tmp_path: Path):
    assert "not a diffusers folder" in refused(tmp_path)
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    assert "give its base model" in refused(tmp_path)


def test_a_damaged_config_is_named(folder: Path):
    (folder / "unet/config.json").write_text('{"_class_name": ')
    with pytest.raises(ModelError, match=r"unet/config.json is not readable"):
        locate(str(folder))


def test_a_unet_of_another_kind_is_refused(folder: Path):
    change(folder / "unet/config.json", _class_name="UNet3DConditionModel")
    assert "only Stable Diffusion 1, 2 and XL and DDPM" in refused(folder)
    assert refused(folder).endswith("not UNet3DConditionModel")


def test_stable_diffusion_xl_needs_a_second_text_encoder_and_tokenizer(folder: Path):
    change(folder / "unet/config.json", addition_embed_type="text_time")
    assert "part missing: text_encoder_2/config.json" in refused(folder)
    shutil.copytree(folder / "text_encoder", folder / "text_encoder_2")
    assert "part missing: tokenizer_2/tokenizer_config.json" in refused(folder)
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
    assert locate(str(folder)).family.name == "sdxl"


def test_a_download_takes_what_is_used_and_no_more():
    assert list(filter_repo_objects(sorted(SD15_NEEDED + SD15_OTHER), allow_patterns=HUB_FILES)) == SD15_NEEDED


def test_a_download_takes_sharded_weights():
    stem = "unet/diffusion_pytorch_model"
    shards = [f"{stem}-00001-of-00002.safetensors", f"{stem}-00002-of-00002.safetensors"]
    wanted = [*shards, f"{stem}.safetensors.index.json"]
    others = [f"{stem}.fp16-00001-of-00002.safetensors", f"{stem}.safetensors.index.fp16.json", f"{stem}-00001.bin"]
    assert list(filter_repo_objects(wanted + others, allow_patterns=HUB_FILES)) == wanted


LOCATE = """
import sys
from finetune.errors import FinetuneError
from finetune.models.single_file import CLIP
from finetune.models.model_info import locate

for name in sys.argv[1:]:
    try:
        print(f"found {locate(name).family.name}")
    except FinetuneError as error:
        print(f"{type(error).__name__}: {error}")
assert "torch" not in sys.modules
"""
LOAD = """
import sys
import torch
import finetune

here, there = (finetune.load_model(name) for name in sys.argv[1:])
for mine, other in ((here.unet, there.unet), (here.encoder.vae, there.encoder.vae)):
    theirs = other.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.state_dict().items())
assert torch.equal(*(m.conditioner.encode(["a cat"])["encoder_hidden_states"] for m in (here, there)))
print("equal")
"""


def run_with_hub(code: str, url: str, home: Path, *names: str) -> list[str]:
    """The lines that Python code prints, run on `names` with the hub at `url` and its cache in `home`."""
    command = [sys.executable, "-c", code, *names]
    environment = hub_environment(url, home)
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def test_a_model_is_downloaded_once_and_loads_to_the_same_weights(whole: Path, tmp_path: Path):
    files = {path.relative_to(whole).as_posix(): path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    home = tmp_path / "home"
    with Hub() as hub:
        hub.repositories["someone/tiny"] = Repository(files=files | dict.fromkeys(SD15_OTHER, b""))
        assert run_with_hub(LOAD, hub.url, home, str(whole), "someone/tiny") == ["equal"]
        assert sorted(hub.downloads) == sorted(files)
        hub.downloads.clear()
        assert run_with_hub(LOCATE, hub.url, home, "someone/tiny") == ["found sd15"]
        assert hub.downloads == []
    assert run_with_hub(LOCATE, hub.url, home, "someone/tiny") == ["found sd15"]  # the hub is gone, the cache is not


def test_what_cannot_be_trained_is_refused_before_its_weights_are_downloaded(whole: Path, tmp_path: Path):
    config = json.loads((whole / "unet/config.json").read_text())
    video = {name: name.encode() for name in SD15_NEEDED}
    video["unet/config.json"] = json.dumps(config | {"_class_name": "UNet3DConditionModel"}).encode()
    with Hub() as hub:
        hub.repositories["someone/video"] = Repository(files=video)
        hub.repositories["someone/lora"] = Repository(files={"pytorch_lora_weights.safetensors": b""})
        metadata = run_with_hub(
            LOCATE, hub.url, tmp_path, "someone/video", "someone/lora", "someone/else", "some one/x"
        )
    assert metadata[0].startswith("ModelError: --model someone/video: only")
    assert metadata[0].endswith("not UNet3DConditionModel")
    assert metadata[1].startswith("ModelError: --model someone/lora: part missing: unet/config.json")
    assert metadata[2].startswith(
        "UsageError: --model someone/else: no such folder here and no such repository on the hub"
    )
    assert metadata[3].startswith("UsageError: --model some one/x: no such folder here and no such repository")
    assert len(metadata) == 4
    assert not [name for name in hub.downloads if name.endswith(".safetensors")]


def test_an_unreachable_hub_is_told_soon_with_the_way_out(tmp_path: Path):
    start = time.monotonic()
    metadata = run_with_hub(LOCATE, "http://127.0.0.1:9", tmp_path, "sd15", "someone/model")
    assert time.monotonic() - start < 20
    names = [FAMILIES["sd15"].hub_id, "someone/model"]
    for line, name in zip(metadata, names, strict=True):
        assert line.startswith(f"ModelError: --model {name}: the Hugging Face hub was not reachable")
        assert line.endswith("give a local diffusers folder instead: --model /path/to/folder")


def test_a_hub_that_breaks_off_is_told_in_one_line(tmp_path: Path):
    with Hub() as hub:
        hub.repositories["someone/model"] = Repository(files={"unet/config.json": b"{}"})
        hub.breaks_off = True
        (metadata,) = run_with_hub(LOCATE, hub.url, tmp_path, "someone/model")
    assert metadata.startswith("ModelError: --model someone/model: the Hugging Face hub was not reachable")


def test_layouts_of_a_single_file_are_those_that_there_are():
    layouts = {name: family.layout for name, family in FAMILIES.items()}
    assert layouts == {
        "sd15": "sd15", "sd21": "sd21", "sd21-base": "sd21", "sdxl": "sdxl", "ddpm": None, "tiny": None,
        "sd15-inpainting": "sd15", "sd21-inpainting": "sd21", "sdxl-inpainting": "sdxl",
    }  # fmt: skip
    assert {layout for layout in layouts.values() if layout} == CLIP.keys()
