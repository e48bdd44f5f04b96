"""The LoRA file for ComfyUI, A1111 and Forge: its proof, and what it says of itself."""

import base64
import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.commands import sample
from finetune.config import TrainConfig, replace
from finetune.errors import ModelError, RunError, UsageError
from finetune.models.loading import DiffusionModel, load_model
from finetune.models.lora import Adapter, add_lora, trainable
from finetune.models.tiny import tiny_folder
from finetune.recipe import fine_tune
from finetune.results.export import export, kohya_files
from finetune.results.lora_metadata import LoraFacts, short_hash
from finetune.results.verify import verify_kohya

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "conv1", "conv2", "proj_in")


@pytest.fixture(autouse=True)
def global_generator_untouched() -> None:
    """Loading an adapter through diffusers draws from the global generator."""


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    """Alpha 3 on rank 4, attention and convolutions, weights far from zero."""
    model = load_model("tiny")
    add_lora(model.unet, rank=4, alpha=3, target_modules=TARGETS)
    source = torch.Generator().manual_seed(1)
    for parameter in trainable(model.unet):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=source)
    return model


def answer(unet) -> Tensor:
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return unet.eval()(x, 500, encoder_hidden_states=torch.ones(1, 77, 96)).sample


def test_an_export_holds_the_lora_in_both_layouts(model: DiffusionModel, tmp_path: Path) -> None:
    export(model, tmp_path / "discs")
    assert {path.name for path in (tmp_path / "discs").iterdir()} == {
        "pytorch_lora_weights.safetensors",
        "discs.safetensors",
    }
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder())
    pipeline.load_lora_weights(tmp_path / "discs/discs.safetensors")
    assert torch.allclose(answer(pipeline.unet), answer(model.unet), rtol=0, atol=1e-5)
    chosen = StableDiffusionPipeline.from_pretrained(tiny_folder())
    chosen.load_lora_weights(tmp_path / "discs")  # the folder alone still means diffusers' own
    assert torch.allclose(answer(chosen.unet), answer(pipeline.unet), rtol=0, atol=1e-5)


def test_the_first_and_last_convolution_are_proved_whatever_diffusers_calls_them(tmp_path: Path) -> None:
    model = load_model("tiny")
    add_lora(model.unet, rank=4, alpha=3, target_modules=("to_q", "conv_in", "conv_out"))
    for parameter in trainable(model.unet):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    assert export(model, tmp_path / "ends") < 1e-5


def planted(fault: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    key = next(key for key in tensors if key.endswith("to_q.lora_down.weight"))
    if fault == "alpha dropped":
        return {name: tensor for name, tensor in tensors.items() if name != key.replace("lora_down.weight", "alpha")}
    if fault == "matrix transposed":
        return tensors | {key: tensors[key].T.contiguous()}
    if fault == "key renamed":
        return {name.replace("attn1_to_q.lora_down", "attn1_to_w.lora_down"): t for name, t in tensors.items()}
    if fault == "block missing":
        return {name: tensor for name, tensor in tensors.items() if "mid_block" not in name}
    if fault == "one value off":
        return tensors | {key: tensors[key] + 1e-7}
    return {name: (tensor * 1e5).half().float() for name, tensor in tensors.items()}  # fp16 overflows


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("alpha dropped", r"1 weights differ: .*to_q\.alpha"),
        ("matrix transposed", "1 weights differ: .*to_q"),
        ("key renamed", "no LoRA tensor for this UNet"),
        ("block missing", "mid_block"),
        ("one value off", "1 weights differ: .*to_q"),
        ("fp16 overflow", "is not finite"),
    ],
)
def test_the_proof_fails_on_planted_faults(model: DiffusionModel, tmp_path: Path, fault: str, message: str) -> None:
    adapter = Adapter.attached_to(model.unet)
    assert adapter is not None
    path = tmp_path / "lora.safetensors"
    adapter.save_kohya(path, {})
    assert verify_kohya(model, path) < 1e-5
    save_file(planted(fault, load_file(path)), path)
    with pytest.raises((RunError, ModelError), match=message):
        verify_kohya(model, path)
    assert list(model.unet.peft_config) == ["default"]


def metadata(path: Path) -> Mapping[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


FACTS = LoraFacts(
    model="sd15", family="sd15", prediction_type="epsilon", resolution=512, batch_size=4, epoch_steps=2.5,
    learning_rate=1e-4, optimizer="adamw", lr_scheduler="constant", seed=0, trigger="sks", data="dogs",
    captions=["sks dog, grass", "sks dog, snow, grass"],
)  # fmt: skip


def test_a_file_says_what_viewers_show(model: DiffusionModel, tmp_path: Path) -> None:
    export(model, tmp_path / "dogs", FACTS.metadata("dogs", step=10))
    written = metadata(tmp_path / "dogs/dogs.safetensors")
    expected = {
        "ss_network_module": "networks.lora", "ss_network_dim": "4", "ss_network_alpha": "3",
        "ss_base_model_version": "sd_v1", "ss_v2": "False", "ss_output_name": "dogs", "ss_steps": "10",
        "ss_epoch": "4", "ss_learning_rate": "0.0001", "ss_resolution": "(512, 512)", "ss_sd_model_name": "sd15",
        "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.prediction_type": "epsilon", "modelspec.trigger_phrase": "sks", "modelspec.title": "dogs",
        "modelspec.resolution": "512x512",
    }  # fmt: skip
    assert {name: written[name] for name in expected} == expected
    assert json.loads(written["ss_tag_frequency"]) == {"dogs": {"sks dog": 2, "grass": 2, "snow": 1}}
    assert written["modelspec.hash_sha256"] == f"0x{written['sshs_model_hash']}"
    assert all(isinstance(value, str) for value in written.values())
    assert FACTS.metadata("x", 1).keys() == {*written} - {
        name for name in written if "network" in name or "hash" in name
    }


def test_a_file_says_how_its_images_were_shown() -> None:
    """As sd-scripts: width before height, and "None" for no clip skip."""
    assert FACTS.metadata("x", 1)["ss_clip_skip"] == "None"
    shown = {"sizes": [(64, 96), (64, 64), (64, 96)], "repeats": 3, "clip_skip": 2}
    metadata = LoraFacts(**{**vars(FACTS), **shown}).metadata("x", 1)
    assert metadata["ss_clip_skip"] == "2"
    assert json.loads(metadata["ss_dataset_dirs"]) == {"dogs": {"n_repeats": 3, "img_count": len(FACTS.captions)}}
    assert json.loads(metadata["ss_bucket_info"]) == {
        "buckets": {"0": {"resolution": [64, 64], "count": 1}, "1": {"resolution": [96, 64], "count": 2}}
    }


def test_a_file_shows_what_it_draws_and_which_file_it_learned_on(tmp_path: Path) -> None:
    base = tmp_path / "base.safetensors"
    base.write_bytes(bytes(2**20) + b"x" * 2**16 + b"beyond")
    shown = {"model_hash": short_hash(base), "thumbnail": Image.new("RGB", (512, 384), "red")}
    metadata = LoraFacts(**{**vars(FACTS), **shown}).metadata("x", 1)
    assert metadata["ss_sd_model_hash"] == hashlib.sha256(b"x" * 2**16).hexdigest()[:8]
    kind, _, content = metadata["modelspec.thumbnail"].partition(",")
    assert kind == "data:image/jpeg;base64"
    picture = Image.open(io.BytesIO(base64.b64decode(content)))
    assert (picture.format, picture.size) == ("JPEG", (256, 192))
    assert picture.getpixel((100, 100)) == pytest.approx((254, 0, 0), abs=2)


@pytest.mark.parametrize(
    ("prediction_type", "version", "architecture"),
    [
        ("epsilon", "sd_v2_base", "stable-diffusion-v2-512/lora"),
        ("v_prediction", "sd_v2_v", "stable-diffusion-v2-768-v/lora"),
    ],
)
def test_stable_diffusion_2_is_told_by_what_it_predicts(prediction_type: str, version: str, architecture: str) -> None:
    metadata = LoraFacts(**{**vars(FACTS), "family": "sd21", "prediction_type": prediction_type}).metadata("x", 1)
    assert (metadata["ss_base_model_version"], metadata["modelspec.architecture"]) == (version, architecture)
    assert metadata["ss_v2"] == "True"


def test_a_run_leaves_a_file_at_each_checkpoint_and_its_pictures_are_those_of_sample(
    pictures: Path, tmp_path: Path, make_pictures: Callable[..., Path]
) -> None:
    config = TrainConfig(
        data=str(pictures), output_dir=str(tmp_path / "out"), max_train_steps=6, checkpointing_steps=2, rank=4,
        lora_alpha=3, learning_rate=0.05, lora_target_modules=["to_q", "to_v", "conv1"], num_inference_steps=0,
        use_ema=True, checkpoints_total_limit=0,
    )  # fmt: skip
    out = fine_tune(config)
    assert [(step, path.name) for step, path in kohya_files(out)] == [
        (2, "out-000002.safetensors"),
        (4, "out-000004.safetensors"),
        (None, "out.safetensors"),
    ]
    written = metadata(out / "out-000004.safetensors")
    assert (written["ss_steps"], written["ss_output_name"], written["ss_network_alpha"]) == ("4", "out-000004", "3")
    buckets = json.loads(written["ss_bucket_info"])["buckets"].values()
    assert sum(bucket["count"] for bucket in buckets) == int(written["ss_num_train_images"])
    sample.run(sample.Options(model=str(out), prompt=("a red disc",), num_inference_steps=3))
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder())
    pipeline.load_lora_weights(out / "out.safetensors")
    source = torch.Generator().manual_seed(0)
    drawn = pipeline("a red disc", generator=source, num_inference_steps=3, guidance_scale=3).images[0]
    assert np.array_equal(np.asarray(drawn), np.asarray(Image.open(out / "samples/a-red-disc-0.png")))
    first = (out / "out.safetensors").read_bytes()
    cut = fine_tune(replace(config, resume_from_checkpoint=str(out / "checkpoint-2"), output_dir=None))
    assert cut == out
    assert (out / "out.safetensors").read_bytes() == first
    again = fine_tune(replace(config, seed=1, overwrite_output_dir=True, checkpointing_steps=0))
    assert [path.name for _, path in kohya_files(again)] == ["out.safetensors"]


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_a_run_goes_on_from_a_lora_file_whatever_its_alpha(
    model: DiffusionModel, pictures: Path, tmp_path: Path, layout: str
) -> None:
    export(model, tmp_path / "first")
    file = tmp_path / "first" / ("first.safetensors" if layout == "kohya" else "pytorch_lora_weights.safetensors")
    other = load_model("tiny")
    add_lora(other.unet, rank=4, alpha=8, target_modules=TARGETS)
    assert Adapter(other.unet).init_from(file) == 0
    assert torch.allclose(answer(other.unet), answer(model.unet), rtol=0, atol=1e-5)
    config = TrainConfig(
        data=str(pictures), output_dir=str(tmp_path / "out"), max_train_steps=1, rank=4, init_lora=str(file),
        lora_target_modules=TARGETS, num_inference_steps=0, learning_rate=1e-12, use_ema=False, lora_alpha=3,
    )  # fmt: skip
    out = fine_tune(config)
    begun, ended = load_file(tmp_path / "first/first.safetensors"), load_file(out / "out.safetensors")
    assert begun.keys() == ended.keys()
    assert all(torch.allclose(tensor, ended[name], atol=1e-6) for name, tensor in begun.items())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rank": 8}, UsageError, r"lora_A.weight is \(4, .* there and \(8, .* here; give its --rank"),
        ({"more": {"lora_te_x.alpha": torch.ones(1)}}, None, "1 tensor for text encoders"),
        ({"more": {"unet.conv_in.lora_A.weight": torch.ones(1)}}, ModelError, "mixes two layouts"),
        ({"more": {"lora_unet_nope.alpha": torch.ones(1)}}, ModelError, "lora_unet_nope.alpha: no LoRA tensor"),
        ({"more": {"lora_unet_conv_in.alpha": torch.tensor(float("nan"))}}, ModelError, "is not finite"),
    ],
)
def test_a_lora_file_that_does_not_fit_is_told(
    model: DiffusionModel, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict,
    error: type | None, message: str,
) -> None:  # fmt: skip
    adapter = Adapter.attached_to(model.unet)
    assert adapter is not None
    file = tmp_path / "lora.safetensors"
    adapter.save_kohya(file, {})
    save_file(load_file(file) | change.get("more", {}), file)
    config = TrainConfig(
        data=str(pictures), output_dir=str(tmp_path / "out"), max_train_steps=1, rank=change.get("rank", 4),
        init_lora=str(file), lora_target_modules=TARGETS, num_inference_steps=0,
    )  # fmt: skip
    if error is None:
        fine_tune(config)
        assert message in capsys.readouterr().out
    else:
        with pytest.raises(error, match=message):
            fine_tune(config)
