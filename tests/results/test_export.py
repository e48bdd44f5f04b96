import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune.errors import RunError, UsageError
from finetune.models.loading import DiffusionModel, load_model
from finetune.models.lora import add_lora, trainable
from finetune.models.pipeline_folder import write_pipeline
from finetune.models.tiny import tiny_folder
from finetune.results.export import export
from finetune.results.verify import verify_export
from tests.small_models import write_single_file

LORA = "pytorch_lora_weights.safetensors"
ROUNDING = 1e-5  # equal weights read from a file lie elsewhere in memory, and some processors round differently there
CONVOLUTIONS_TOO = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "proj_in")


def trained(targets: tuple[str, ...] | None = None, dtype: torch.dtype = torch.float32) -> DiffusionModel:
    """A LoRA with alpha 3 on rank 4 whose weights are far from zero."""
    model = load_model("tiny", dtype=dtype)
    add_lora(model.unet, rank=4, alpha=3, **({"target_modules": targets} if targets else {}))
    source = torch.Generator().manual_seed(1)
    for parameter in trainable(model.unet):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=source)
    return model


def answer(unet) -> torch.Tensor:
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return unet(x, 500, encoder_hidden_states=torch.ones(1, 77, 96)).sample


@pytest.mark.parametrize("targets", [None, CONVOLUTIONS_TOO], ids=["attention", "convolutions too"])
def test_a_lora_loads_into_a_plain_pipeline_with_its_alpha(tmp_path: Path, targets: tuple[str, ...] | None) -> None:
    model = trained(targets)
    assert export(model, tmp_path) < ROUNDING
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder())
    base = answer(pipeline.unet)
    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator
        pipeline.load_lora_weights(tmp_path)
    assert torch.allclose(answer(pipeline.unet), answer(model.unet.eval()), rtol=0, atol=ROUNDING)
    assert (answer(pipeline.unet) - base).abs().max() > 0.01
    assert not list(tmp_path.glob(".*"))


def test_a_lora_on_a_half_precision_base_is_saved_in_fp32(tmp_path: Path) -> None:
    model = trained(dtype=torch.bfloat16)
    before = [parameter.clone() for parameter in trainable(model.unet)]
    export(model, tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / LORA).values()} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(before, trainable(model.unet), strict=True))
    assert list(model.unet.peft_config) == ["default"]


def test_equal_adapters_make_equal_files(tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        export(trained(), tmp_path / name)
        files.append((tmp_path / name / LORA).read_bytes())
    assert files[0] == files[1]
    with safe_open(tmp_path / "a" / LORA, "pt") as file:
        assert list(file.metadata()) == ["lora_adapter_metadata"]


def test_a_full_fine_tune_is_a_whole_pipeline(tmp_path: Path) -> None:
    model = load_model("tiny")
    for parameter in model.unet.parameters():
        parameter.data += 0.01
    assert export(model, tmp_path) < ROUNDING
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert torch.allclose(answer(pipeline.unet), answer(model.unet), rtol=0, atol=ROUNDING)
    base = StableDiffusionPipeline.from_pretrained(tiny_folder())
    for part in ("vae", "text_encoder"):
        theirs = getattr(base, part).state_dict()
        assert all(torch.equal(t, theirs[n]) for n, t in getattr(pipeline, part).state_dict().items())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len({path.stat().st_mode for path in files}) == 1  # none is private to the user


def test_a_pipeline_replaces_a_pipeline_but_no_folder_that_is_only_named_like_a_part(tmp_path: Path) -> None:
    model = load_model("tiny")
    export(model, tmp_path / "pipeline")
    export(model, tmp_path / "pipeline")
    (tmp_path / "mine/unet").mkdir(parents=True)
    (tmp_path / "mine/unet/precious.txt").write_text("mine")
    with pytest.raises(UsageError, match="mine/unet is in the way of the export"):
        export(model, tmp_path / "mine")
    assert (tmp_path / "mine/unet/precious.txt").exists()


def test_a_pixel_model_is_a_ddpm_pipeline(tmp_path: Path) -> None:
    model = load_model("ddpm", resolution=32)
    assert export(model, tmp_path) < ROUNDING
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    assert all(torch.equal(t, model.unet.state_dict()[n]) for n, t in pipeline.unet.state_dict().items())


@pytest.mark.parametrize("fault", ["renamed", "changed", "missing"])
def test_the_proof_finds_a_planted_fault(tmp_path: Path, fault: str) -> None:
    model = trained()
    export(model, tmp_path)
    with safe_open(tmp_path / LORA, "pt") as file:
        metadata = file.metadata()
    weights = load_file(tmp_path / LORA)
    name = sorted(weights)[5]
    tensor = weights.pop(name)
    if fault == "renamed":
        weights[name.replace("attn", "antn")] = tensor
    if fault == "changed":
        weights[name] = tensor + 1e-3
    save_file(weights, tmp_path / LORA, metadata)
    with pytest.raises(RunError, match="does not load back to the trained model"):
        verify_export(model, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("weight", "1 weights differ: conv_in.weight"),
        ("text encoder", r"1 weights differ: text_encoder\..*embed"),
        ("config", "outputs differ by"),
    ],
)
def test_the_proof_finds_a_fault_planted_in_a_pipeline(
    tmp_path: Path, dtype: torch.dtype, fault: str, said: str
) -> None:
    model = load_model("tiny", dtype=dtype)
    assert export(model, tmp_path) < ROUNDING
    config = tmp_path / "unet/config.json"
    if fault == "config":
        config.write_text(config.read_text().replace('"silu"', '"mish"'))
    else:
        (file,) = (tmp_path / fault.replace(" ", "_").replace("weight", "unet")).glob("*.safetensors")
        weights = load_file(file)
        name = next(name for name in sorted(weights) if name.startswith("conv_in.w") or "embed" in name)
        weights[name].view(-1)[7] += 1
        save_file(weights, file, {"format": "pt"})
    before = {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}
    with pytest.raises(RunError, match=said):
        verify_export(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.unet.state_dict().items())


def settings_of_export(folder: Path) -> dict[str, Any]:
    with safe_open(folder / LORA, "pt") as file:
        return json.loads(file.metadata()["lora_adapter_metadata"])


def test_the_proof_finds_another_alpha(tmp_path: Path) -> None:
    model = trained()
    export(model, tmp_path)
    metadata = {"lora_adapter_metadata": json.dumps(settings_of_export(tmp_path) | {"unet.lora_alpha": 1})}
    save_file(load_file(tmp_path / LORA), tmp_path / LORA, metadata)
    with pytest.raises(RunError, match="outputs differ"):
        verify_export(model, tmp_path)


@pytest.mark.parametrize("arguments", [{}, {"kind": "rslora"}, {"kind": "dora"}, {"conv_rank": 2, "conv_alpha": 3}])
def test_the_file_for_diffusers_means_the_same_without_its_metadata(arguments: dict[str, Any], tmp_path: Path) -> None:
    """diffusers 0.30 to 0.34 read none, and take the rank of the first layer for the alpha of all."""
    model = load_model("tiny")
    add_lora(model.unet, rank=4, alpha=3, target_modules=("to_q", "ff.net.2"), **arguments)
    for parameter in trainable(model.unet):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    export(model, tmp_path)
    save_file(load_file(tmp_path / LORA), tmp_path / LORA)
    assert verify_export(model, tmp_path) < ROUNDING


def test_the_file_for_diffusers_has_no_setting_that_a_version_of_peft_does_not_know(tmp_path: Path) -> None:
    """peft 0.17 refuses a file that has `alora_invocation_tokens`, which 0.18 writes by itself."""
    export(trained(), tmp_path)
    known = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"}
    assert {name.removeprefix("unet.") for name in settings_of_export(tmp_path)} == known


def test_the_tokenizer_of_a_checkpoint_in_one_file_is_exported_for_transformers_4(tmp_path: Path) -> None:
    base = write_single_file(tmp_path / "base.safetensors", "sdxl")
    given = tiny_folder() / "tokenizer"
    export(load_model(base, tokenizer=str(given)), tmp_path / "out")
    for part in ("tokenizer", "tokenizer_2"):
        written = tmp_path / "out" / part
        vocabulary = json.loads((written / "vocab.json").read_text(encoding="utf-8"))
        assert vocabulary == json.loads((given / "vocab.json").read_text(encoding="utf-8"))
        lines = [(place / "merges.txt").read_text(encoding="utf-8").split("\n") for place in (written, given)]
        assert [line for line in lines[0] if line[:1] != "#"] == [line for line in lines[1] if line[:1] != "#"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_stayed_frozen_is_the_bases_own_files(tmp_path: Path, dtype: torch.dtype) -> None:
    base = shutil.copytree(tiny_folder(), tmp_path / "base")
    for clutter in ("vae/diffusion_pytorch_model.fp16.safetensors", "text_encoder/.lock", "text_encoder/model.bin"):
        (base / clutter).write_bytes(b"not read")
    (tmp_path / "to").mkdir()
    write_pipeline(load_model(base), tmp_path / "to", dtype)
    parts = ("vae", "text_encoder", "tokenizer")
    there = {path.relative_to(tiny_folder()) for part in parts for path in (tiny_folder() / part).iterdir()}
    assert {p.relative_to(tmp_path / "to") for part in parts for p in (tmp_path / "to" / part).iterdir()} == there
    for path in there:
        ours, theirs = tmp_path / "to" / path, tiny_folder() / path
        if path.suffix == ".safetensors" and dtype == torch.float16:
            a, b = load_file(ours), load_file(theirs)
            assert a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name].half()) for name in a)
        else:
            assert ours.read_bytes() == theirs.read_bytes()
    assert {
        tensor.dtype for tensor in load_file(tmp_path / "to/unet/diffusion_pytorch_model.safetensors").values()
    } == {dtype}
    StableDiffusionPipeline.from_pretrained(tmp_path / "to")


def test_another_vae_is_exported_as_its_own_files(tmp_path: Path) -> None:
    other = shutil.copytree(tiny_folder() / "vae", tmp_path / "other")
    weights = load_file(other / "diffusion_pytorch_model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, other / "diffusion_pytorch_model.safetensors")
    export(load_model("tiny", vae=str(other)), tmp_path / "to")
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "to/vae" / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_text_encoders_of_a_single_file_get_the_names_that_all_versions_read(tmp_path: Path, family: str) -> None:
    base = write_single_file(tmp_path / "base.safetensors", family)
    export(load_model(base, tokenizer=str(tiny_folder() / "tokenizer")), tmp_path / "to")
    for file in (tmp_path / "to").glob("text_encoder*/model.safetensors"):
        names = set(load_file(file)) - {"text_projection.weight"}
        assert names
        assert all(name.startswith("text_model.") for name in names)
