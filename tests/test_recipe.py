"""Whole runs of the embedded model on a few tiny pictures."""

import importlib.util
import json
import os
import re
import signal
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import datasets
import pytest
import torch
from diffusers import DDPMPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from finetune.cli import parse_train
from finetune.config import TrainConfig, load_resolved, replace
from finetune.data.image_folder import ImageFolder
from finetune.data.sampler import steps_per_epoch
from finetune.errors import DataError, FinetuneError, Interrupted, UsageError
from finetune.evaluators.evaluator import is_multiple
from finetune.models.tiny import tiny_folder
from finetune.recipe import fine_tune
from finetune.training import checkpoint

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(autouse=True)
def global_generator_untouched() -> None:
    """Whole runs go through diffusers pipelines, which may draw from torch's global generator."""


def options(pictures: Path, output: Path, **more: object) -> TrainConfig:
    basic = {"data": str(pictures), "output_dir": str(output), "max_train_steps": 4, "train_batch_size": 2}
    basic |= {"num_inference_steps": 0}
    return TrainConfig(**(basic | ({"rank": 4} if more.get("method") != "full" else {}) | more))


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_in_bf16_alone_trains_goes_on_and_exports(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = options(
        pictures, tmp_path / "out", method="full", full_bf16=True, optimizer="adafactor", max_train_steps=2,
        train_batch_size=1, lr_scheduler="constant", lr_warmup_steps=0, checkpointing_steps=1, max_grad_norm=0,
    )  # fmt: skip
    out = fine_tune(config)
    on_the_way = replace(config, fused_backward_pass=True, output_dir=str(tmp_path / "fused"))
    other = fine_tune(on_the_way) / "unet/diffusion_pytorch_model.safetensors"
    assert "bf16 only, updates in the backward pass" in capsys.readouterr().out
    assert other.read_bytes() == (out / "unet/diffusion_pytorch_model.safetensors").read_bytes()
    straight = (out / "unet/diffusion_pytorch_model.safetensors").read_bytes()
    weights = load_file(out / "checkpoint-2/trainable.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    unet = StableDiffusionPipeline.from_pretrained(out).unet.state_dict()
    assert all(torch.equal(tensor.float(), unet[name]) for name, tensor in weights.items())
    (out / "result.json").unlink()
    checkpoint.remove(out / "checkpoint-2")
    fine_tune(config)
    assert f"resuming {out}/checkpoint-1" in capsys.readouterr().out
    assert (out / "unet/diffusion_pytorch_model.safetensors").read_bytes() == straight


def test_a_lora_run_leaves_what_it_promises(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = fine_tune(options(pictures, tmp_path / "out", sample_every=2, eval_batch_size=1, num_inference_steps=2))
    assert [line["step"] for line in metrics(out)] == [1, 2, 3, 4]
    assert set(metrics(out)[0]) == {"step", "loss", "grad_norm", "lr", "examples"}
    grids = {path.name for path in (out / "samples").iterdir()}
    assert grids == {"step-0.png", "step-2.png", "step-4.png", "before-after.png"}
    assert [step for step, _ in checkpoint.checkpoints(out)] == [4]
    result = json.loads((out / "result.json").read_text())
    # The weights are the same to the bit; some processors round by where a tensor lies in memory.
    assert result.pop("reloaded_output_difference") < 1e-6
    assert result == {"steps": 4, "trained": 4, "version": version("finetune-unet")}
    resolved = load_resolved(out / "config.toml")
    assert (resolved.method, resolved.resolution, resolved.lora_alpha, resolved.mixed_precision) == (
        "lora",
        64,
        4,
        "no",
    )
    StableDiffusionPipeline.from_pretrained(tiny_folder()).load_lora_weights(str(out))
    said = capsys.readouterr().out
    assert "6 images; 4 steps of batch size 2" in said
    assert "6 from .txt files (6 distinct)" in said


def test_a_full_run_changes_the_unet_and_neither_vae_nor_text_encoder(pictures: Path, tmp_path: Path) -> None:
    out = fine_tune(options(pictures, tmp_path / "out", method="full", use_ema=True))
    base, tuned = (StableDiffusionPipeline.from_pretrained(folder) for folder in (tiny_folder(), out))
    for part in ("vae", "text_encoder"):
        before, after = (getattr(pipeline, part).state_dict() for pipeline in (base, tuned))
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    before = load_file(tiny_folder() / "unet/diffusion_pytorch_model.safetensors")
    assert all(not torch.equal(tensor, tuned.unet.state_dict()[name]) for name, tensor in before.items())


def test_the_export_holds_the_averaged_weights_and_the_checkpoint_both(pictures: Path, tmp_path: Path) -> None:
    out = fine_tune(options(pictures, tmp_path / "out", use_ema=True, learning_rate=1e-2))
    state = checkpoint.load(out / "checkpoint-4")
    exported = load_file(out / LORA)
    for name, tensor in exported.items():
        key = name.removeprefix("unet.").replace(".weight", ".default.weight")
        assert torch.equal(tensor, state["ema"][key])
        assert not torch.equal(tensor, state["weights"][key])


def test_a_pixel_run_gives_a_ddpm_pipeline(pictures: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        model="ddpm", resolution=32, data=str(pictures), output_dir=str(tmp_path / "out"), max_train_steps=2,
        train_batch_size=2, sample_every=2, num_inference_steps=2, eval_batch_size=4,
    )  # fmt: skip
    out = fine_tune(config)
    assert DDPMPipeline.from_pretrained(out).unet.config["sample_size"] == 32
    assert Image.open(out / "samples/step-2.png").size[0] == 2 * 5 * 32 + 3 * 8


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_every_prediction_type_trains_and_keeps_its_name(pictures: Path, tmp_path: Path, prediction_type: str) -> None:
    out = fine_tune(options(pictures, tmp_path / "out", method="full", prediction_type=prediction_type, snr_gamma=5.0))
    assert StableDiffusionPipeline.from_pretrained(out).scheduler.config["prediction_type"] == prediction_type


def test_equal_seeds_give_equal_files_and_other_seeds_do_not(pictures: Path, tmp_path: Path) -> None:
    more = {"caption_dropout": 0.3, "random_flip": True, "lora_dropout": 0.1, "center_crop": False}
    a, b, c = (
        fine_tune(options(pictures, tmp_path / name, seed=seed, **more))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert (a / LORA).read_bytes() == (b / LORA).read_bytes()
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    assert (a / LORA).read_bytes() != (c / LORA).read_bytes()


def interrupted_after(pictures: Path, folder: Path, step: int, config: TrainConfig) -> None:
    """Send this process SIGINT as soon as step `step` has been logged."""

    def watch() -> None:
        log = folder / "metrics.jsonl"
        while not (log.exists() and len(log.read_text().splitlines()) >= step):
            done.wait(0.002)
        os.kill(os.getpid(), signal.SIGINT)

    done = threading.Event()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    with pytest.raises(Interrupted) as caught:
        fine_tune(config)
    thread.join()
    assert caught.value.exit_code == 130


def test_a_run_interrupted_and_resumed_equals_an_uninterrupted_one(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"use_ema": True, "lora_dropout": 0.1, "caption_dropout": 0.3, "random_flip": True}
    more |= {"max_train_steps": 16, "gradient_accumulation_steps": 2, "train_batch_size": 1}
    straight = fine_tune(options(pictures, tmp_path / "straight", **more))
    config = options(pictures, tmp_path / "cut", **more)
    interrupted_after(pictures, tmp_path / "cut", 5, config)
    (_, kept), = checkpoint.checkpoints(tmp_path / "cut")  # fmt: skip
    assert not (tmp_path / "cut/result.json").exists()
    resumed = fine_tune(config)
    assert f"resuming {kept}" in capsys.readouterr().out
    assert (resumed / LORA).read_bytes() == (straight / LORA).read_bytes()
    assert (resumed / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    for file in ("trainable", "optimizer", "ema"):
        name = f"checkpoint-16/{file}.safetensors"
        assert (resumed / name).read_bytes() == (straight / name).read_bytes()
    assert fine_tune(config) == resumed
    assert "this run is finished" in capsys.readouterr().out


def test_a_finished_run_can_be_made_longer_as_it_says_itself(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = {"lr_scheduler": "constant", "lr_warmup_steps": 0}
    straight = fine_tune(options(pictures, tmp_path / "straight", max_train_steps=6, **flat))
    config = options(pictures, tmp_path / "out", **flat)
    capsys.readouterr()
    fine_tune(config)
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Train longer")]
    assert said.endswith(f"--output_dir {tmp_path / 'out'} --resume_from_checkpoint latest --max_train_steps 8")
    longer = fine_tune(parse_train(said.replace("steps 8", "steps 6").split()[3:]))
    assert (longer / LORA).read_bytes() == (straight / LORA).read_bytes()


def test_what_happens_every_few_epochs_happens_when_they_are_over() -> None:
    every = steps_per_epoch(5, 4)  # 1.25, 2.5, 3.75, 5
    assert [step for step in range(1, 11) if is_multiple(step, every)] == [2, 3, 4, 5, 7, 8, 9, 10]
    assert [step for step in range(1, 11) if is_multiple(step, 4)] == [4, 8]
    assert not is_multiple(4, None)
    assert not is_multiple(4, 0)


def test_options_given_beside_a_runs_own_file_win_over_what_that_run_had_derived(
    make_pictures: Callable[..., Path], tmp_path: Path
) -> None:
    few, many = (make_pictures(tmp_path / str(n), count=n, captions=True) for n in (2, 5))
    config = TrainConfig(
        data=str(few), output_dir=str(tmp_path / "out"), num_train_epochs=2, rank=4, train_batch_size=1,
        num_inference_steps=0,
    )  # fmt: skip
    recorded = str(fine_tune(config) / "config.toml")
    assert load_resolved(Path(recorded)).max_train_steps == 4
    words = ["--config", recorded, "--output_dir", str(tmp_path / "again")]
    again = fine_tune(parse_train(words))
    assert (again / LORA).read_bytes() == (tmp_path / "out" / LORA).read_bytes()
    other = fine_tune(parse_train([*words[:2], "--output_dir", str(tmp_path / "other"), "--data", str(many)]))
    assert load_resolved(other / "config.toml").max_train_steps == 10
    longer = ["--num_train_epochs", "3", "--output_dir", str(tmp_path / "longer")]
    longest = fine_tune(parse_train([*words[:2], *longer]))
    assert load_resolved(longest / "config.toml").max_train_steps == 6


def test_checkpoints_are_kept_up_to_the_limit(pictures: Path, tmp_path: Path) -> None:
    out = fine_tune(options(pictures, tmp_path / "out", max_train_steps=6, checkpointing_steps=2))
    assert [step for step, _ in checkpoint.checkpoints(out)] == [4, 6]


def test_tensorboard_gets_the_metrics_and_the_grids(pictures: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = {"report_to": ["tensorboard"], "sample_every": 4, "num_inference_steps": 1, "eval_batch_size": 1}
    out = fine_tune(options(pictures, tmp_path / "out", **more))
    events = EventAccumulator(str(out / "logs/finetune-unet")).Reload()
    logged = [event.value for event in events.Scalars("train/loss")]
    assert logged == pytest.approx([line["loss"] for line in metrics(out)])
    assert [event.step for event in events.Images("samples")] == [0, 4]


def test_training_starts_from_the_pictures_alone_with_a_dataset_of_ones_own(tmp_path: Path) -> None:
    class Squares(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> tuple[Image.Image, str, str]:
            return Image.new("RGB", (64, 64), (80 * index, 0, 0)), "a square", str(index)

    config = TrainConfig(output_dir=str(tmp_path / "out"), max_train_steps=2, rank=4)
    assert (fine_tune(config, Squares()) / LORA).exists()


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"data": "nowhere"}, UsageError, "nowhere: no such folder"),
        ({"resolution": 66}, UsageError, "the nearest: 64 and 72"),
        ({"model": "sd16"}, UsageError, "sdxl, ddpm, tiny, .*-inpainting or a hub id; did you mean sd"),
        ({"mixed_precision": "fp16"}, UsageError, "a CPU cannot compute in fp16; allowed here is bf16"),
        ({"model": "ddpm", "method": "full", "prompt": "x", "resolution": 32}, UsageError, "takes no text"),
        pytest.param(
            {"report_to": ["trackio"]},
            UsageError,
            "report_to trackio needs a package",
            marks=pytest.mark.skipif(importlib.util.find_spec("trackio") is not None, reason="trackio is installed"),
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    pictures: Path, tmp_path: Path, more: dict, error: type, message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        fine_tune(options(pictures, tmp_path / "out", **more))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_unknown_folder_is_told_before_a_model_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--data nowhere: no such folder"):
        fine_tune(TrainConfig(model="sd15", data="nowhere", output_dir=str(tmp_path / "out")))


def test_options_hold_for_a_dataset_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [(Image.new("RGB", size, "red"), caption, str(size)) for size, caption in (((90, 64), ""), ((32, 70), "b"))]
    run = fine_tune(TrainConfig(max_train_steps=1, rank=4, prompt="a", trigger="sks", num_inference_steps=0), rows)
    config = TrainConfig(max_train_steps=1, rank=4, prompt="a", num_inference_steps=0)
    assert (run / LORA).read_bytes() != (fine_tune(config, rows) / LORA).read_bytes()


@pytest.mark.parametrize(
    ("dataset", "more", "message"),
    [
        ([], {}, "the dataset is empty"),
        ([(Image.new("RGB", (64, 64)), "a")], {}, r"dataset\[0\] is a tuple of 2; expected .PIL image, caption, id."),
        (
            [(torch.zeros(3, 64, 64), "a", "1")],
            {},
            r"dataset\[0\] is .Tensor, str, str.; expected .PIL image, caption, id.",
        ),
        ([(Image.new("RGB", (64, 64)), None, "1")], {}, "1 of 1 image without a caption .1.: give --prompt"),
        ([(Image.new("RGB", (64, 64)), "a", "1")], {"image_column": "x"}, "image_column cannot be used with a dataset"),
    ],
)
def test_a_dataset_of_ones_own_that_cannot_be_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: list, more: dict, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FinetuneError, match=message):
        fine_tune(TrainConfig(max_train_steps=1, **more), dataset)
    assert not (tmp_path / "runs").exists()


def test_a_dataset_with_a_transform_of_its_own_keeps_it(pictures: Path, tmp_path: Path) -> None:
    images = ImageFolder(pictures, prompt="x", resolution=32)
    for more, message in (({"trigger": "y"}, "trigger cannot be used"), ({}, "resolution = 64: .* makes 32")):
        with pytest.raises(UsageError, match=message):
            fine_tune(TrainConfig(output_dir=str(tmp_path / "out"), max_train_steps=1, **more), images)


def test_a_table_of_pictures_and_texts_is_taken_as_it_is(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = datasets.Dataset.from_dict(
        {"picture": [str(path) for path in sorted(pictures.glob("*.png"))], "text": ["a disc"] * 5 + [None]}
    )
    config = TrainConfig(
        output_dir=str(tmp_path / "out"), max_train_steps=1, rank=4, num_inference_steps=0, image_column="picture",
        prompt="a red disc",
    )  # fmt: skip
    fine_tune(config, rows)
    assert "5 from column, 1 from --prompt (2 distinct)" in capsys.readouterr().out


def test_other_datasets_of_ones_own_are_other_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(max_train_steps=1, rank=4, num_inference_steps=0)
    first = fine_tune(config, [(Image.new("RGB", (64, 64)), "a", "1")])
    second = fine_tune(config, [(Image.new("RGB", (64, 64)), "b", "1")])
    assert (first.name, second.name) == ("dataset-tiny", "dataset-tiny-2")


def test_a_pixel_model_of_another_size_draws_in_the_size_it_is_trained_at(pictures: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        model="ddpm", resolution=32, data=str(pictures), output_dir=str(tmp_path / "small"), max_train_steps=1,
        num_inference_steps=0,
    )  # fmt: skip
    small = fine_tune(config)
    large = fine_tune(replace(config, model=str(small), resolution=48, output_dir=str(tmp_path / "large")))
    assert DDPMPipeline.from_pretrained(large).unet.config["sample_size"] == 48


def test_a_picture_without_any_caption_is_an_error(make_pictures: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_pictures(tmp_path / "data", count=3)
    (folder / "01.txt").write_text("a disc")
    with pytest.raises(UsageError, match=r"2 of 3 images without a caption \(00.png, 02.png\): give --prompt"):
        fine_tune(options(folder, tmp_path / "out"))


def test_bad_pictures_are_named_and_the_rest_is_trained_on(
    make_pictures: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_pictures(tmp_path / "data", count=4, captions=True)
    (folder / "00.png").write_bytes(b"")
    whole = (folder / "01.png").read_bytes()
    (folder / "01.png").write_bytes(whole[: len(whole) // 2])
    (folder / "lonely.txt").write_text("no image")
    fine_tune(options(folder, tmp_path / "out", max_bad_fraction=0.5))
    said = capsys.readouterr().out
    assert "2 images" in said
    assert "2 images quarantined: 00.png" in said
    assert "caption files without an image (1): lonely.txt" in said
    for path in folder.glob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="none of 4 images can be trained on"):
        fine_tune(options(folder, tmp_path / "out"))


def test_a_run_shows_how_far_it_is_without_a_terminal(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fine_tune(options(pictures, tmp_path / "out", optimizer="prodigy"))
    said = capsys.readouterr()
    lines = [line for line in said.out.splitlines() if line.startswith("step ")]
    assert len(lines) == 1  # less than half a minute: the last step alone
    assert re.fullmatch(r"step 4 of 4: loss 0\.\d{4}, lr [\d.e-]+, [\d.]+ images/s, \d+\.\d GB", lines[0])
    assert said.err == ""  # no bars of other libraries, nor of ours
    assert "decoupled" not in said.out
