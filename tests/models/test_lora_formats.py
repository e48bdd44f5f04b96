import json
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from finetune.errors import ModelError, UsageError
from finetune.models.adapter_types import Kind
from finetune.models.ldm_keys import UNET, unet_keys
from finetune.models.lora import Adapter, add_lora
from finetune.models.lora_formats import from_kohya, read_lora, to_kohya, write_peft
from finetune.models.lora_keys import family_layers, kohya_names, layer_names
from finetune.models.lora_math import changed
from finetune.models.lora_tools import shortened

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
EVERYTHING = (
    *ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "conv_in",
    "conv_out", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv",
)  # fmt: skip
SMALL = {"block_out_channels": (32, 64, 64, 64), "norm_num_groups": 8, "cross_attention_dim": 32, "sample_size": 16}
CROSS, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
SHAPES = {
    "sd15": SMALL | {"attention_head_dim": 8},
    "sd21": SMALL | {"attention_head_dim": (2, 4, 4, 4), "use_linear_projection": True},
    "sdxl": SMALL
    | {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", CROSS, CROSS),
        "up_block_types": (CROSS_UP, CROSS_UP, "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 3),
        "attention_head_dim": (2, 4, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    },
}
"""The block layouts of the families, narrow."""


def adapted(shape: str, targets: Iterable[str], kind: Kind = "lora") -> Adapter:
    """An adapter of alpha 3 on rank 4, its weights far from zero."""
    with torch.random.fork_rng(devices=[]):
        unet = UNet2DConditionModel(**SHAPES[shape])
    add_lora(unet, rank=4, alpha=3, target_modules=tuple(targets), kind=kind)
    source = torch.Generator().manual_seed(1)
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=source)
    return Adapter(unet)


def plain(shape: str) -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        return UNet2DConditionModel(**SHAPES[shape])


def names_of(shape: str) -> dict[str, str]:
    unet = plain(shape)
    return layer_names(unet.config, unet.state_dict())


def in_kohyas_layout(adapter: Adapter) -> dict[str, torch.Tensor]:
    return to_kohya(adapter.state(), adapter.alphas(), kohya_names(adapter.unet.config, adapter.alphas()))


def keys_that_comfyui_uses(keys: Iterable[str], unet: UNet2DConditionModel) -> set[str]:
    """The keys of a LoRA file that ComfyUI's map of a UNet finds, written down from its description.

    A diffusers name X of a weight is known as lora_unet_X and lycoris_X, dots as underscores, and as X and unet.X with
    `.to_` written `.processor.to_` and `to_out.0` as `to_out`; behind it come `.alpha` and pairs of suffixes. Its name
    X in a checkpoint in one file is known as lora_unet_X, too.
    """
    weights = unet_keys(unet.config, unet.state_dict())
    pairs = (
        (".lora_up.weight", ".lora_down.weight"), ("_lora.up.weight", "_lora.down.weight"),
        (".lora_B.weight", ".lora_A.weight"), (".lora.up.weight", ".lora.down.weight"),
    )  # fmt: skip
    there, used = set(keys), set()
    for weight, in_one_file in weights.items():
        name, ldm = weight.removesuffix(".weight"), in_one_file.removeprefix(UNET).removesuffix(".weight")
        old = name.replace(".to_", ".processor.to_").replace("to_out.0", "to_out")
        dotless = (
            f"{prefix}_{n.replace('.', '_')}"
            for prefix, n in (("lora_unet", name), ("lycoris", name), ("lora_unet", ldm))
        )
        for known in (*dotless, old, f"unet.{old}"):
            for pair in pairs:
                if {known + suffix for suffix in pair} <= there:
                    used |= {known + suffix for suffix in (*pair, ".alpha", ".dora_scale")} & there
            factors = {key for key in there if key.startswith((f"{known}.hada_w", f"{known}.lokr_w"))}
            used |= factors | ({f"{known}.alpha"} & there if factors else set())
    return used


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("targets", [ATTENTION, EVERYTHING], ids=["attention", "convolutions too"])
def test_comfyui_uses_every_tensor(shape: str, targets: tuple[str, ...]) -> None:
    adapter = adapted(shape, targets)
    file = in_kohyas_layout(adapter)
    assert keys_that_comfyui_uses(file, plain(shape)) == file.keys()
    assert not keys_that_comfyui_uses([key for key in adapter.state() if "attn" in key], plain(shape))  # hence the file


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["dora", "loha", "lokr"])
def test_comfyui_uses_every_tensor_of_other_kinds(kind: Kind, shape: str) -> None:
    file = in_kohyas_layout(adapted(shape, EVERYTHING, kind))
    assert keys_that_comfyui_uses(file, plain(shape)) == file.keys()


@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back_is_equal_to_the_bit(shape: str) -> None:
    adapter = adapted(shape, EVERYTHING)
    state = adapter.state()
    back, alphas = from_kohya(in_kohyas_layout(adapter), names_of(shape))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())
    assert set(alphas.values()) == {3.0}
    assert len(alphas) == len(state) / 2


@pytest.mark.parametrize("key", ["lora_unet_conv_in.lora_mid.weight", "lora_te_x.lora_up.weight", "unet.conv_in.alpha"])
def test_keys_of_another_kind_are_named(key: str) -> None:
    with pytest.raises(ModelError, match=re.escape(f"{key}: no LoRA tensor for this UNet")):
        from_kohya({key: torch.zeros(1)}, {"conv_in": "conv_in"})


def test_what_is_no_lora_is_not_renamed() -> None:
    with pytest.raises(ModelError, match=r"conv_in\.weight: not a tensor of a LoRA"):
        to_kohya({"unet.conv_in.weight": torch.zeros(1)}, {"conv_in": 1}, {"conv_in": "conv_in"})


@pytest.mark.parametrize("shape", SHAPES)
def test_the_names_that_sd_scripts_gives_the_layers_of_sdxl_are_read(shape: str) -> None:
    adapter = adapted(shape, EVERYTHING)
    ldm = {layer: name for name, layer in names_of(shape).items() if name != layer}
    state = {key: tensor for key, tensor in adapter.state().items() if key.endswith(".lora_A.weight")}
    layers = {key.removeprefix("unet.").removesuffix(".lora_A.weight"): tensor for key, tensor in state.items()}
    theirs = {f"lora_unet_{ldm[layer].replace('.', '_')}.lora_down.weight": t for layer, t in layers.items()}
    assert "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q.lora_down.weight" in theirs
    back, _ = from_kohya(theirs, names_of(shape))
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())


def test_the_layers_of_the_real_sizes_are_known_without_a_model() -> None:
    for family, width in (("sd15", 768), ("sd21", 1024), ("sdxl", 2048)):
        layers = family_layers(family)
        layer, ldm = (
            f"{begin}.transformer_blocks.0.attn2.to_k" for begin in ("mid_block.attentions.0", "middle_block.1")
        )
        assert layers.names[ldm] == layers.names[layer] == layer
        assert layers.shapes[layer] == (1280, width)
        assert layers.kohya_names[layer] == (ldm if family == "sdxl" else layer)  # as sd-scripts writes them


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet_conv_in.lora_up.weight": torch.zeros(1, 1)}, r"conv_in\.lora_A\.weight is missing"),
        ({"lora_unet_conv_in.hada_w1_a": torch.zeros(1, 1)}, r"conv_in\.hada_w1_b is missing"),
        ({"lora_unet_conv_in.lokr_w1": torch.zeros(1, 1)}, r"conv_in\.lokr_w2_a is missing"),
        ({"lora_unet_conv_in.alpha": torch.zeros(2)}, r"alpha: \(2,\); alpha is one number"),
        ({"unet.conv_in.lora_B.weight": torch.zeros(1, 1)}, r"conv_in\.lora_A\.weight is missing"),
        ({"lora_te_x.alpha": torch.zeros(1)}, "it has no tensors for a UNet"),
    ],
)
def test_a_layer_that_is_not_whole_is_named(tensors: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=message):
        read_lora(tmp_path / "a.safetensors", {"conv_in": "conv_in"})


def test_alpha_of_a_layer_is_read_as_peft_reads_it(tmp_path: Path) -> None:
    tensors = {f"unet.{layer}.lora_{m}.weight": torch.ones(4, 4) for layer in ("a.x", "b.x", "b.y") for m in "AB"}
    metadata = {"unet.lora_alpha": 2, "unet.alpha_pattern": {"^b.*x": 8, "y": 6}, "unet.use_rslora": True}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(metadata)})
    found = read_lora(tmp_path / "a.safetensors", {})
    assert found.alphas == {"a.x": 4.0, "b.x": 16.0, "b.y": 12.0}  # times the root of rank 4


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_norms_of_a_loha_or_lokr_are_merged(kind: Kind, tmp_path: Path) -> None:
    """LyCORIS' `dora_wd` with a norm for each output: the rows of the sum get the norms."""
    adapter = adapted("sd15", ("to_q",), kind)
    file, names = in_kohyas_layout(adapter), names_of("sd15")
    layers = {key.partition(".")[0] for key in file}
    norms = {f"{layer}.dora_scale": torch.full((32, 1), 2.0) for layer in layers if "_down_blocks_0_" in layer}
    save_file(file | norms, tmp_path / "a.safetensors")
    found = read_lora(tmp_path / "a.safetensors", names)
    assert (found.kind, found.has_norms) == (kind, True)
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    merged = changed(weight, found.layers()[layer], found.alphas[layer])
    summed = weight + adapter.updates()[layer]
    assert torch.allclose(merged, 2 * summed / summed.norm(dim=1, keepdim=True), atol=1e-6)
    with pytest.raises(ModelError, match=r"with the norms of a DoRA|how its layers were factored"):
        write_peft(tmp_path / "p.safetensors", found)
    with pytest.raises(ModelError, match="a DoRA's norms do not fit into a LoRA of another rank"):
        shortened(found, None, 1, 1.0)
    with pytest.raises(UsageError, match=f"a {kind} with the norms of a DoRA, which is not trained here"):
        adapter.init_from(tmp_path / "a.safetensors")
