"""What a resume compares, in whole runs of the embedded model."""

import importlib.metadata
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

from finetune.config import TrainConfig, load_resolved
from finetune.errors import UsageError
from finetune.models.loading import load_model
from finetune.models.weights import sampled_digest
from finetune.recipe import fine_tune
from finetune.run.provenance import check_provenance, recorded_threads, run_provenance, threads
from finetune.training import checkpoint
from tests.tiny_copy import copy_tiny


@pytest.fixture(autouse=True)
def global_generator_untouched() -> None:
    """Whole runs go through diffusers pipelines, which may draw from torch's global generator."""


def test_another_weight_anywhere_is_another_likeness() -> None:
    weights = {"large": torch.zeros(100_000), "small": torch.zeros(3)}
    before = sampled_digest(weights)
    assert sampled_digest({name: tensor.clone() for name, tensor in weights.items()}) == before
    assert sampled_digest(weights | {"small": torch.tensor([0.0, 0.0, 1.0])}) != before
    assert sampled_digest({name: tensor.half() for name, tensor in weights.items()}) != before


def test_only_what_gives_other_bits_is_told() -> None:
    then = run_provenance(load_model("tiny"), "digest", torch.device("cpu"), 2)
    now = json.loads(json.dumps(then))
    assert check_provenance(then, now, ()) == check_provenance({}, now, ()) == ""
    now["machine"]["torch"] = "99"
    now["processes"] = 1
    now["threads"] += 1
    assert check_provenance(then, now, ()) == f"torch: {then['machine']['torch']} -> 99; processes: 2 -> 1"


def test_threads_are_those_of_the_checkpoint_where_that_gives_the_same_bits() -> None:
    written = {"threads": 7, "processes": 1}
    assert recorded_threads(written, torch.device("cpu"), 1) == 7
    assert recorded_threads(written, torch.device("cpu"), 2) is None
    assert recorded_threads(written, torch.device("cuda"), 1) is None
    assert recorded_threads({}, torch.device("cpu"), 1) is None
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_a_checkpoint_says_what_wrote_it_and_another_base_is_refused(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_tiny(tmp_path / "base")
    given = {"model": str(tmp_path / "base"), "data": str(pictures), "output_dir": str(tmp_path / "out"), "rank": 2}
    given |= {"max_train_steps": 2, "num_inference_steps": 0, "lr_scheduler": "constant", "train_batch_size": 1}
    fine_tune(TrainConfig(**given))
    written = checkpoint.record(tmp_path / "out/checkpoint-2")["about"]
    assert written["threads"] == torch.get_num_threads()
    assert written["machine"]["torch"] == importlib.metadata.version("torch")

    unet = UNet2DConditionModel.from_pretrained(tmp_path / "base/unet")
    with torch.no_grad():
        next(unet.parameters()).add_(1)
    unet.save_pretrained(tmp_path / "base/unet")
    longer = given | {"max_train_steps": 3, "resume_from_checkpoint": "latest"}
    recorded = (tmp_path / "out/config.toml").read_bytes()
    with pytest.raises(UsageError, match="its weights differ from those that the checkpoint started from"):
        fine_tune(TrainConfig(**longer))
    assert (tmp_path / "out/config.toml").read_bytes() == recorded
    fine_tune(TrainConfig(**longer, allow_changed=["model"]))
    now = checkpoint.record(tmp_path / "out/checkpoint-3")["about"]
    assert now["base_model"] != written["base_model"]
    assert "no longer bit-identical" not in capsys.readouterr().out


def test_a_resume_of_other_pictures_and_seed_goes_on_where_that_is_allowed(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(pictures, tmp_path / "data")
    given = {"data": str(data), "output_dir": str(tmp_path / "out"), "rank": 2, "train_batch_size": 1}
    given |= {"max_train_steps": 2, "num_inference_steps": 0, "lr_scheduler": "constant", "lr_warmup_steps": 0}
    fine_tune(TrainConfig(**given))
    shown = (tmp_path / "out/pictures.jpg").read_bytes()
    changed = given | {"max_train_steps": 3, "resume_from_checkpoint": "latest", "seed": 5, "prompt": "a disc"}
    with pytest.raises(UsageError, match=r"prompt: None -> a disc; seed: 0 -> 5; --allow_changed goes on"):
        fine_tune(TrainConfig(**changed))
    with pytest.raises(UsageError, match="other options: seed: 0 -> 5"):
        fine_tune(TrainConfig(**changed, allow_changed=["prompt"]))
    Image.new("RGB", (64, 64), "green").save(data / "another.png")
    with pytest.raises(UsageError, match="--allow_changed goes on"):
        fine_tune(TrainConfig(**changed, allow_changed=["prompt", "seed"]))
    assert (tmp_path / "out/pictures.jpg").read_bytes() == shown
    fine_tune(TrainConfig(**changed, allow_changed=["prompt", "seed", "data"]))
    assert (tmp_path / "out/pictures.jpg").read_bytes() != shown
    assert checkpoint.record(tmp_path / "out/checkpoint-3")["step"] == 3
    recorded = load_resolved(tmp_path / "out/config.toml")
    assert (recorded.seed, recorded.allow_changed) == (5, ())


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_resume_with_another_frozen_part_is_refused(part: str, pictures: Path, tmp_path: Path) -> None:
    copy_tiny(tmp_path / "base")
    given = {"model": str(tmp_path / "base"), "data": str(pictures), "output_dir": str(tmp_path / "out"), "rank": 2}
    given |= {"max_train_steps": 1, "num_inference_steps": 0, "lr_scheduler": "constant", "train_batch_size": 1}
    fine_tune(TrainConfig(**given))
    (weights,) = (tmp_path / "base" / part).glob("*.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    longer = given | {"max_train_steps": 2, "resume_from_checkpoint": "latest"}
    with pytest.raises(UsageError, match=f"{part}: its weights differ from those that the checkpoint started from"):
        fine_tune(TrainConfig(**longer))
    fine_tune(TrainConfig(**longer, allow_changed=["model"]))


def test_options_of_the_optimizer_that_are_allowed_to_change_do(pictures: Path, tmp_path: Path) -> None:
    """Weight decay, LoRA+, a block's rate and an EMA change what a resumed run learns; another optimizer is refused."""
    given = {"data": str(pictures), "rank": 2, "max_train_steps": 1, "train_batch_size": 1, "num_inference_steps": 0}
    given |= {"lr_scheduler": "constant", "lr_warmup_steps": 0, "lora_target_modules": ["attn2.to_q"], "use_ema": False}
    fine_tune(TrainConfig(**given, output_dir=str(tmp_path / "out")))
    learned = []
    changes: list[dict[str, object]] = [{}, {"adam_weight_decay": 5.0}, {"loraplus_lr_ratio": 16.0}]
    changes += [{"block_learning_rate": ["up=0"]}, {"use_ema": True}]
    for number, change in enumerate(changes):
        folder = shutil.copytree(tmp_path / "out", tmp_path / str(number))
        longer = {**given, **change, "max_train_steps": 2, "resume_from_checkpoint": "latest"}
        allowed = {"allow_changed": list(change)} if change else {}
        fine_tune(TrainConfig(**longer, **allowed, output_dir=str(folder)))
        learned.append((folder / "pytorch_lora_weights.safetensors").read_bytes())
    assert len(set(learned)) == len(learned)
    longer = given | {"max_train_steps": 2, "resume_from_checkpoint": "latest", "allow_changed": ["optimizer"]}
    with pytest.raises(UsageError, match=r"optimizer: adamw -> sgd: no optimizer can take over .* --init_lora"):
        fine_tune(TrainConfig(**longer, optimizer="sgd", output_dir=str(tmp_path / "out")))
