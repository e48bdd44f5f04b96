"""Checkpoints in one file: what they are, and that they load to the same weights as their folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file, save_file

from finetune.cli import main
from finetune.config import TrainConfig
from finetune.errors import ModelError, UsageError
from finetune.models import clip_tokenizer as tokenizer_module
from finetune.models.clip_tokenizer import clip_tokenizer
from finetune.models.ldm_file import checkpoint_tensors
from finetune.models.loading import load_model
from finetune.models.lora import add_lora, trainable
from finetune.models.model_info import locate
from finetune.models.single_file import inspect, read_header
from finetune.models.tiny import tiny_folder
from finetune.recipe import fine_tune
from finetune.results.export_formats import write_format
from tests.small_models import RELATIVES, small_pipeline, write_single_file

TOKENIZER = str(tiny_folder() / "tokenizer")
FAMILIES = ["sd15", "sd21", "sdxl"]


@pytest.fixture(autouse=True)
def global_generator_untouched() -> None:
    """Modules that diffusers and transformers make draw first values from torch's global generator."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {family: write_single_file(folder / f"{family}.safetensors", family) for family in FAMILIES}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_loads_to_the_weights_and_configs_of_its_folder(files: dict[str, Path], family: str) -> None:
    expected, loaded = small_pipeline(family), load_model(files[family], tokenizer=TOKENIZER).pipeline()
    for part in ("unet", "vae", "text_encoder", *(["text_encoder_2"] if family == "sdxl" else [])):
        ours, theirs = getattr(loaded, part), getattr(expected, part)
        assert equal(ours.state_dict(), theirs.state_dict()), part
    for part, names in {
        "unet": ("attention_head_dim", "sample_size", "transformer_layers_per_block", "use_linear_projection"),
        "vae": ("scaling_factor", "block_out_channels", "norm_num_groups"),
        "scheduler": ("prediction_type", "beta_start", "timestep_spacing", "_class_name"),
    }.items():
        ours, theirs = getattr(loaded, part).config, getattr(expected, part).config
        for name in names:
            values = [list(v) if isinstance(v, tuple) else v for v in (ours.get(name), theirs.get(name))]
            assert values[0] == values[1], name
    assert loaded.text_encoder.config.hidden_act == expected.text_encoder.config.hidden_act


@pytest.mark.parametrize("family", FAMILIES)
def test_the_keys_are_those_that_diffusers_own_converter_reads(files: dict[str, Path], family: str) -> None:
    expected, tensors = small_pipeline(family), load_file(files[family])
    unet = dict(expected.unet.config) | {"class_embed_type": None}
    assert equal(convert_ldm_unet_checkpoint(dict(tensors), unet), expected.unet.state_dict())
    assert equal(convert_ldm_vae_checkpoint(dict(tensors), dict(expected.vae.config)), expected.vae.state_dict())
    if family == "sdxl":
        converted = convert_open_clip_checkpoint(
            expected.text_encoder_2, dict(tensors), "conditioner.embedders.1.model."
        )
        found = {name.removeprefix("text_model."): tensor for name, tensor in converted.items()}
        for name, tensor in expected.text_encoder_2.state_dict().items():
            assert torch.equal(found[name.removeprefix("text_model.")], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_file_to_model_to_file_is_equal_to_the_bit(files: dict[str, Path], family: str) -> None:
    again = dict(checkpoint_tensors(load_model(files[family], tokenizer=TOKENIZER).pipeline(), family))
    before = load_file(files[family])
    assert equal(again, before)
    blocks = {
        name.split("resblocks.")[1].split(".")[0]
        for name in before
        if "cond_stage_model.model" in name and "resb" in name
    }
    assert blocks == ({"0", "1", "2", "3"} if family == "sd21" else set())  # of a text encoder with 3 in its folder


@pytest.mark.parametrize("relative", RELATIVES)
def test_relatives_are_known_by_their_blocks_and_inputs(tmp_path: Path, relative: str) -> None:
    family, blocks = RELATIVES[relative]
    pipeline = small_pipeline(family, **blocks)
    path = write_single_file(tmp_path / "a.safetensors", family, pipeline)
    model = load_model(path, tokenizer=TOKENIZER)
    ours, theirs = model.unet.config, pipeline.unet.config
    for name in ("block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "mid_block_type"):
        assert str(ours[name]).translate(str.maketrans("()", "[]")) == str(theirs[name]).translate(
            str.maketrans("()", "[]")
        )
    assert equal(model.unet.state_dict(), pipeline.unet.state_dict())
    assert (model.image_condition is not None) == ("inpainting" in relative)
    x, cond = (
        torch.ones(1, theirs["in_channels"], 16, 16),
        {"encoder_hidden_states": torch.ones(1, 77, theirs["cross_attention_dim"])},
    )
    if family == "sdxl":
        cond["added_cond_kwargs"] = {"text_embeds": torch.ones(1, 64), "time_ids": torch.ones(1, 6)}
    with torch.no_grad():
        assert torch.equal(model.unet(x, 5, **cond).sample, pipeline.unet.eval()(x, 5, **cond).sample)
    add_lora(model.unet, rank=2, alpha=1)
    for parameter in trainable(model.unet):
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    assert write_format(model, tmp_path / "lora.safetensors", "kohya", precision="fp32", metadata={}) < 1e-5
    assert write_format(model, tmp_path / "merged.safetensors", "single-file", precision="fp32", metadata={}) < 1e-5


def test_a_unet_of_other_blocks_is_told(files: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(files["sd15"])
    save_file({name: t for name, t in tensors.items() if "input_blocks.5.1." not in name}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=r"its UNet is of no block layout that is known: .*down=\[\[1, 1\], \[1, 0\]"):
        inspect(tmp_path / "a.safetensors")


def test_a_file_in_half_precision_loads_and_frozen_parts_are_fp32(files: dict[str, Path], tmp_path: Path) -> None:
    tensors = {name: tensor.half() for name, tensor in load_file(files["sd15"]).items()}
    save_file(tensors, tmp_path / "half.safetensors")
    model = load_model(tmp_path / "half.safetensors", tokenizer=TOKENIZER, dtype=torch.bfloat16)
    pipeline: Any = model.pipeline()
    assert {p.dtype for p in model.unet.parameters()} == {torch.bfloat16}
    frozen = [*pipeline.vae.parameters(), *pipeline.text_encoder.parameters()]
    assert {p.dtype for p in frozen} == {torch.float32}


def test_marks_say_what_an_xl_checkpoint_predicts(tmp_path: Path) -> None:
    pipeline = small_pipeline("sdxl")
    mark = torch.empty(0)
    path = write_single_file(tmp_path / "v.safetensors", "sdxl", pipeline, v_pred=mark, ztsnr=mark)
    scheduler = inspect(path).configs["scheduler"]
    assert scheduler["prediction_type"] == "v_prediction"
    assert (scheduler["rescale_betas_zero_snr"], scheduler["timestep_spacing"]) == (True, "trailing")
    model = load_model(path, tokenizer=TOKENIZER)
    assert model.scheduler.alphas_cumprod[-1] == 0
    plain = inspect(write_single_file(tmp_path / "plain.safetensors", "sdxl", pipeline))
    assert (plain.prediction_type, plain.configs["scheduler"]["timestep_spacing"]) == ("epsilon", "leading")


@pytest.mark.parametrize(("spread", "predicts", "resolution"), [(0.01, "epsilon", 512), (0.2, "v_prediction", 768)])
def test_stable_diffusion_2_is_told_apart_by_the_spread_of_a_bias(
    tmp_path: Path, spread: float, predicts: str, resolution: int
) -> None:
    pipeline = small_pipeline("sd21")
    bias = pipeline.unet.up_blocks[3].attentions[2].transformer_blocks[0].norm1.bias
    bias.data = spread * torch.randn(bias.shape, generator=torch.Generator().manual_seed(0))
    path = write_single_file(tmp_path / "two.safetensors", "sd21", pipeline)
    assert inspect(path).prediction_type == predicts
    assert locate(str(path)).resolution == resolution


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        (["lora_unet_conv_in.lora_down.weight"], "a LoRA; give its base model"),
        (["unet.conv_in.lora_A.weight"], "a LoRA; give its base model"),
        (["encoder.conv_in.weight", "decoder.up.0.block.0.conv1.weight"], "a VAE"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "a UNet without its text encoder and VAE"),
        (["model.diffusion_model.joint_blocks.0.x"], "a Stable Diffusion 3 checkpoint"),
        (["model.diffusion_model.double_blocks.0.x"], "a FLUX checkpoint"),
        (["down_blocks.0.resnets.0.conv1.weight"], "a part of a diffusers folder; give the folder"),
        (["x"], "a file of unknown kind"),
    ],
)
def test_a_file_of_another_kind_is_named_as_what_it_is(tmp_path: Path, keys: list[str], what: str) -> None:
    path = tmp_path / "file.safetensors"
    save_file({key: torch.zeros(1) for key in keys}, path)
    with pytest.raises(ModelError, match=f"{path}: {what}, not a checkpoint of Stable Diffusion"):
        locate(str(path))


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x01", (10**10).to_bytes(8, "little") + b"{}", (2**40).to_bytes(8, "little") + b"{}",
        (4).to_bytes(8, "little") + b"nope", (2).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]", (8).to_bytes(8, "little") + b'{"a":{}}',
        (7).to_bytes(8, "little") + b'{"a":1}',
    ],
)  # fmt: skip
def test_a_broken_header_is_told_and_not_believed(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=str(path)):
        read_header(path)


def test_a_file_that_is_cut_off_or_lacks_a_tensor_is_told(files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(files["sd15"].read_bytes()[:-1000])
    with pytest.raises(ModelError, match="is truncated"):
        locate(str(path))
    tensors = load_file(files["sd15"])
    del tensors["model.diffusion_model.middle_block.1.norm.weight"]
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"1 tensors are missing, such as model\.diffusion_model\.middle_block\.1"):
        load_model(path, tokenizer=TOKENIZER)


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"a pickle can run arbitrary code and is not loaded"):
        locate(str(tmp_path / "model.ckpt"))


def test_a_pickled_checkpoint_is_converted_and_loads(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(files["sd15"])
    torch.save({"state_dict": weights, "global_step": 7}, tmp_path / "old.ckpt")
    assert main(["convert", "--file", str(tmp_path / "old.ckpt"), "--to", str(tmp_path / "new.safetensors")]) == 0
    said = capsys.readouterr().out
    assert f"{len(weights)} tensors; left out: global_step" in said
    assert "a checkpoint of sd15" in said
    assert equal(load_file(tmp_path / "new.safetensors"), weights)
    assert (tmp_path / "new.safetensors").stat().st_mode == (tmp_path / "old.ckpt").stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.safetensors", "old.ckpt"]
    for words, message in (
        (["--file", str(tmp_path / "no.ckpt"), "--to", str(tmp_path / "b")], "no such file"),
        (["--file", str(tmp_path / "new.safetensors"), "--to", str(tmp_path / "b")], "is not a pickle"),
        (["--file", str(tmp_path / "old.ckpt"), "--to", str(tmp_path / "new.safetensors")], "exists already"),
    ):
        assert main(["convert", *words]) == 2
        assert message in capsys.readouterr().err


def test_the_tokenizer_comes_from_where_it_is_and_else_the_way_to_it_is_told(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_module, "_installed", lambda: None)
    with pytest.raises(ModelError, match=r"give --tokenizer PATH .* or pip install .finetune-unet.single-file"):
        load_model(files["sd15"])
    with pytest.raises(UsageError, match=r"no tokenizer; expected a folder with vocab\.json"):
        clip_tokenizer(str(tmp_path))
    with pytest.raises(UsageError, match="tiny has its own; this is for a checkpoint in one file"):
        load_model("tiny", tokenizer=TOKENIZER)
    assert (clip_tokenizer(TOKENIZER).pad_token, clip_tokenizer(TOKENIZER, "!").pad_token) == ("<|endoftext|>", "!")


def test_a_run_on_a_file_trains_records_and_samples(files: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        model=str(files["sd15"]), tokenizer=TOKENIZER, data=str(pictures), output_dir=str(tmp_path / "out"),
        resolution=64, rank=4, max_train_steps=1, num_inference_steps=1, train_batch_size=1, mixed_precision="no",
    )  # fmt: skip
    out = fine_tune(config)
    assert (out / "out.safetensors").is_file()
    assert json.loads((out / "result.json").read_text())["reloaded_output_difference"] < 1e-5
