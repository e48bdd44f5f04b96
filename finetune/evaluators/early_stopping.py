"""Early stopping: keeps the weights of the best validation, and ends the run when the loss rises."""

import json
import logging
from collections.abc import Mapping
from math import ceil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from finetune.atomic_io import write_whole
from finetune.evaluators.validation import Validation
from finetune.training.trainer import Trainer
from finetune.training.validation import chance_of_rise

_log = logging.getLogger(__name__)

BEST = "best.safetensors"
FILES = (BEST,)
"""Patterns of what is written into a run folder here."""

_RUNNING = 2
"""Validations in a row that must show a rise."""

_LEVEL = 0.025
"""Of the one-sided test that the loss has risen, for all validations of a run together."""


class EarlyStopping:
    """Keeps the weights of the best validation, and ends the run when the loss has risen since.

    Args:
        validation: whose losses count; None where early stopping is off.
        trainer: of the run.
        folder: of the run.
        total: steps of the run.
    """

    def __init__(self, validation: Validation | None, trainer: Trainer, folder: Path, *, total: int):
        self._validation, self._trainer, self._total = validation, trainer, total
        self._path = folder / BEST

    def should_stop(self, step: int) -> bool:
        """Whether the run ends after this step: the main process, which has validated, decides for all of them."""
        if self._validation is None:
            return False
        risen = False
        if self._trainer.parallel.is_main_process:
            if self._validation.best_step() == step:
                self._save()
            risen = self._has_risen(self._validation, step)
        return bool(self._trainer.parallel.all_reduce_max(int(risen)))

    def _save(self) -> None:
        """Keep the weights as they would be exported."""
        with self._trainer.export_weights():
            weights = {name: p.detach().cpu().contiguous() for name, p in self._trainer.parameters.items()}
        write_whole(self._path, save(weights, {"step": str(self._trainer.steps_done)}))

    def _has_risen(self, validation: Validation, step: int) -> bool:
        """Whether the last validations lie above the best, which is what the run has learned since it was there.

        The best of many lies low by chance too. So each of the last is tested against it at 2.5 % divided by the number
        of validations that the run plans (Bonferroni's correction for having chosen the best among them).
        """
        best, every = validation.best_step(), validation.period.every(step)
        if best is None or every is None:
            return False
        return rises(validation.measured(), best, planned=ceil(self._total / every))

    @torch.no_grad()
    def restore_best(self) -> None:
        """Put the kept weights in the place of the last, if another validation than the last was the best."""
        best = self._validation and self._validation.best_step()
        if best in (None, self._trainer.steps_done):
            return
        if _step_of(self._path) != best:  # a run that went on from an older checkpoint to other bits
            _log.warning("the weights of step %s, which had the lowest validation loss, were not kept", best)
            return
        trained = self._trainer.steps_done
        _log.info("step %s of %s had the lowest validation loss and is exported", best, trained)
        with safe_open(self._path, "pt") as file:
            self._trainer.adopt_weights({name: file.get_tensor(name) for name in self._trainer.parameters}, best)


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


def best_of_ended(folder: Path) -> Path | None:
    """The file of the weights that an ended run has exported, where they are not those of its last step."""
    path = folder / "result.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if result.get("trained") in (None, result.get("steps")):
        return None
    return folder / BEST


def _step_of(path: Path) -> int | None:
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])
