"""The forgetting meter in runs: it changes nothing, and is complete after a resume."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from finetune.config import TrainConfig, replace
from finetune.errors import UsageError
from finetune.evaluators.forgetting import MOST_PROMPTS, generic_prompts
from finetune.models.families import FAMILIES
from finetune.recipe import fine_tune


@pytest.fixture(autouse=True)
def global_generator_untouched() -> None:
    """Whole runs go through diffusers pipelines, which may draw from torch's global generator."""


def options(pictures: Path, output: Path, **more: object) -> TrainConfig:
    basic = {"data": str(pictures), "output_dir": str(output), "max_train_steps": 2, "train_batch_size": 2, "rank": 4}
    basic |= {"lr_scheduler": "constant", "lr_warmup_steps": 0, "prompt": "an image", "num_inference_steps": 0}
    return TrainConfig(**(basic | more))


def readings(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "forgetting.jsonl").read_text().splitlines()]


def test_weights_are_those_of_a_run_without_it_and_a_resume_tells_the_same(pictures: Path, tmp_path: Path) -> None:
    plain = fine_tune(options(pictures, tmp_path / "plain", trigger="sks"))
    assert not (plain / "forgetting.jsonl").exists()
    config = options(pictures, tmp_path / "watched", trigger="sks", forgetting_prompts=3)
    watched = fine_tune(config)
    weights = [load_file(run / "pytorch_lora_weights.safetensors") for run in (plain, watched)]
    assert all(tensor.equal(weights[1][name]) for name, tensor in weights[0].items())
    start, end = readings(watched)
    assert start == {"step": 0, "forgetting": 0.0, "with_trigger": 0.0}
    assert end["step"] == 2
    assert 0 < end["forgetting"] != end["with_trigger"] > 0
    half = fine_tune(replace(config, output_dir=str(tmp_path / "half"), max_train_steps=1))
    middle = readings(half)[1]
    fine_tune(replace(config, output_dir=str(half), resume_from_checkpoint="latest"))
    assert readings(half) == [start, middle, end]


def test_where_it_cannot_be_it_is_not(pictures: Path, tmp_path: Path) -> None:
    assert not (fine_tune(options(pictures, tmp_path / "short", max_train_steps=1)) / "forgetting.jsonl").exists()
    with pytest.raises(UsageError, match="forgetting_prompts cannot be used here: it needs a model that takes text"):
        fine_tune(TrainConfig(model="ddpm", data=str(pictures), forgetting_prompts=4))


def test_each_family_has_64_prompts_to_be_asked() -> None:
    worlds = {family.probe_prompts for family in FAMILIES.values()}
    assert worlds == {"everyday", "tiny"}
    for probe_prompts in worlds:
        assert len(set(generic_prompts(probe_prompts))) == MOST_PROMPTS


def test_events_tell_of_all_that_it_does(pictures: Path, tmp_path: Path) -> None:
    more = {"forgetting_prompts": 1, "num_inference_steps": 1, "eval_batch_size": 1, "cache_dir": "none"}
    out = fine_tune(options(pictures, tmp_path / "out", **more))
    told = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    phases = [line["name"] for line in told if line["event"] == "phase"]
    assert list(dict.fromkeys(phases)) == ["loading", "forgetting", "sampling", "training", "exporting"]
    assert {line["name"] for line in told if line["event"] == "progress"} == {"encoding captions", "encoding images"}
    steps = [line for line in told if line["event"] == "step"]
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in steps] == [line["loss"] for line in metrics]
    assert steps[-1]["left"] == 0
    assert [line["path"] for line in told if line["event"] == "picture"] == ["samples/step-0.png", "samples/step-2.png"]
    assert [line["step"] for line in told if line["event"] == "forgetting"] == [0, 2]
    copies = [json.loads(line) for line in (out / "copies.jsonl").read_text().splitlines()]
    assert [line | {"at": 0, "event": "copies"} for line in copies] == [
        line | {"at": 0} for line in told if line["event"] == "copies"
    ]
    assert [(line["step"], line["pictures"]) for line in copies] == [(0, 1), (2, 1)]
    assert any("LoRA, rank 4" in line["text"] for line in told if line["event"] == "said")
    assert told[-1]["state"] == "done"
