"""finetune-unet lora info, convert, merge, resize, extract: through the command line, on small models."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.cli import main
from finetune.models.adapter_types import Kind
from finetune.models.loading import load_model
from finetune.models.lora import Adapter, add_lora, trainable
from finetune.models.lora_formats import LoraFile, read_lora, write_kohya
from finetune.models.lora_keys import layer_names
from finetune.models.lora_math import update
from finetune.models.lora_tools import shortened
from finetune.models.tiny import tiny_folder
from tests.models.test_lora_formats import adapted
from tests.small_models import write_single_file

TOKENIZER = str(tiny_folder() / "tokenizer")
TARGETS = ("to_q", "to_out.0", "conv1", "proj_in")


@pytest.fixture(autouse=True)
def global_generator_untouched() -> None:
    """Loading an adapter through diffusers draws from the global generator."""


def answer(unet) -> Tensor:
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return unet.eval()(x, 500, encoder_hidden_states=torch.ones(1, 77, 96)).sample


def tiny_lora(path: Path, kind: Kind = "lora", rank: int = 4, seed: int = 1, alpha: float = 3) -> Tensor:
    """Write a LoRA for `tiny` and return what its UNet answers with it."""
    unet = load_model("tiny").unet
    add_lora(unet, rank=rank, alpha=alpha, target_modules=TARGETS, kind=kind)
    source = torch.Generator().manual_seed(seed)
    for parameter in trainable(unet):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=source)
    Adapter(unet).save_kohya(path, {"ss_steps": "10", "ss_tag_frequency": '{"dogs": {"dog": 3}}'})
    return answer(unet)


def names_of_tiny() -> dict[str, str]:
    """The names of the layers of `tiny`."""
    unet = load_model("tiny").unet
    return layer_names(unet.config, unet.state_dict())


def lora(*words: str | Path) -> int:
    return main(["lora", *map(str, words)])


def test_info_is_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_lora(tmp_path / "a.safetensors")
    assert lora("info", "--file", tmp_path / "a.safetensors", "--model", "tiny") == 0
    metadata = capsys.readouterr().out
    for row in (
        "layout       kohya",
        "kind         lora",
        "rank         4",
        "alpha        3",
        "steps        10",
        "tags         dog (3)",
        "in float32",
    ):
        assert row in metadata
    assert "attention (" in metadata
    assert "convolutions (" in metadata


@pytest.mark.parametrize("shape", ["sd15", "sd21", "sdxl"])
def test_info_knows_the_layers_of_what_a_file_was_made_for(
    shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its layers are the family's; the widths here are no real ones, but for the prompt's."""
    adapter = adapted(shape, ["attn2.to_k"])
    wide = {"sd15": 768, "sd21": 1024, "sdxl": 2048}[shape]
    adapter.save_kohya(tmp_path / "a.safetensors", {})
    tensors = load_file(tmp_path / "a.safetensors")
    save_file(
        {k: torch.ones(4, wide) if "lora_down" in k else t for k, t in tensors.items()}, tmp_path / "a.safetensors"
    )
    assert lora("info", "--file", tmp_path / "a.safetensors") == 0
    assert f"made for     {shape}" in capsys.readouterr().out


def test_there_and_back_between_the_layouts(tmp_path: Path) -> None:
    trained = tiny_lora(tmp_path / "a.safetensors", alpha=0.1)  # a number that fp32 rounds
    assert lora("convert", "--file", tmp_path / "a.safetensors", "--to", tmp_path / "p.safetensors", "--format", "peft",
                "--model", "tiny") == 0  # fmt: skip
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder())
    pipeline.load_lora_weights(tmp_path / "p.safetensors")
    assert torch.allclose(answer(pipeline.unet), trained, rtol=0, atol=1e-5)
    assert (
        lora("convert", "--file", tmp_path / "p.safetensors", "--to", tmp_path / "k.safetensors", "--model", "tiny")
        == 0
    )
    names = names_of_tiny()
    before, after = (read_lora(tmp_path / f"{name}.safetensors", names) for name in "ak")
    for layer, tensors in before.layers().items():
        shape = torch.Size((tensors["lora_B.weight"].shape[0], tensors["lora_A.weight"][0].numel()))
        updates = [update(file.layers()[layer], file.alphas[layer], shape) for file in (before, after)]
        assert torch.allclose(*updates, rtol=1e-5, atol=1e-9)  # alpha is in B by then


def test_a_loha_is_converted(tmp_path: Path) -> None:
    tiny_lora(tmp_path / "a.safetensors", "loha")
    (tmp_path / "p").mkdir()
    to = tmp_path / "p/pytorch_lora_weights.safetensors"
    assert lora("convert", "--file", tmp_path / "a.safetensors", "--to", to, "--format", "peft", "--model", "tiny") == 0


def test_a_dora_by_its_definition_is_converted(tmp_path: Path) -> None:
    """As LyCORIS and OneTrainer write one with a norm for each output."""
    trained = tiny_lora(tmp_path / "ours.safetensors", "dora")
    unet = load_model("tiny").unet
    add_lora(unet, rank=4, alpha=3, target_modules=TARGETS, kind="dora")
    assert Adapter(unet).init_from(tmp_path / "ours.safetensors") == 0
    lora_file = LoraFile(Adapter(unet).state(), Adapter(unet).alphas(), 0)
    names = {layer: layer for layer in lora_file.alphas}
    write_kohya(tmp_path / "a.safetensors", lora_file, {}, names)
    to = tmp_path / "p.safetensors"
    assert lora("convert", "--file", tmp_path / "a.safetensors", "--to", to, "--format", "peft", "--model", "tiny") == 0
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder())
    pipeline.load_lora_weights(to)
    assert torch.allclose(answer(pipeline.unet), trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "why"),
    [("lokr", "does not say how its layers were factored"), ("dora", "its DoRA is written for ComfyUI and Forge")],
)
def test_what_is_not_converted_says_why(
    kind: Kind, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.safetensors"
    tiny_lora(file, kind)
    assert lora("convert", "--file", file, "--to", tmp_path / "x", "--format", "peft", "--model", "tiny") == 1
    assert why in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_several_are_merged_with_their_strengths(tmp_path: Path) -> None:
    tiny_lora(tmp_path / "a.safetensors", "dora", seed=1)
    tiny_lora(tmp_path / "b.safetensors", "lokr", seed=2)
    words = ["--model", "tiny", "--format", "unet", "--precision", "fp32"]
    one, both = tmp_path / "one", tmp_path / "both"
    assert lora("merge", *words, "--file", tmp_path / "a.safetensors", "--to", one) == 0
    assert lora("merge", *words, "--file", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--strength", "1",
                "0.5", "--to", both) == 0  # fmt: skip
    unet = load_model("tiny").unet
    found = read_lora(tmp_path / "b.safetensors", layer_names(unet.config, unet.state_dict()))
    first, second = (load_file(f / "diffusion_pytorch_model.safetensors") for f in (one, both))
    for layer, tensors in found.layers().items():
        weight = first[f"{layer}.weight"]
        expected = weight + 0.5 * update(tensors, found.alphas[layer], weight.shape)
        assert torch.allclose(second[f"{layer}.weight"], expected, atol=1e-6)


def test_a_merged_checkpoint_in_one_file_answers_like_the_adapter(tmp_path: Path) -> None:
    base = write_single_file(tmp_path / "base.safetensors", "sdxl")
    model = load_model(base, tokenizer=TOKENIZER)
    add_lora(model.unet, rank=4, alpha=3, target_modules=TARGETS)
    for parameter in trainable(model.unet):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    Adapter(model.unet).save_kohya(tmp_path / "a.safetensors", {})
    assert lora("merge", "--model", base, "--tokenizer", TOKENIZER, "--file", tmp_path / "a.safetensors", "--to",
                tmp_path / "m.safetensors", "--precision", "fp32") == 0  # fmt: skip
    merged = load_model(tmp_path / "m.safetensors", tokenizer=TOKENIZER).unet.state_dict()
    Adapter(model.unet).merge()
    expected = model.unet.state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.allclose(tensor, expected[name], atol=1e-6) for name, tensor in merged.items())


def test_resizing_keeps_what_matters_most(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = tiny_lora(tmp_path / "a.safetensors", rank=8)
    words = ["--file", tmp_path / "a.safetensors", "--model", "tiny"]
    assert lora("resize", *words, "--to", tmp_path / "whole.safetensors", "--rank", "8") == 0
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder())
    pipeline.load_lora_weights(tmp_path / "whole.safetensors")
    assert torch.allclose(answer(pipeline.unet), trained, rtol=0, atol=2e-5)
    assert lora("resize", *words, "--to", tmp_path / "less.safetensors", "--rank", "3") == 0
    assert lora("resize", *words, "--to", tmp_path / "share.safetensors", "--energy", "0.8") == 0
    assert "100.00% of the squares" in capsys.readouterr().out
    names = names_of_tiny()
    whole, less, share = (read_lora(tmp_path / f"{n}.safetensors", names) for n in ("whole", "less", "share"))
    assert set(less.ranks().values()) == {3}
    for layer, tensors in whole.layers().items():
        shape = torch.Size((tensors["lora_B.weight"].shape[0], *tensors["lora_A.weight"].shape[1:]))
        before = update(tensors, whole.alphas[layer], shape).flatten(1)
        u, s, v = torch.linalg.svd(before)
        best = u[:, :3] * s[:3] @ v[:3]
        assert torch.allclose(update(less.layers()[layer], less.alphas[layer], shape).flatten(1), best, atol=1e-4)
        kept = update(share.layers()[layer], share.alphas[layer], shape).square().sum() / before.square().sum()
        assert 0.8 <= kept <= 0.95
    with safe_open(tmp_path / "less.safetensors", "pt") as file:
        assert (file.metadata()["ss_network_dim"], file.metadata()["ss_steps"]) == ("3", "10")


def test_layers_of_several_ranks_have_one_alpha() -> None:
    """diffusers reads files with several alphas wrongly."""
    flat, steep = torch.diag(torch.tensor([1.0, 1.0, 1.0])), torch.diag(torch.tensor([9.0, 1.0, 1.0]))
    layers = {"flat": flat, "steep": steep}
    tensors = {f"unet.{name}.lora_A.weight": matrix for name, matrix in layers.items()}
    tensors |= {f"unet.{name}.lora_B.weight": torch.eye(3) for name in layers}
    made, kept = shortened(LoraFile(tensors, dict.fromkeys(layers, 3.0), 0), None, None, 0.9)
    assert made.ranks() == {"flat": 3, "steep": 1}
    assert made.alphas == {"flat": 3.0, "steep": 3.0}
    assert kept == pytest.approx((3 + 81) / (3 + 83))
    for name, expected in (("flat", flat), ("steep", torch.diag(torch.tensor([9.0, 0.0, 0.0])))):
        assert torch.allclose(update(made.layers()[name], 3.0, expected.shape), expected, atol=1e-5)


def test_a_loha_becomes_a_lora_and_a_dora_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_lora(tmp_path / "loha.safetensors", "loha", rank=2)
    words = ["--model", "tiny", "--to", tmp_path / "a.safetensors", "--rank", "4"]  # a product of rank 2 x 2
    assert lora("resize", "--file", tmp_path / "loha.safetensors", *words) == 0
    assert "100.00% of the squares" in capsys.readouterr().out
    tiny_lora(tmp_path / "dora.safetensors", "dora")
    words[3] = tmp_path / "b.safetensors"
    assert lora("resize", "--file", tmp_path / "dora.safetensors", *words) == 1
    assert "a DoRA's norms do not fit" in capsys.readouterr().err


def test_what_a_fine_tune_learned_is_extracted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_model("tiny")
    names = [name for name, p in model.unet.named_parameters() if name.endswith(".weight") and p.ndim > 1]
    source = torch.Generator().manual_seed(1)
    for name in names:
        weight = model.unet.get_parameter(name)
        thin = [torch.randn(size, generator=source) for size in ((weight.shape[0], 2), (2, weight[0].numel()))]
        weight.data += 0.02 * (thin[0] @ thin[1]).reshape(weight.shape)
    model.unet.conv_in.bias.data += 0.001
    model.pipeline().save_pretrained(tmp_path / "tuned")
    to = tmp_path / "a.safetensors"
    assert lora("extract", "--model", tmp_path / "tuned", "--base", "tiny", "--to", to, "--rank", "2", "--precision",
                "fp32") == 0  # fmt: skip
    metadata = capsys.readouterr().out
    assert "100.00% of the squares of the change" in metadata
    assert "1 tensor that no LoRA can hold changed too" in metadata
    model.unet.conv_in.bias.data -= 0.001
    assert lora("merge", "--model", "tiny", "--file", to, "--to", tmp_path / "m", "--format", "unet", "--precision",
                "fp32") == 0  # fmt: skip
    merged = load_file(tmp_path / "m/diffusion_pytorch_model.safetensors")
    assert all(torch.allclose(merged[name], model.unet.get_parameter(name), atol=1e-5) for name in names)
    assert lora("extract", "--model", "tiny", "--base", "tiny", "--to", tmp_path / "b") == 2
    assert "do not differ in any layer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("", 2, "lora takes a command after it: info, convert, merge, resize, extract"),
        ("mrege", 2, "did you mean lora merge?"),
        ("info --file nope", 2, "--file nope: no such file"),
        ("info --file A", 1, "its tensors do not show which model it is for; give --model"),
        ("info --file A --model ddpm", 2, "--model ddpm: a pixel-space model takes no LoRA"),
        ("convert --file A --to A", 2, "exists already; give another place"),
        ("resize --file A --to x", 2, "give --rank, or --energy below 1"),
        ("resize --file A --to x --energy 2", 2, "--energy 2: expected above 0, up to 1"),
        ("merge --model tiny --file A --strength 1 2 --to x", 2, "1 files and 2 strengths"),
        ("merge --model tiny --file A --to x --format single-file", 2, "has no such form"),
        ("merge --model tiny --file BASE --to x", 1, "BASE: cond_stage_model."),
        ("extract --model tiny --base BASE --to x", 2, "are models of different kinds"),
    ],
)
def test_what_cannot_be_done_is_told_in_a_line(
    words: str, code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    tiny_lora(tmp_path / "A")
    if "BASE" in words:
        write_single_file(tmp_path / "BASE", "sd15")
    assert lora(*words.split()) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x").exists()
