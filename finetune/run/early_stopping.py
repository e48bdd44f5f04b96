"""Early stopping: the weights of the best validation are kept, and a loss that has risen since ends the run."""

import json
from collections.abc import Mapping
from math import ceil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from finetune.atomic_io import write_whole
from finetune.run.context import Run
from finetune.run.validation import best_step, measured, steps_between_validations
from finetune.training.validation import chance_of_rise

BEST = "best.safetensors"

_RUNNING = 2
"""Validations in a row that must show a rise."""

_LEVEL = 0.025
"""Of the one-sided test that the loss has risen, for all validations of a run together."""


def save_best(run: Run) -> None:
    """Keep the weights, as they would be exported, where no validation had a smaller loss than that of this step."""
    step = run.trainer.steps_done
    if best_step(run) != step:
        return
    with run.trainer.export_weights():
        weights = {name: p.detach().cpu().contiguous() for name, p in run.trainer.parameters.items()}
    write_whole(run.folder / BEST, save(weights, {"step": str(step)}))


def should_stop(run: Run) -> bool:
    """Whether the last validations lie above the best, which is what the run has learned since it was there.

    The best of many lies low by chance too. So each of the last is tested against it at 2.5 % divided by the number of
    validations that the run plans (Bonferroni's correction for having chosen the best among them).
    """
    losses, best = measured(run), best_step(run)
    every = steps_between_validations(run)
    if best is None or every is None:
        return False
    return rises(losses, best, planned=ceil(run.config.max_train_steps / every))


def rises(losses: Mapping[int, torch.Tensor], best: int, *, planned: int) -> bool:
    """Whether the loss at each of the last steps is significantly above that at the best one.

    Args:
        losses: step -> (examples, draws), the same ones each time.
        best: the step with the least mean loss.
        planned: how many validations the whole run has; the level is 2.5 % divided by it.
    """
    last = sorted(losses)[-_RUNNING:]
    if len(last) < _RUNNING or last[0] <= best:
        return False
    return all(chance_of_rise(losses[best], losses[step]) < _LEVEL / planned for step in last)


@torch.no_grad()
def restore_best(run: Run) -> None:
    """Put the kept weights in the place of the last, if another validation than the last was the best."""
    trainer, best, path = run.trainer, best_step(run), run.folder / BEST
    if best in (None, trainer.steps_done):
        return
    saved_step = _step_of(path)
    if saved_step != best:  # only where a run went on from an older checkpoint to other bits, as on another machine
        print(f"{'note':>10}  the weights of step {best}, which had the least validation loss, were not kept")
        return
    print(f"exported is step {best}, which had the least validation loss, of {trainer.steps_done} that were trained")
    with safe_open(path, "pt") as file:
        trainer.adopt_weights({name: file.get_tensor(name) for name in trainer.parameters}, best)


def best_of_ended(folder: Path) -> dict[str, torch.Tensor] | None:
    """The weights that an ended run has exported, where they are not those of its last step."""
    path = folder / "result.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if result.get("trained") in (None, result.get("steps")):
        return None
    return load_file(folder / BEST)


def _step_of(path: Path) -> int | None:
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])
