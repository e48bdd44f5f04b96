"""Early stopping: the weights of the best validation are kept, and a loss that has risen since ends the run."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from finetune.files import write_whole
from finetune.run.parts import Run
from finetune.run.validating import best_step, measured
from finetune.training.validation import paired

BEST = "best.safetensors"

_RUNNING = 2
"""Validations in a row that must show a rise."""


def keep_if_best(run: Run) -> None:
    """Keep the weights, as they would be exported, where no validation had a smaller loss than that of this step."""
    step = run.trainer.steps_done
    if best_step(run) != step:
        return
    with run.trainer.in_full():
        weights = {name: p.detach().cpu().contiguous() for name, p in run.trainer.parameters.items()}
    write_whole(run.folder / BEST, save(weights, {"step": str(step)}))


def has_risen(run: Run) -> bool:
    """Whether the last validations lie above the best by more than their paired 95 % interval."""
    found, best = measured(run), best_step(run)
    last = sorted(found)[-_RUNNING:]
    if best is None or len(last) < _RUNNING or last[0] <= best:
        return False
    return all(paired(found[best], found[step]).low > 0 for step in last)


@torch.no_grad()
def take_best(run: Run) -> None:
    """Put the kept weights in the place of the last, if another validation than the last was the best."""
    trainer, best, path = run.trainer, best_step(run), run.folder / BEST
    if best in (None, trainer.steps_done):
        return
    kept = _step_of(path)
    if kept != best:  # only where a run went on from an older checkpoint to other bits, as on another machine
        print(f"{'note':>10}  the weights of step {best}, which had the least validation loss, were not kept")
        return
    print(f"exported is step {best}, which had the least validation loss, of {trainer.steps_done} that were trained")
    with safe_open(path, "pt") as file:
        trainer.settle_on({name: file.get_tensor(name) for name in trainer.parameters}, best)


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
