"""Whether validation can be trusted: where early stopping ends, how often its interval is right, and what it costs.

    python benchmarks/validation.py                # everything: about an hour; goes on where it was cut off
    python benchmarks/validation.py coverage       # some of: stop, coverage, demo

What is true is measured on 500 fresh butterflies. Runs train in this process, as the demo does unless said.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from judge import drawn, invented
from safetensors.torch import load_file
from tiny import DEMO, ROOT, say
from torch import Tensor

sys.path.append(str(ROOT / "examples"))
from draw_butterflies import describe

import finetune as ft
from finetune import recipe
from finetune.config import load_resolved, read_options
from finetune.results import metrics_log
from finetune.results.events import Events
from finetune.training.validation import paired, validation_losses

FRESH, FRESH_SEED, DRAWS = 500, 90, 2
SEEDS, LONG, EVERY = 5, 300, 20
STEPS = range(EVERY, LONG + 1, EVERY)
RUNS, SHORT = 40, 60


@lru_cache(maxsize=1)
def fresh(work: Path) -> ft.EncodedDataset:
    folder = pictures(work / "fresh", FRESH_SEED, FRESH)
    return ft.encode(ft.ImageFolder(folder, None, resolution=64), ft.load_model("tiny"), cache_dir=work / "cache")


def pictures(folder: Path, seed: int, count: int) -> Path:
    """A folder of drawn butterflies with captions, made once."""
    if not folder.exists():
        part = folder.with_suffix(".part")
        part.mkdir(parents=True, exist_ok=True)
        butterflies = invented(seed, count)
        for number, (butterfly, picture) in enumerate(zip(butterflies, drawn(butterflies), strict=True)):
            picture.save(part / f"{number:03}.png")
            (part / f"{number:03}.txt").write_text(describe(butterfly))
        part.rename(folder)
    return folder


def train(folder: Path, **options: Any) -> Path:
    """A run as the demo's, without pictures, unless it is there already."""
    if not (folder / "result.json").exists():
        given = {"sample_every": 0, "forgetting_prompts": 0, "overwrite_output_dir": True, "output_dir": str(folder)}
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".log").open("w") as log, redirect_stdout(log):
            ft.fine_tune(ft.TrainConfig(**read_options(DEMO) | given | options))
    return folder


def losses(work: Path, weights: Path | None) -> Tensor:
    """(FRESH, DRAWS) of the embedded model, or with the averaged weights of a checkpoint in its place."""
    model = ft.load_model("tiny")
    if weights is not None:
        ema_weights = {name: tensor.float() for name, tensor in load_file(weights / "ema.safetensors").items()}
        left = model.unet.load_state_dict(ema_weights, strict=False)
        assert not left.unexpected_keys
        assert not set(left.missing_keys) & {name for name, _ in model.unet.named_parameters()}
    objective = ft.NoisePrediction(model.scheduler, snr_gamma=5.0)
    return validation_losses(
        model.unet, model.encoder, objective, fresh(work), range(FRESH), draws=DRAWS, seed=1, batch_size=50
    )


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What `make` answered when it was first called."""
    if not path.exists():
        path.write_text(json.dumps(make()))
    return json.loads(path.read_text())


def validations(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / metrics_log.VALIDATION).read_text().splitlines()]


def losses_on_the_way(work: Path, run: Path) -> list[float]:
    """After each of STEPS, on fresh pictures."""
    return [losses(work, run / f"checkpoint-{step}").mean().item() for step in STEPS]


def measure_stop(work: Path) -> None:
    """12 pictures, validated on 12 others: where it stops, beside the step with the least loss on fresh ones."""
    for seed in range(SEEDS):
        data = {
            "data": str(pictures(work / f"twelve-{seed}", 100 + seed, 12)),
            "validation_data": str(pictures(work / f"others-{seed}", 200 + seed, 12)),
        }
        options = data | {"seed": seed, "num_train_epochs": None, "max_train_steps": LONG, "validate_every": EVERY}
        whole = train(work / f"whole-{seed}", **options, checkpointing_steps=EVERY, checkpoints_total_limit=len(STEPS))
        stopped = train(work / f"stopped-{seed}", **options, early_stop=True)
        true = kept(work / f"true-{seed}.json", partial(losses_on_the_way, work, whole))
        told = [record["loss"] for record in validations(whole)]
        taken = int(json.loads((stopped / "result.json").read_text())["steps"])
        ended = max(record["step"] for record in validations(stopped))
        shape = "falls and rises" if min(told) < min(told[0], told[-1]) else "does not rise"
        say(f"12 pictures, seed {seed}: validation loss", f"{told[0]:.4f}, {min(told):.4f}, {told[-1]:.4f}: {shape}")
        best = STEPS[int(np.argmin(true))]
        say("  stopped at; taken; best on fresh ones", f"{ended}; {taken}; {best}", "taken within 20 % of the best")
        lost = f"{min(true):.4f}; {true[STEPS.index(taken)]:.4f}; {true[-1]:.4f}"
        say("  loss on fresh ones: least; of what was taken; at the end", lost)
    demo = train(work / "demo-early", early_stop=True)
    ended, length = validations(demo)[-1]["step"], load_resolved(demo / "config.toml").max_train_steps
    say("the demo with --early_stop ends at", f"{ended} of {length}", "its end")


def measure_coverage(work: Path) -> None:
    """Short runs on 48 other pictures each: does the interval of the change hold the change on fresh ones?"""
    before = torch.tensor(kept(work / "before.json", lambda: losses(work, None).tolist()))
    inside, inpainting_channels = 0, []
    for seed in range(RUNS):
        data = pictures(work / f"short-data-{seed}", 300 + seed, 48)
        run = train(work / f"short-{seed}", data=str(data), seed=seed, num_train_epochs=None, max_train_steps=SHORT)
        after = kept(work / f"short-{seed}.json", lambda run=run: losses(work, run / f"checkpoint-{SHORT}").tolist())
        true = paired(before, torch.tensor(after)).mean
        mean, low, high = validations(run)[-1]["change"]
        inside += low <= true <= high
        inpainting_channels.append((mean, true, (high - low) / 2))
    say(f"{RUNS} runs of {SHORT} steps: the interval holds it", f"{inside} ({inside / RUNS:.0%})", "90 to 99 %")
    told, true, half = np.mean(inpainting_channels, axis=0)
    say("  the change: told; true; half an interval (means)", f"{told:.4f}; {true:.4f}; {half:.4f}")


def measure_demo(work: Path) -> None:
    """What of the demo's time goes into validation, the meter, events and the report."""
    took = {"events": 0.0, "report": 0.0}

    def timed(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return plain(*args, **kwargs)
            finally:
                took[name] += time.perf_counter() - start

        return call

    folder = work / "demo"
    with (
        mock.patch.object(Events, "emit", timed("events", Events.emit)),
        mock.patch.object(recipe, "report", timed("report", recipe.report)),
        folder.with_suffix(".log").open("w") as log,
        redirect_stdout(log),
    ):
        start = time.perf_counter()
        ft.fine_tune(ft.TrainConfig(**read_options(DEMO) | {"output_dir": str(folder), "overwrite_output_dir": True}))
        whole = time.perf_counter() - start
    for name in ("validation", "forgetting", "grid"):
        took[name] = sum(record.get(f"{name}_seconds", 0.0) for record in metrics_log.timings(folder))
    for name, seconds in took.items():
        say(f"the demo, {whole:.0f} s: {name}", f"{seconds:.2f} s, {seconds / whole:.1%}")
    measured = sum(seconds for name, seconds in took.items() if name != "grid") / whole
    say("  all but the grids", f"{measured:.1%}", "6 %")


MEASURES = {"stop": measure_stop, "coverage": measure_coverage, "demo": measure_demo}


def main(chosen: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measures", nargs="*", default=list(MEASURES), help="stop, coverage, demo")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-validation"), help="folder for the runs")
    options = parser.parse_args(chosen)
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    for name in options.measures:
        MEASURES[name](work)


if __name__ == "__main__":
    main()
