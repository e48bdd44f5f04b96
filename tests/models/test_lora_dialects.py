"""LoRA files as other programs write them: each reads as the same LoRA in kohya's layout."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune.cli import main
from finetune.errors import ModelError
from finetune.models.lora_formats import from_kohya, read_lora, to_kohya
from finetune.models.lora_keys import layers_of
from finetune.models.lora_tools import check_layers
from finetune.models.source import FolderSource
from finetune.models.tiny import tiny_folder

State = dict[str, Tensor]
TINY = layers_of(FolderSource(tiny_folder()).config("unet"))
NAMES, SHAPES = TINY.names, TINY.shapes
LAYERS = [name for name in SHAPES if name.startswith("mid_block.attentions.0") and ".attn" in name]


@pytest.fixture
def plain() -> State:
    """peft's keys, without a prefix -> tensors of rank 2."""
    source = torch.Generator().manual_seed(0)
    state: State = {}
    for layer in LAYERS:
        out, inner = SHAPES[layer]
        state[f"{layer}.lora_A.weight"] = torch.randn(2, inner, generator=source)
        state[f"{layer}.lora_B.weight"] = torch.randn(out, 2, generator=source)
    return state


def processors(state: State) -> State:
    """diffusers up to 0.17."""
    renamed: State = {}
    for key, tensor in state.items():
        layer, matrix = key.rsplit(".lora_", 1)
        block, _, projection = layer.replace(".to_out.0", ".to_out").rpartition(".")
        renamed[f"{block}.processor.{projection}_lora.{'down' if matrix[0] == 'A' else 'up'}.weight"] = tensor
    return renamed


def changed(state: State, change: Callable[[str], str]) -> State:
    return {change(key): tensor for key, tensor in state.items()}


def kohya(state: State) -> State:
    return to_kohya(
        {f"unet.{key}": tensor for key, tensor in state.items()}, dict.fromkeys(LAYERS, 2.0), TINY.kohya_names
    )


def down_up(key: str) -> str:
    return key.replace("lora_A", "lora_down").replace("lora_B", "lora_up")


DIALECTS: dict[str, Callable[[State], State]] = {
    "peft without a prefix": lambda state: state,
    "peft's own": lambda state: changed(state, "base_model.model.{}".format),
    "peft's own in diffusers'": lambda state: changed(state, "unet.base_model.model.{}".format),
    "a named adapter": lambda state: changed(state, lambda key: key.replace(".weight", ".default.weight")),
    "attention processors": lambda state: changed(processors(state), "unet.{}".format),
    "attention processors without a prefix": processors,
    "lora.down": lambda state: changed(
        state, lambda key: f"unet.{key.replace('lora_A', 'lora.down').replace('lora_B', 'lora.up')}"
    ),
    "ComfyUI": lambda state: changed(state, lambda key: f"diffusion_model.{down_up(key)}"),
    "OMI": lambda state: changed(state, lambda key: f"unet.{down_up(key)}"),
    "LyCORIS": lambda state: changed(kohya(state), lambda key: key.replace("lora_unet_", "lycoris_")),
    "OneTrainer's bundle": lambda state: kohya(state) | {"bundle_emb.sks.clip_l": torch.ones(2, 4)},
    "a scalar": lambda state: {
        key: tensor / 4 if "lora_up" in key else tensor for key, tensor in kohya(state).items()
    } | {f"lora_unet_{layer.replace('.', '_')}.scalar": torch.tensor(4.0) for layer in LAYERS},
}  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_reads_as_the_same_lora(dialect: str, plain: State, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(DIALECTS[dialect](plain), path)
    found = read_lora(path, NAMES)
    assert found.tensors.keys() == {f"unet.{key}" for key in plain}
    assert all(torch.equal(tensor, found.tensors[f"unet.{key}"]) for key, tensor in plain.items())
    assert found.text_tensors == (1 if "bundle" in dialect else 0)
    check_layers(path, found, "tiny")


def test_a_middle_factor_is_multiplied_into_the_lower_one(tmp_path: Path) -> None:
    layer = "down_blocks.0.resnets.0.conv1"
    out, inner, *_ = SHAPES[layer]
    source = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, inner, 1, 1, generator=source), torch.randn(out, 2, 1, 1, generator=source)
    core = torch.randn(2, 2, 3, 3, generator=source)
    name = f"lora_unet_{layer.replace('.', '_')}"
    save_file(
        {f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": core, f"{name}.lora_up.weight": up},
        tmp_path / "a.safetensors",
    )
    found = read_lora(tmp_path / "a.safetensors", NAMES)
    picture = torch.randn(1, inner, 8, 8, generator=source)
    conv = torch.nn.functional.conv2d
    expected = conv(conv(conv(picture, down), core, padding=1), up)
    a, b = (found.tensors[f"unet.{layer}.lora_{matrix}.weight"] for matrix in "AB")
    assert torch.allclose(conv(conv(picture, a, padding=1), b), expected, atol=1e-4)


def test_alpha_of_pefts_own_file_is_read(plain: State, tmp_path: Path) -> None:
    save_file(changed(plain, "base_model.model.{}".format), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8}))
    assert set(read_lora(tmp_path / "adapter_model.safetensors", NAMES).alphas.values()) == {8.0}


def test_null_as_metadata_is_as_none(plain: State, tmp_path: Path) -> None:
    save_file(plain, tmp_path / "a.safetensors", {"lora_adapter_metadata": "null"})
    assert read_lora(tmp_path / "a.safetensors", NAMES).alphas == {}


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        (["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"], "it is for FLUX, which has no UNet"),
        (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], "it is for FLUX, which has no UNet"),
        (["lora_unet_a.on_input", "lora_unet_a.weight"], r"an \(IA\)3, which scales activations"),
        (["lora_unet_a.diff"], "whole weights' differences; read are LoRA, DoRA, LoHa and LoKr"),
        (["lora_unet_a.w_norm"], "norms' weights"),
        (["lora_unet_a.oft_blocks"], "an OFT"),
    ],
)
def test_what_cannot_be_read_is_named_as_what_it_is(keys: list[str], what: str, tmp_path: Path) -> None:
    save_file({key: torch.ones(2, 2) for key in keys}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=what):
        read_lora(tmp_path / "a.safetensors", NAMES)


def test_a_page_that_was_downloaded_instead_is_no_safetensors_file(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_text("<!DOCTYPE html><html><body>Log in</body></html>")
    with pytest.raises(ModelError, match="is not a safetensors file, or is damaged"):
        read_lora(tmp_path / "a.safetensors")


def test_convert_proves_against_a_unet(plain: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["lora", "convert", "--file", str(tmp_path / "a.safetensors"), "--to", str(tmp_path / "b.safetensors")]
    save_file({f"transformer.blocks.0.{key}": tensor for key, tensor in plain.items()}, tmp_path / "a.safetensors")
    assert main([*words, "--model", "tiny"]) == 1
    assert "is no layer of the UNet of --model tiny" in capsys.readouterr().err
    save_file(plain, tmp_path / "a.safetensors")
    assert main([*words, "--model", "sd15"]) == 1  # which needs neither the hub nor its files
    assert "does not fit its shape" in capsys.readouterr().err
    assert not (tmp_path / "b.safetensors").exists()
    assert main([*words, "--model", "tiny"]) == 0
    assert from_kohya({}, NAMES) == ({}, {})


def test_a_lora_of_another_family_is_named_as_such(tmp_path: Path) -> None:
    name = "lora_unet_output_blocks_3_1_transformer_blocks_1_attn2_to_k"
    save_file({f"{name}.lora_down.weight": torch.ones(1, 2048), f"{name}.lora_up.weight": torch.ones(640, 1)},
              tmp_path / "xl.safetensors")  # fmt: skip
    with pytest.raises(ModelError, match="no LoRA tensor for this UNet; it was made for sdxl"):
        read_lora(tmp_path / "xl.safetensors", NAMES)
