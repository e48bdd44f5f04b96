"""LoCon, presets and patterns of layers, dropout of ranks and layers, and their files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from finetune.config import TrainConfig
from finetune.errors import UsageError
from finetune.models.adapter_dropout import ModuleDropout, RankDropout
from finetune.models.adapter_types import Kind
from finetune.models.loading import DiffusionModel, load_model
from finetune.models.lora import Adapter, add_lora, trainable
from finetune.models.lora_formats import LoraFile
from finetune.models.lora_layers import LAYER_PRESETS, RESIDUAL_BLOCKS, names
from finetune.models.tiny import tiny_folder
from finetune.recipe import fine_tune
from finetune.results.export import export


@pytest.fixture(autouse=True)
def global_generator_untouched() -> None:
    """Loading an adapter through diffusers or peft draws from the global generator."""


def answer(unet: Any) -> Tensor:
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return unet.eval()(x, 500, encoder_hidden_states=torch.ones(1, 77, 96)).sample


def with_weights(model: DiffusionModel) -> DiffusionModel:
    """Far from zero, so that a wrong alpha shows."""
    source = torch.Generator().manual_seed(1)
    for parameter in trainable(model.unet):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=source)
    return model


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "loha", "lokr"])
def test_convolutions_have_a_rank_and_an_alpha_of_their_own_in_every_file(kind: Kind, tmp_path: Path) -> None:
    model, base = load_model("tiny"), answer(load_model("tiny").unet)
    add_lora(model.unet, rank=4, alpha=2, target_modules=("to_q", "conv1"), kind=kind, conv_rank=3, conv_alpha=1.0)
    found = LoraFile(Adapter(model.unet).state(), Adapter(model.unet).alphas(), 0)
    layers = set(found.ranks())
    for ending in ("conv1", "conv2", "to_q", "time_emb_proj", "downsamplers.0.conv", "conv_shortcut"):
        assert any(layer.endswith(f".{ending}") for layer in layers), ending
    assert not {"conv_in", "conv_out"} & layers
    weights = dict(model.unet.named_parameters())
    scale = {"rslora": (2.0, 3**0.5)}.get(kind, (1.0, 1.0))
    for layer, rank in found.ranks().items():
        shape = weights[f"{layer}.base_layer.weight"].shape
        kernel = len(shape) == 4 and shape[-1] > 1
        if rank is not None:  # else a LoKr of two whole factors
            assert rank == (3 if kernel else 4), layer
            assert found.alphas[layer] == pytest.approx(scale[1] if kernel else 2 * scale[0]), layer
    with_weights(model)
    assert export(model, tmp_path / "locon") < 1e-5
    assert (answer(model.unet) - base).abs().max() > 0.01
    both = ["pytorch_lora_weights.safetensors", "locon.safetensors"]  # diffusers reads no DoRA norms of the second
    for file in {"lora": both, "rslora": both, "dora": both[:1]}.get(kind, []):
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder())
        pipeline.load_lora_weights(tmp_path / "locon", weight_name=file)
        torch.testing.assert_close(answer(pipeline.unet), answer(model.unet), rtol=0, atol=1e-4)


@pytest.mark.parametrize("preset", LAYER_PRESETS)
def test_presets_name_their_layers(preset: str) -> None:
    model = load_model("tiny")
    add_lora(model.unet, rank=2, target_modules=(preset,))
    layers = set(Adapter(model.unet).alphas())
    assert all(any(names(ending, layer) for ending in LAYER_PRESETS[preset]) for layer in layers)
    linear = {
        name
        for name, module in load_model("tiny").unet.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    assert (layers == linear) == (preset == "full")
    assert any("conv1" in layer for layer in layers) == (preset == "full")
    assert any("ff.net" in layer for layer in layers) == (preset != "attn-only")


def test_a_pattern_names_whole_names_and_their_ends() -> None:
    model = load_model("tiny")
    add_lora(model.unet, rank=2, target_modules=("up_blocks.*.to_k", "down*to_v"))
    layers = set(Adapter(model.unet).alphas())
    assert {layer.split(".")[0] + layer[-5:] for layer in layers} == {"up_blocks.to_k", "down_blocks.to_v"}
    with pytest.raises(UsageError, match=r"lora_target_modules: the UNet has no layer named like 'foo\.\*'"):
        add_lora(load_model("tiny").unet, target_modules=("foo.*",))
    assert all(names(ending, "up_blocks.0.upsamplers.0.conv") == ("upsamplers" in ending) for ending in RESIDUAL_BLOCKS)


def test_ranks_are_dropped_for_each_example_and_scaled() -> None:
    dropout = RankDropout(0.25).train()
    for shape, channels in (((400, 7, 8), 2), ((400, 8, 3, 5), 1)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            dropped = dropout(torch.ones(shape))
        assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])
        by_rank = dropped.movedim(channels, 1).flatten(2)
        assert torch.equal(by_rank.amin(2), by_rank.amax(2))  # the same everywhere in an example
        assert (by_rank[..., 0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(dropout.eval()(torch.ones(2, 3, 4)), torch.ones(2, 3, 4))


def test_whole_layers_are_dropped_and_not_scaled() -> None:
    dropout = ModuleDropout(0.5).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kept = torch.stack([dropout(torch.ones(2, 3)) for _ in range(200)])
    assert kept.unique().tolist() == [0.0, 1.0]
    assert torch.equal(kept.amin((1, 2)), kept.amax((1, 2)))
    assert kept.mean().item() == pytest.approx(0.5, abs=0.1)


def config(pictures: Path, output: Path, **options: Any) -> TrainConfig:
    basic = {"data": str(pictures), "output_dir": str(output), "max_train_steps": 3, "train_batch_size": 2}
    return TrainConfig(**basic | {"num_inference_steps": 0, "learning_rate": 1e-2, "use_ema": False} | options)


@pytest.mark.parametrize("kind", ["lora", "loha"])
@pytest.mark.parametrize("option", ["rank_dropout", "module_dropout"])
def test_dropout_changes_training_reproducibly_and_not_the_file(
    kind: str, option: str, pictures: Path, tmp_path: Path
) -> None:
    files = [
        fine_tune(config(pictures, tmp_path / name, rank=2, lora_type=kind, **options)) / "metrics.jsonl"
        for name, options in {"a": {option: 0.5}, "b": {option: 0.5}, "plain": {}}.items()
    ]
    first, again, plain = (path.read_text() for path in files)
    assert first == again != plain
    keys = [load_file(path.parent / "pytorch_lora_weights.safetensors").keys() for path in files]
    assert keys[0] == keys[2]


def test_the_norm_of_each_update_stays_below_the_limit(pictures: Path, tmp_path: Path) -> None:
    def norms(folder: Path) -> list[float]:
        tensors = load_file(folder / "pytorch_lora_weights.safetensors")
        downs = [key for key in tensors if "lora_A" in key]
        pairs = [(tensors[key], tensors[key.replace("lora_A", "lora_B")]) for key in downs]
        return [(up.flatten(1) @ down.flatten(1)).norm().item() for down, up in pairs]

    options: dict[str, Any] = {"rank": 2, "lora_alpha": 4.0, "conv_rank": 2, "conv_alpha": 4.0}
    free = norms(fine_tune(config(pictures, tmp_path / "free", **options)))
    limited = norms(fine_tune(config(pictures, tmp_path / "limited", scale_weight_norms=0.01, **options)))
    assert max(free) > 0.02
    assert max(limited) == pytest.approx(0.01, rel=1e-5)
    assert len(limited) == len(free)


def test_full_training_of_some_layers_changes_these_alone(pictures: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "full", "train_modules": ("attn2", "up_blocks.*.conv1")}
    folder = fine_tune(config(pictures, tmp_path / "out", **options))
    trained = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    before = load_model("tiny").unet.state_dict()
    changed = {name for name, tensor in trained.items() if not torch.equal(tensor, before[name])}
    chosen = {n for n in before if ".attn2." in n or (n.startswith("up_blocks") and ".conv1." in n)}
    assert changed == chosen
    saved = load_file(folder / "checkpoint-3/trainable.safetensors")
    assert saved.keys() == chosen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conv_alpha": 2.0}, "conv_alpha cannot be used here: it needs conv_rank"),
        ({"conv_rank": 9999}, "conv_rank = 9999: expected 1 to "),
        ({"train_modules": ("attn2",)}, "train_modules cannot be used here: it needs method full"),
        ({"method": "full", "train_modules": ("zzz",)}, "train_modules: the UNet has no layer named like 'zzz'"),
        ({"scale_weight_norms": 1.0, "lora_type": "dora"}, "scale_weight_norms cannot be used here"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        fine_tune(config(pictures, tmp_path / "out", **options))
