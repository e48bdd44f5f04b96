"""Whether the forgetting meter tells what is forgotten: its number beside measured obedience, over runs of all kinds.

    python benchmarks/forgetting.py               # about 40 minutes; goes on where it was cut off
    python benchmarks/forgetting.py --remedies    # about 10: what class pictures and prior prediction save

Each run fine-tunes the embedded model on butterflies; the judge then reads how many held-out prompts of its old world
are still drawn right. Prints both numbers of each run, and their rank correlation.
"""

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import DEMO, command, draw_scenes, load_pipeline, obedience, say

import finetune as ft
from finetune.evaluators.forgetting import MOST_PROMPTS, STATES, generic_prompts
from finetune.training.forgetting import Probe, probe_drift, record_probe

RUNS: tuple[dict[str, Any], ...] = (
    *({"method": "lora", "learning_rate": r, "max_train_steps": s} for r, s in product((5e-4, 2e-3, 6e-3), (40, 160))),
    *(
        {"method": "full", "learning_rate": r, "max_train_steps": s}
        for r, s in product((1e-4, 5e-4, 1.5e-3), (40, 160))
    ),
    {"method": "lora", "learning_rate": 2e-3, "max_train_steps": 160, "rank": 2},
    {"method": "full", "learning_rate": 4e-3, "max_train_steps": 20},
)
"""Method, rate, length and size of each."""


REMEDIES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "class pictures": {"class_data": "class"},
    "prior prediction": {"class_data": "class", "prior_prediction": "True"},
}
"""Against forgetting, in the LoRA that learns at 2e-3 for 160 steps."""

CLASS_PICTURES = 48


class Meter:
    """The meter as runs have it, over the first of the prompts."""

    def __init__(self, prompts: int = MOST_PROMPTS, states: int = STATES) -> None:
        self.model = ft.load_model("tiny")
        objective = ft.NoisePrediction(self.model.scheduler)
        source = torch.Generator().manual_seed(0)
        noise = torch.randn(prompts, 4, 16, 16, generator=source)
        cond, empty = (
            self.model.conditioner.encode(texts) for texts in (generic_prompts("tiny")[:prompts], [""] * prompts)
        )
        self.questions: Probe = record_probe(
            self.model.unet, objective, cond, empty, noise, states=states, batch_size=8
        )

    def read(self, run: Path | None) -> float:
        return probe_drift(load_pipeline(run).unet, self.questions, batch_size=8)


def obeyed(work: Path, options: dict[str, Any] | None) -> float:
    """The share of old prompts of which colour, ground and shape are drawn right, in the mean; made once."""
    run = None if options is None else work / "-".join(map(str, options.values()))
    on_progress = (run or work) / "obedience.json"
    if not on_progress.exists():
        if options is not None:
            given = [f"--{name}={value}" for name, value in options.items()]
            off = ("--sample_every", "0", "--validation_fraction", "0", "--forgetting_prompts", "0")
            command("--config", DEMO, *given, "--output_dir", run or "", "--overwrite_output_dir", *off)
        on_progress.write_text(json.dumps(obedience(load_pipeline(run))))
    shares = json.loads(on_progress.read_text())
    return float(np.mean([shares[name] for name in ("colour", "ground", "shape")]))


def ranks(values: list[float]) -> np.ndarray:
    return np.argsort(np.argsort(values)).astype(float)


def compare_remedies(work: Path) -> None:
    """The same run with each remedy: how much is forgotten, and what is learned, by the loss on held-out pictures."""
    meter = Meter()
    for name, remedy in REMEDIES.items():
        options = {"method": "lora", "learning_rate": 2e-3, "max_train_steps": 160, **remedy}
        if remedy:
            # Pictures of the old world, drawn with another seed than those that obedience is measured on.
            options["class_data"] = draw_scenes(work / "class", CLASS_PICTURES, seed=13, digits=2)
        run = work / name.replace(" ", "-")
        if not (run / "result.json").exists():
            given = [f"--{option}={value}" for option, value in options.items()]
            off = ("--sample_every", "0", "--forgetting_prompts", "0")
            command("--config", DEMO, *given, "--output_dir", run, "--overwrite_output_dir", *off)
        shares = obedience(load_pipeline(run))
        kept = float(np.mean([shares[trait] for trait in ("colour", "ground", "shape")]))
        last = json.loads((run / "validation.jsonl").read_text().splitlines()[-1])
        on_progress = (
            f"forgetting {meter.read(run):.1%}, obedience {kept:.1%}, validation loss {last['change'][0]:+.4f}"
        )
        say(f"LoRA, 160 steps at 2e-3, with {name}", on_progress)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the forgetting meter with obedience.")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-forgetting"), help="folder for the runs")
    parser.add_argument("--remedies", action="store_true", help="compare remedies only")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if options.remedies:
        compare_remedies(work)
        return
    say("tiny before any run: obedience", f"{obeyed(work, None):.1%}")
    kept = [obeyed(work, options) for options in RUNS]
    folders = [work / "-".join(map(str, options.values())) for options in RUNS]
    for prompts in (MOST_PROMPTS, 16, 4):
        meter = Meter(prompts)
        drifts = [meter.read(folder) for folder in folders]
        if prompts == MOST_PROMPTS:
            for folder, drifted, share in zip(folders, drifts, kept, strict=True):
                say(folder.name, f"forgetting {drifted:.1%}, obedience {share:.1%}")
        correlation = -np.corrcoef(ranks(drifts), ranks(kept))[0, 1]
        say(f"{prompts} prompts: rank correlation with disobedience, {len(RUNS)} runs", f"{correlation:.2f}", "0.8")


if __name__ == "__main__":
    main()
