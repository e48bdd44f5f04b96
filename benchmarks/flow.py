"""Whether the loss of flow matching makes the embedded model draw in fewer steps: obedience, read by the judge.

    python benchmarks/flow.py

Trains every weight of tiny for 300 steps on pictures of its own world: once with `--prediction_type flow` (Diff2Flow:
the UNet goes on predicting noise), and once without, for comparison. Draws with 20 and with 8 steps of DDIM and of
Euler's method.
"""

import argparse
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, EulerDiscreteScheduler
from tiny import command, draw_scenes, load_pipeline, obedience, say

PICTURES, STEPS = 960, 300
SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "DDIM": (DDIMScheduler, {}),
    "DDIM, trailing timesteps": (DDIMScheduler, {"timestep_spacing": "trailing"}),
    "Euler, trailing timesteps": (EulerDiscreteScheduler, {"timestep_spacing": "trailing"}),
}
RUNS = {"flow": ("--prediction_type", "flow"), "noise": ()}


def tell(who: str, pipeline: Any) -> None:
    """Print the shares of colour, ground and shape that are right, for each sampler and number of steps."""
    for name, (scheduler, settings) in SAMPLERS.items():
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **settings)
        for steps in (20, 8):
            shares = obedience(pipeline, steps)
            figures = ", ".join(f"{shares[what]:.1%}" for what in ("colour", "ground", "shape"))
            say(f"{who}, {name}, {steps} steps", figures)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what training with flow matching does to tiny.")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-flow"), help="folder for runs and pictures")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    options = parser.parse_args()
    data = draw_scenes(options.work.absolute() / "world", PICTURES, seed=5, digits=4)
    tell("tiny", load_pipeline())
    for name, more in RUNS.items():
        run = options.work.absolute() / f"{name}-{options.learning_rate:g}"
        command(
            "--model", "tiny", "--data", data, "--method", "full", "--output_dir", run, "--max_train_steps", str(STEPS),
            "--train_batch_size", "16", "--learning_rate", str(options.learning_rate), "--sample_every", "0",
            "--num_inference_steps", "0", "--forgetting_prompts", "0", "--validation_fraction", "0",
            "--lr_warmup_steps", "20", *more,
        )  # fmt: skip
        tell(f"{STEPS} steps with {name}", load_pipeline(run))


if __name__ == "__main__":
    main()
