"""Validation in runs: it changes nothing, and what it tells is complete."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.config import TrainConfig, load_resolved, replace
from finetune.data.image_folder import ImageFolder
from finetune.data.split import held_out
from finetune.errors import DataError, UsageError
from finetune.evaluators.validation import plan_validation
from finetune.models.model_info import locate
from finetune.recipe import fine_tune
from finetune.run.build_dataset import open_pictures
from finetune.run.exports import load_trained
from tests.data.test_near_duplicates import scene

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(autouse=True)
def global_generator_untouched() -> None:
    """Whole runs go through diffusers pipelines, which may draw from torch's global generator."""


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures to validate on."""
    folder = tmp_path_factory.mktemp("others")
    for seed in range(3):
        scene(seed, 64, 64).save(folder / f"{seed}.png")
    return folder


def options(pictures: Path, output: Path, **more: object) -> TrainConfig:
    basic = {"data": str(pictures), "output_dir": str(output), "max_train_steps": 4, "train_batch_size": 2, "rank": 4}
    return TrainConfig(**(basic | {"prompt": "an image", "num_inference_steps": 0} | more))


def validations(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]


def test_weights_are_those_of_a_run_without_it(pictures: Path, others: Path, tmp_path: Path) -> None:
    plain = fine_tune(options(pictures, tmp_path / "plain", lora_dropout=0.1))
    more = {"validation_data": str(others), "validate_every": 1, "lora_dropout": 0.1}
    watched = fine_tune(options(pictures, tmp_path / "watched", **more))
    assert load_bytes(watched) == load_bytes(plain)
    assert (watched / "metrics.jsonl").read_bytes() == (plain / "metrics.jsonl").read_bytes()
    assert not (plain / "validation.jsonl").exists()
    found = validations(watched)
    assert [line["step"] for line in found] == [0, 1, 2, 3, 4]
    assert all(low < mean < high for mean, low, high in (line["change"] for line in found[1:]))
    assert len({line["loss"] for line in found}) == 5
    ledger = json.loads((watched / "ledger.json").read_text())
    assert (ledger["trained"], ledger["held_out"], ledger["visited"]) == (6, 3, 6)


def load_bytes(folder: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(folder / LORA).items()}


def test_pictures_held_out_are_as_if_they_were_not_there(tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    for seed in range(20):
        scene(seed, 64, 64).save(tmp_path / f"all/{seed:02d}.png")
    split = fine_tune(options(tmp_path / "all", tmp_path / "split", max_train_steps=12))
    whole = ImageFolder(tmp_path / "all", prompt="an image", resolution=64)
    held = held_out(whole, 0.1, 0)
    ledger = json.loads((split / "ledger.json").read_text())
    assert ledger["held_out"] == len(held) >= 2
    assert ledger["visited"] == ledger["trained"] == 20 - len(held)
    shutil.copytree(tmp_path / "all", tmp_path / "fewer")
    for index in held:
        (tmp_path / "fewer" / whole.ids[index]).unlink()
    fewer = fine_tune(options(tmp_path / "fewer", tmp_path / "alone", max_train_steps=12, validation_fraction=0))
    assert load_bytes(split) == load_bytes(fewer)


def test_a_resumed_run_tells_what_an_uninterrupted_one_tells(pictures: Path, others: Path, tmp_path: Path) -> None:
    more = {"validation_data": str(others), "validate_every": 1, "lr_scheduler": "constant", "lr_warmup_steps": 0}
    config = options(pictures, tmp_path / "once", **more)
    once = fine_tune(config)
    twice = fine_tune(replace(config, output_dir=str(tmp_path / "twice"), max_train_steps=2))
    more = {"resume_from_checkpoint": "latest", "max_train_steps": 4, "output_dir": str(tmp_path / "twice")}
    fine_tune(replace(config, **more))
    assert (twice / "validation.jsonl").read_bytes() == (once / "validation.jsonl").read_bytes()


def test_a_run_that_goes_on_for_longer_validates_on_the_same(pictures: Path, others: Path, tmp_path: Path) -> None:
    lines = validations(fine_tune(options(pictures, tmp_path / "out", validation_data=str(others), max_train_steps=1)))
    assert [len(lines[0]["losses"]), len(lines[0]["losses"][0])] == [2, 3]
    longer = replace(load_resolved(tmp_path / "out/config.toml"), max_train_steps=400)
    found = open_pictures(longer, locate(longer.model), None).first
    anew, kept = plan_validation(longer, found), plan_validation(longer, found, lines)
    assert (len(anew.examples), anew.draws) == (3, 12)
    assert (len(kept.examples), kept.draws, kept.digest) == (2, 3, lines[0]["of"])
    assert plan_validation(replace(longer, seed=1), found, lines).draws == 12  # another run's lines


def test_unasked_validations_take_their_share_of_the_time(pictures: Path, others: Path, tmp_path: Path) -> None:
    out = fine_tune(options(pictures, tmp_path / "out", validation_data=str(others), max_train_steps=40))
    found = [line["step"] for line in validations(out)]
    timings = [json.loads(line) for line in (out / "timings.jsonl").read_text().splitlines()]
    (first, *_) = took = [line["validation_seconds"] for line in timings if "validation_seconds" in line]
    step = sorted(line["seconds"] for line in timings if 1 < line.get("step", 0) <= 6 and "seconds" in line)[2]
    assert len(took) == len(found) >= 2
    assert (found[0], found[-1]) == (0, 40)
    assert len(found) == 2 or len(found) * first <= 0.05 * 40 * step


def test_pictures_that_are_trained_on_are_set_aside(
    pictures: Path, others: Path, tmp_path: Path, make_pictures: Callable[..., Path]
) -> None:
    mixed = shutil.copytree(others, tmp_path / "mixed")
    shutil.copy(pictures / "00.png", mixed / "copy.png")
    out = fine_tune(options(pictures, tmp_path / "out", validation_data=str(mixed), max_train_steps=1))
    ledger = json.loads((out / "ledger.json").read_text())
    assert (ledger["held_out"], ledger["skipped"]) == (3, {"held out, but trained on elsewhere": 1})
    copies = make_pictures(tmp_path / "copies", count=2)
    with pytest.raises(UsageError, match=r"copies: 0 images, and 2 that are trained on or near dup"):
        fine_tune(options(pictures, tmp_path / "no", validation_data=str(copies)))
    scene(9, 64, 64).save(copies / "new.png")
    with pytest.raises(UsageError, match=r"copies: 1 image, and 2 that .*; at least 2 are needed"):
        fine_tune(options(pictures, tmp_path / "no", validation_data=str(copies)))


def test_a_run_whose_validation_loss_rises_ends_and_gives_its_best_step(
    pictures: Path, others: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = {"lr_scheduler": "constant", "lr_warmup_steps": 0, "learning_rate": 0.05, "method": "full", "rank": 16}
    same |= {"max_grad_norm": 0.0, "use_ema": False}
    config = options(pictures, tmp_path / "out", **same, validation_data=str(others), validate_every=1, early_stop=True)
    config = replace(config, config.given - {"rank"}, max_train_steps=30)
    out = fine_tune(config)
    losses = [line["loss"] for line in validations(out)[1:]]
    best, trained = losses.index(min(losses)) + 1, len(losses)
    result = json.loads((out / "result.json").read_text())
    assert (result["steps"], result["trained"]) == (best, trained)
    assert best + 2 <= trained < 30
    assert f"step {best} of {trained} had the lowest validation loss and is exported" in capsys.readouterr().out
    plain = fine_tune(replace(config, output_dir=str(tmp_path / "plain"), early_stop=False, max_train_steps=best))
    name = "unet/diffusion_pytorch_model.safetensors"
    exported = (out / name).read_bytes()
    assert exported == (plain / name).read_bytes()
    (out / "result.json").unlink()
    assert fine_tune(config) == out  # killed after its last checkpoint
    assert (out / name).read_bytes() == exported
    assert json.loads((out / "result.json").read_text()) == result
    taken, _ = load_trained(load_resolved(out / "config.toml"), out)  # by `export` and `--export_formats`
    weights = load_file(out / name)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in taken.unet.state_dict().items())
    page = (out / "report.html").read_text()
    assert f"step {best}" in page
    assert "DiffusionPipeline.from_pretrained" in page
    assert "ComfyUI" not in page  # which does not know tiny


def test_what_cannot_be_validated_on_is_told(pictures: Path, others: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no image found"):
        fine_tune(options(pictures, tmp_path / "out", validation_data=str(tmp_path / "empty")))
    with pytest.raises(UsageError, match=r"validation_data .* lies inside --data"):
        fine_tune(options(pictures, tmp_path / "out", validation_data=str(pictures)))
    with pytest.raises(UsageError, match="validation_fraction cannot be used here: it needs validation_data left out"):
        fine_tune(options(pictures, tmp_path / "out", validation_data=str(others), validation_fraction=0.2))
    with pytest.raises(UsageError, match="early_stop needs images that are held out"):
        fine_tune(options(pictures, tmp_path / "out", early_stop=True))
