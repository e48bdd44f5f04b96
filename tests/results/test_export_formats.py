"""Every form of an export, through the command, loads back in a fresh process's way to what was trained."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.cli import main
from finetune.config import TrainConfig, replace
from finetune.errors import ModelError, RunError, UsageError
from finetune.models.loading import load_model
from finetune.models.lora import add_lora, trainable
from finetune.models.single_file import inspect
from finetune.models.tiny import tiny_folder
from finetune.recipe import fine_tune
from finetune.results.export import kohya_file
from finetune.results.export_formats import write_format
from finetune.results.verify import verify_single_file
from finetune.training import checkpoint
from tests.small_models import small_pipeline, write_single_file
from tests.tiny_copy import copy_tiny

TOKENIZER = str(tiny_folder() / "tokenizer")


@pytest.fixture(autouse=True)
def global_generator_untouched() -> None:
    """Loading an adapter through diffusers draws from the global generator."""


@pytest.fixture(scope="module")
def lora_run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = TrainConfig(
        data=str(pictures), output_dir=str(tmp_path_factory.mktemp("runs") / "lora"), max_train_steps=4, rank=4,
        lora_alpha=3, learning_rate=0.05, checkpointing_steps=2, num_inference_steps=0, use_ema=True,
        lora_target_modules=["to_q", "to_v", "conv1"],
    )  # fmt: skip
    return fine_tune(config)


def export(run: Path, form: str, to: Path, *more: str) -> int:
    return main(["export", "--run", str(run), "--format", form, "--to", str(to), *more])


def answer(unet: Any) -> Tensor:
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return unet.eval()(x, 500, encoder_hidden_states=torch.ones(1, 77, 96)).sample


def with_lora(source: Path) -> Tensor:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder())
    pipeline.load_lora_weights(source)
    return answer(pipeline.unet)


def test_every_form_of_a_lora_answers_the_same(
    lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = with_lora(lora_run / "lora.safetensors")
    forms: dict[str, Callable[[Path], Tensor]] = {
        "kohya": with_lora,
        "peft": with_lora,
        "diffusers": lambda folder: answer(StableDiffusionPipeline.from_pretrained(folder).unet),
        "unet": lambda folder: answer(UNet2DConditionModel.from_pretrained(folder)),
    }
    for form, load in forms.items():
        to = tmp_path / (f"{form}.safetensors" if form == "kohya" else form)
        assert export(lora_run, form, to) == 0
        assert torch.allclose(load(to), trained, rtol=0, atol=2e-5), form
        assert f"{to}: loaded back and compared (largest difference " in capsys.readouterr().out
    assert load_file(tmp_path / "kohya.safetensors").keys() == load_file(lora_run / "lora.safetensors").keys()


def test_any_checkpoint_averaged_or_not_in_half_precision(lora_run: Path, tmp_path: Path) -> None:
    state = checkpoint.load(lora_run / "checkpoint-2")
    for ema in (True, False):
        to = tmp_path / f"{ema}.safetensors"
        words = ["--step", "2", "--precision", "fp16", *([] if ema else ["--no_ema"])]
        assert export(lora_run, "kohya", to, *words) == 0
        tensors = load_file(to)
        ours = "mid_block.resnets.0.conv1.lora_A.default.weight"
        theirs = tensors["lora_unet_mid_block_resnets_0_conv1.lora_down.weight"]
        assert torch.equal(theirs, state["ema" if ema else "weights"][ours].half())
    with safe_open(tmp_path / "True.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_steps"], metadata["ss_output_name"], metadata["ss_network_dim"]) == ("2", "lora-000002", "4")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--run nowhere --format kohya --to x", "--run nowhere: no run folder"),
        ("--run RUN --format kohya --to RUN", "exists already; give another place"),
        ("--run RUN --format kohya --to no/where", "there is no folder"),
        ("--run RUN --format kohya --to x --step 3", "no checkpoint 3; there are: 2, 4"),
        ("--run RUN --format single-file --to x", "has no such form; choose diffusers or unet"),
    ],
)
def test_what_cannot_be_exported_is_told(
    lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str,
    message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["export", *words.replace("RUN", str(lora_run)).split()]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_overflows_is_rejected_and_kept_beside(lora_run: Path, tmp_path: Path, pictures: Path) -> None:
    config = TrainConfig(
        data=str(pictures), output_dir=str(tmp_path / "run"), max_train_steps=1, rank=4, learning_rate=1e6,
        num_inference_steps=0, lora_target_modules=["to_q"], lr_warmup_steps=0, use_ema=False,
    )  # fmt: skip
    run = fine_tune(config)
    assert export(run, "kohya", tmp_path / "half.safetensors", "--precision", "fp16") == 1
    assert [path.name for path in tmp_path.glob("half*")] == ["half.safetensors.rejected"]


@pytest.mark.parametrize(
    ("family", "precision"),
    [
        pytest.param("sd15", "fp16", marks=pytest.mark.slow),  # test_lora_tools.py merges one into such a file, too
        pytest.param("sdxl", "fp32", marks=pytest.mark.slow),
        pytest.param("sd15", "fp32", marks=pytest.mark.slow),
        pytest.param("sd21", "fp32", marks=pytest.mark.slow),
        pytest.param("sd21", "fp16", marks=pytest.mark.slow),
        pytest.param("sdxl", "fp16", marks=pytest.mark.slow),
    ],
)
def test_a_lora_merged_into_a_checkpoint_in_one_file(tmp_path: Path, family: str, precision: Any) -> None:
    base = write_single_file(tmp_path / "base.safetensors", family)
    model = load_model(base, tokenizer=TOKENIZER)
    add_lora(model.unet, rank=4, alpha=3, target_modules=["to_q", "conv1", "proj_in"])
    for parameter in trainable(model.unet):
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    to = tmp_path / "merged.safetensors"
    assert write_format(model, to, "single-file", precision=precision, metadata={}) < (
        1e-5 if precision == "fp32" else 1e-2
    )
    before, after = load_file(base), load_file(to)
    assert after.keys() == before.keys()
    half = torch.float32 if precision == "fp32" else torch.float16
    assert {tensor.dtype for tensor in after.values()} == {half}
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name].to(half))}
    assert changed
    assert all(name.startswith("model.diffusion_model.") for name in changed)
    reloaded = load_model(to, tokenizer=TOKENIZER)
    assert all(torch.equal(tensor.to(half), reloaded.unet.state_dict()[name].to(half))
               for name, tensor in model.unet.state_dict().items())  # fmt: skip
    with safe_open(to, "pt") as file:
        assert file.metadata()["modelspec.architecture"].startswith("stable-diffusion-")


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_what_a_folder_has_no_place_for_is_taken_from_the_base(tmp_path: Path, family: str) -> None:
    more = {
        "betas": torch.linspace(0, 1, 1000, dtype=torch.float64),
        "model_ema.num_updates": torch.tensor(5, dtype=torch.int32),
        "v_pred": torch.empty(0),  # a mark: the model's own word counts
    }
    base = write_single_file(tmp_path / "base.safetensors", family, **more)
    tensors = load_file(base)
    if family == "sd21":  # its folder has three blocks of the text encoder; this is the fourth
        key = "cond_stage_model.model.transformer.resblocks.3.ln_1.weight"
        save_file(tensors | {key: tensors[key] + 1}, base)
    model = load_model(base, tokenizer=TOKENIZER, prediction_type="epsilon")
    write_format(
        model, tmp_path / "again.safetensors", "single-file", precision="fp32", metadata={}, base=inspect(base)
    )
    before, after = load_file(base), load_file(tmp_path / "again.safetensors")
    del before["v_pred"]
    assert after.keys() == before.keys()
    assert all(tensor.dtype == after[name].dtype and tensor.equal(after[name]) for name, tensor in before.items())


def test_a_base_of_another_kind_is_refused(tmp_path: Path) -> None:
    base = write_single_file(tmp_path / "base.safetensors", "sd15")
    other = write_single_file(tmp_path / "other.safetensors", "sdxl")
    model = load_model(base, tokenizer=TOKENIZER)
    with pytest.raises(ModelError, match=r"--base .*other\.safetensors: a checkpoint of sdxl, not of sd15"):
        write_format(
            model, tmp_path / "a.safetensors", "single-file", precision="fp32", metadata={}, base=inspect(other)
        )
    tensors, key = load_file(base), "model.diffusion_model.out.0.weight"
    save_file(tensors | {key: torch.ones(3)}, other)
    with pytest.raises(ModelError, match=r"out\.0\.weight is \(3,\), and the model's \(64,\)"):
        write_format(
            model, tmp_path / "a.safetensors", "single-file", precision="fp32", metadata={}, base=inspect(other)
        )
    assert not (tmp_path / "a.safetensors").exists()


def test_a_run_writes_the_forms_it_was_asked_for(pictures: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        data=str(pictures), output_dir=str(tmp_path / "dog"), max_train_steps=1, num_inference_steps=0, rank=2,
        export_formats=["diffusers", "unet"], learning_rate=0.01, lr_warmup_steps=0, export_precision="fp32",
    )  # fmt: skip
    run = fine_tune(config)
    alone = UNet2DConditionModel.from_pretrained(run / "exports/unet").state_dict()
    merged = StableDiffusionPipeline.from_pretrained(run / "exports/diffusers").unet.state_dict()
    before = load_model("tiny").unet.state_dict()
    assert any(not torch.equal(tensor, merged[name]) for name, tensor in before.items())
    assert all(torch.equal(tensor, alone[name]) for name, tensor in merged.items())


@pytest.mark.slow
def test_a_run_writes_one_file_and_what_is_missing_when_it_is_asked_again(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_single_file(tmp_path / "base.safetensors", "sd15")
    config = TrainConfig(
        model=str(base), tokenizer=TOKENIZER, data=str(pictures), output_dir=str(tmp_path / "dog"), max_train_steps=1,
        num_inference_steps=0, resolution=64, rank=2, export_formats=["single-file", "unet"], learning_rate=0.01,
        lr_warmup_steps=0, export_precision="fp32",
    )  # fmt: skip
    run = fine_tune(config)
    merged = load_model(run / "exports/dog.safetensors", tokenizer=TOKENIZER).unet.state_dict()
    alone = UNet2DConditionModel.from_pretrained(run / "exports/unet").state_dict()
    model = load_model(base, tokenizer=TOKENIZER)
    before = model.unet.state_dict()
    assert any(not torch.equal(tensor, merged[name]) for name, tensor in before.items())
    assert all(torch.equal(tensor, alone[name]) for name, tensor in merged.items())
    write_single_file(base, "sd15", betas=torch.ones(1000))
    assert export(run, "single-file", tmp_path / "lean.safetensors") == 0
    assert f"left out, 1 tensor of {base}: betas; --base copies them" in capsys.readouterr().out
    assert export(run, "single-file", tmp_path / "whole.safetensors", "--base", str(base)) == 0
    assert load_file(tmp_path / "whole.safetensors")["betas"].equal(torch.ones(1000))
    assert export(run, "unet", tmp_path / "unet", "--base", str(base)) == 2
    (run / "exports/dog.safetensors").unlink()
    kept = (run / "exports/unet/diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    assert fine_tune(config) == run  # finished: what is missing is written, what is there is left
    assert (run / "exports/dog.safetensors").is_file()
    assert (run / "exports/unet/diffusion_pytorch_model.safetensors").stat().st_mtime_ns == kept
    again = fine_tune(replace(config, overwrite_output_dir=True, export_formats=[], seed=1))
    assert not list((again / "exports").glob("*"))


@pytest.mark.parametrize(("part", "key"), [("vae", "vae"), ("text_encoder", "text_encoder"), ("unet", "model")])
def test_an_export_on_a_base_that_has_changed_is_refused(
    part: str, key: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    copy_tiny(base)
    config = TrainConfig(
        model=str(base), data=str(pictures), output_dir=str(tmp_path / "run"), max_train_steps=1,
        num_inference_steps=0, mixed_precision="bf16",
    )  # fmt: skip
    run = fine_tune(config)
    assert export(run, "diffusers", tmp_path / "same") == 0
    (weights,) = (base / part).glob("*.safetensors")
    save_file({name: 1.01 * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    assert export(run, "diffusers", tmp_path / "other") == 2
    assert f"{key}: its weights differ from those that the checkpoint started from" in capsys.readouterr().err
    assert export(run, "diffusers", tmp_path / "other", "--allow_changed", "model") == 0


def test_a_variant_of_another_form_is_refused(
    lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(lora_run, "diffusers", tmp_path / "x", "--variant", "fp16") == 2
    assert "--variant fp16 goes with --format diffusers --precision fp16" in capsys.readouterr().err


def test_a_form_that_there_is_not_is_refused_before_training(pictures: Path, tmp_path: Path) -> None:
    config = TrainConfig(data=str(pictures), output_dir=str(tmp_path / "run"), export_formats=["single-file"])
    with pytest.raises(UsageError, match=r"export_formats single-file: an embedded Stable Diffusion .* has no such"):
        fine_tune(config)


def test_the_proof_finds_a_file_that_is_taken_for_another_kind(tmp_path: Path) -> None:
    base = write_single_file(tmp_path / "base.safetensors", "sd21")
    model = load_model(base, tokenizer=TOKENIZER, prediction_type="v_prediction")
    to = tmp_path / "dog.safetensors"
    write_format(model, to, "single-file", precision="fp32", metadata={})
    save_file(load_file(to), to)
    with pytest.raises(RunError, match="it is read as one that predicts epsilon, not v_prediction"):
        verify_single_file(model, to, torch.float32)


def test_a_checkpoint_in_one_file_has_what_the_standard_requires(tmp_path: Path) -> None:
    base = write_single_file(tmp_path / "base.safetensors", "sdxl")
    model = load_model(base, tokenizer=TOKENIZER, prediction_type="epsilon")
    write_format(model, tmp_path / "dog.safetensors", "single-file", precision="fp32", metadata={})
    with safe_open(tmp_path / "dog.safetensors", "pt") as file:
        metadata = file.metadata()
    required = ("sai_model_spec", "architecture", "implementation", "title", "resolution", "hash_sha256")
    assert {f"modelspec.{name}" for name in required} <= metadata.keys()
    assert metadata["modelspec.resolution"] == "1024x1024"
    assert metadata["modelspec.hash_sha256"] == f"0x{metadata['sshs_model_hash']}"
    trained = {"modelspec.resolution": "768x768"}
    write_format(model, tmp_path / "cat.safetensors", "single-file", precision="fp32", metadata=trained)
    with safe_open(tmp_path / "cat.safetensors", "pt") as file:
        assert file.metadata()["modelspec.resolution"] == "768x768"


@pytest.mark.parametrize("fault", ["value", "not finite", "missing in the VAE"])
def test_the_proof_of_one_file_finds_a_fault_in_any_part(fault: str, tmp_path: Path) -> None:
    base = write_single_file(tmp_path / "base.safetensors", "sdxl")
    model = load_model(base, tokenizer=TOKENIZER, prediction_type="epsilon")
    to = tmp_path / "dog.safetensors"
    write_format(model, to, "single-file", precision="fp16", metadata={})
    tensors = load_file(to)
    key = {
        "value": "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight",
        "not finite": "model.diffusion_model.out.2.weight",
        "missing in the VAE": "first_stage_model.decoder.conv_in.weight",
    }[fault]
    if fault == "value":
        tensors[key][70, 3] += 1
    elif fault == "not finite":
        tensors[key] = torch.full_like(tensors[key], torch.inf)
        model.unet.conv_out.weight.data.fill_(1e6)
    else:
        del tensors[key]
    save_file(tensors, to)
    with pytest.raises((RunError, ModelError), match=r"k_proj|q_proj|conv_out|VAE are missing"):
        verify_single_file(model, to, torch.float16)


def test_a_full_run_has_no_lora_and_exports_its_pipeline(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainConfig(
        data=str(pictures), output_dir=str(tmp_path / "run"), max_train_steps=1, method="full", num_inference_steps=0
    )
    run = fine_tune(config)
    assert export(run, "kohya", tmp_path / "x") == 2
    assert "this run trained every weight, and has no LoRA" in capsys.readouterr().err
    assert export(run, "diffusers", tmp_path / "again") == 0
    a, b = (StableDiffusionPipeline.from_pretrained(folder).unet for folder in (run, tmp_path / "again"))
    assert torch.equal(answer(a), answer(b))
    assert not kohya_file(run).exists()


def test_a_pixel_run_exports_a_pipeline_and_no_single_file(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainConfig(
        model="ddpm", resolution=32, data=str(pictures), output_dir=str(tmp_path / "run"), max_train_steps=1,
        num_inference_steps=0, train_batch_size=2,
    )  # fmt: skip
    run = fine_tune(config)
    assert export(run, "diffusers", tmp_path / "again") == 0
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (run / weights).read_bytes()
    assert export(run, "single-file", tmp_path / "x") == 2
    assert "has no such form; choose diffusers or unet" in capsys.readouterr().err


@pytest.mark.parametrize(("family", "heads", "read"), [("sd15", 4, "[8, 8, 8]"), ("sd21", 2, "[1, 2, 4]")])
def test_a_unet_of_other_heads_is_refused_a_single_file_before_training(
    pictures: Path, tmp_path: Path, family: str, heads: int, read: str
) -> None:
    small_pipeline(family, attention_head_dim=heads).save_pretrained(tmp_path / "sd")
    config = TrainConfig(
        model=str(tmp_path / "sd"), data=str(pictures), prompt="a", resolution=64, export_formats=["single-file"],
        output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    own = [heads] * 3
    with pytest.raises(
        UsageError, match=re.escape(f"has {own} attention heads, and programs that open a single file")
    ) as refused:
        fine_tune(config)
    assert read in str(refused.value)
    assert not (tmp_path / "run").exists()
