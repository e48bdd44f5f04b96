"""The validation evaluator: on which images, when, and what validation.jsonl records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf
from typing import Any

import torch
from torch import Tensor

from finetune.cache.encoded_dataset import EncodedDataset
from finetune.config import ResolvedConfig
from finetune.data.image_dataset import ImageDataset
from finetune.evaluators.evaluator import EvaluationLog, EvaluationPeriod, training_passes
from finetune.results import metrics_log
from finetune.seeding import fold
from finetune.training.objective import DiffusionObjective
from finetune.training.trainer import Trainer
from finetune.training.validation import BANDS, band, paired, validation_losses

SHARE = 0.05
"""Of a run's time that validation may take unless it was asked for."""

DRAWS = (12, 6, 3)
"""Timesteps per picture: the most that `SHARE` allows."""


@dataclass(frozen=True)
class ValidationPlan:
    """What is validated on, each time."""

    examples: tuple[int, ...] = ()
    """Numbers of pictures; none: there is no validation."""
    draws: int = 0
    """Noise and timestep pairs of each."""
    digest: str = ""
    """Of all this; only what has the same can be compared."""


def plan_validation(
    config: ResolvedConfig, pictures: ImageDataset, earlier: Sequence[Mapping[str, Any]] = ()
) -> ValidationPlan:
    """All pictures that are held out with as many draws as a first and a last validation may take, or some of them.

    Args:
        config: of the run.
        pictures: its pictures.
        earlier: lines of validation.jsonl. A run that goes on for longer validates on as many as it has begun with.
    """
    held = sorted(pictures.held_out, key=lambda index: fold(config.seed, "validated", pictures.ids[index]))
    if not held:
        return ValidationPlan()
    if earlier:
        losses = earlier[-1]["losses"]
        plan = _plan(config, pictures, held[: len(losses)], len(losses[0]))
        if plan.digest == earlier[-1]["of"]:
            return plan
    passes = training_passes(config, SHARE / 2)
    draws = next((draws for draws in DRAWS if draws * len(held) <= passes), DRAWS[-1])
    return _plan(config, pictures, held[: max(2, int(passes / draws))], draws)


def _plan(config: ResolvedConfig, pictures: ImageDataset, some: Sequence[int], draws: int) -> ValidationPlan:
    some = sorted(some)
    names = [name for index in some for name in (pictures.ids[index], pictures.image_info(index).digest)]
    return ValidationPlan(tuple(some), draws, f"{fold(config.seed, draws, *names):016x}")


MOST_VALIDATIONS = 20
"""Validations of a run, unless more were asked for."""


def steps_between_validations(config: ResolvedConfig) -> int | None:
    """Steps between validations as the config says; None where it leaves that to the time that they take."""
    if config.validate_every or not config.early_stop:
        return config.validate_every or None
    return ceil(config.max_train_steps / MOST_VALIDATIONS)  # not of the time: where a run ends depends on its config


class Validation:
    """The evaluator of the loss on pictures that are held out, in validation.jsonl.

    Args:
        plan: which pictures; of one without pictures nothing is measured.
        encoded: where they are.
        trainer: of the run.
        log: of the run.
        total: steps of the run.
        every: steps between validations; None: as many as keep them to `SHARE` of the time.
        seed: of the noise and timesteps.
    """

    def __init__(
        self,
        plan: ValidationPlan,
        encoded: EncodedDataset,
        trainer: Trainer[DiffusionObjective],
        log: EvaluationLog,
        *,
        total: int,
        every: int | None = None,
        seed: int = 0,
    ):
        self.plan, self._encoded, self._trainer, self._log, self._seed = plan, encoded, trainer, log, seed
        self.period = EvaluationPeriod(log.folder, "validation", total, every=every, share=SHARE, most=MOST_VALIDATIONS)

    def should_run(self, step: int) -> bool:
        """Whether the run validates after this step."""
        return bool(self.plan.examples) and self.period.includes(step)

    def run(self, step: int) -> None:
        """Measure the loss, and record how it has changed since step 0."""
        before = self.measured()
        if not self.plan.examples or step in before:
            return
        trainer = self._trainer
        self._log.set_phase("validating", step)
        with self._log.timed("validation", step), trainer.ema_weights():
            losses = validation_losses(
                trainer.unet,
                trainer.encoder,
                trainer.objective,
                self._encoded,
                self.plan.examples,
                draws=self.plan.draws,
                seed=self._seed,
                batch_size=trainer.micro_batch_size or len(self.plan.examples),
            )
        record = _record(step, losses, before.get(0))
        self._log.write(
            "validation",
            record | {"of": self.plan.digest, "losses": losses.tolist()},
            file=metrics_log.VALIDATION,
            event=record,
            tracked={
                f"val/{name}": value[0] if name.startswith("change") else value
                for name, value in record.items()
                if name != "step"
            },
            message=f"step {step}: validation {_as_line(record)}",
        )

    def measured(self) -> dict[int, Tensor]:
        """Step -> the losses that were measured there, (examples, draws), of what this run validates on."""
        lines = self._log.lines(metrics_log.VALIDATION)
        return {line["step"]: torch.tensor(line["losses"]) for line in lines if line["of"] == self.plan.digest}

    def best_step(self, *, trained: bool = True) -> int | None:
        """The step with the least loss; None where there was no validation yet.

        Args:
            trained: of those after the start; False: the untrained model's loss is among them.
        """
        means = {step: losses.mean().nan_to_num(nan=inf).item() for step, losses in self.measured().items()}
        return min((step for step in means if step or not trained), key=means.__getitem__, default=None)


def _record(step: int, losses: Tensor, first: Tensor | None) -> dict[str, Any]:
    """The loss in all and by band of noise, and its change since step 0: the mean, and where it is with 95 %."""
    record: dict[str, Any] = {"step": step, "loss": losses.mean().item()}
    record |= {f"loss_{name}": band(losses, name).mean().item() for name in BANDS}
    if first is not None:
        record["change"] = list(paired(first, losses))
        record |= {f"change_{name}": list(paired(band(first, name), band(losses, name))) for name in BANDS}
    return record


def _as_line(record: Mapping[str, Any]) -> str:
    line = f"loss {record['loss']:.4f}"
    if "change" in record:
        mean, low, high = record["change"]
        line += f", {mean:+.4f} from start (95 %: {low:+.4f} to {high:+.4f})"
    return line
