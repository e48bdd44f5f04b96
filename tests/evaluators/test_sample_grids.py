"""The pictures that a run leaves of itself."""

from pathlib import Path

import pytest
from safetensors import safe_open

from finetune.config import TrainConfig, replace
from finetune.evaluators.sample_grids import _drawn_of
from finetune.evaluators.sample_prompts import SamplePrompt
from finetune.recipe import fine_tune

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(autouse=True)
def global_generator_untouched() -> None:
    """Whole runs go through diffusers pipelines, which may draw from torch's global generator."""


def options(pictures: Path, output: Path, **more: object) -> TrainConfig:
    basic = {"data": str(pictures), "output_dir": str(output), "max_train_steps": 4, "train_batch_size": 2, "rank": 4}
    return TrainConfig(**(basic | more))


def test_a_short_run_still_draws_before_and_after(pictures: Path, tmp_path: Path) -> None:
    quick = {"num_inference_steps": 2}
    out = fine_tune(
        TrainConfig(data=str(pictures), output_dir=str(tmp_path / "out"), max_train_steps=2, rank=4, **quick)
    )
    assert {path.name for path in (out / "samples").iterdir()} == {"step-0.png", "step-2.png", "before-after.png"}
    with safe_open(out / "out.safetensors", "pt") as file:
        assert file.metadata()["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    longer = {"max_train_steps": 3, "resume_from_checkpoint": "latest", "lr_scheduler": "cosine"}
    config = TrainConfig(data=str(pictures), output_dir=str(tmp_path / "more"), max_train_steps=2, rank=4, **quick)
    flat = replace(config, lr_scheduler="constant", lr_warmup_steps=0)
    fine_tune(flat)
    extended = fine_tune(replace(flat, **{**longer, "lr_scheduler": "constant"}))
    assert {path.name for path in (extended / "samples").iterdir()} == {
        "step-0.png", "step-2.png", "step-3.png", "before-after.png",
    }  # fmt: skip


def grids_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "samples").iterdir()}


def test_the_end_of_a_run_is_repeated_from_wherever_it_was_cut_off(pictures: Path, tmp_path: Path) -> None:
    config = options(pictures, tmp_path / "out", sample_every=2, eval_batch_size=1, num_inference_steps=2)
    out = fine_tune(config)
    exported, grids = (out / LORA).read_bytes(), grids_of(out)
    for lost in (["step-4.png"], ["before-after.png"], ["step-0.png", "step-4.png", "before-after.png"]):
        for name in (*(f"samples/{name}" for name in lost), "result.json", LORA):
            (out / name).unlink()
        assert fine_tune(config) == out  # killed after the last checkpoint
        assert grids_of(out) == {name: grids[name] for name in grids_of(out)}
        assert set(lost) <= set(grids_of(out))
        assert (out / LORA).read_bytes() == exported


def test_grids_of_other_prompts_or_of_a_later_step_do_not_stay(pictures: Path, tmp_path: Path) -> None:
    drawn = {"sample_every": 2, "eval_batch_size": 1, "num_inference_steps": 2, "checkpoints_total_limit": 0}
    config = options(pictures, tmp_path / "out", checkpointing_steps=2, sample_prompts=["a disc"], **drawn)
    out = fine_tune(config)
    first = grids_of(out)
    other = replace(config, sample_prompts=["a red disc"], resume_from_checkpoint=str(out / "checkpoint-2"))
    fine_tune(other)
    assert all(grids_of(out)[name] != content for name, content in first.items())
    fine_tune(replace(config, resume_from_checkpoint=str(out / "checkpoint-2")))
    assert grids_of(out) == first


def test_grids_are_known_by_what_979e0b0_knew_them_by() -> None:
    prompt = SamplePrompt("a dog", "blur", 4, None, 7, unknown=("--x",))
    settings = "num_inference_steps=4, guidance_scale=None, seed=7, other_size=False"
    assert _drawn_of(prompt) == f"SamplePrompt(text='a dog', negative='blur', {settings})"
