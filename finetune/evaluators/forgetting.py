"""The forgetting evaluator: unrelated prompts, probed at intervals and recorded in forgetting.jsonl."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import torch

from finetune import seeding
from finetune.batch import moved
from finetune.config import ResolvedConfig
from finetune.data.captions import with_trigger
from finetune.evaluators.evaluator import EvaluationLog, EvaluationPeriod, training_passes
from finetune.models.loading import DiffusionModel
from finetune.results import metrics_log
from finetune.training.forgetting import Probe, probe_drift, record_probe
from finetune.training.objective import DiffusionObjective
from finetune.training.trainer import Trainer

SHARE = 0.02
"""Of a run's time that this may take unless a number of prompts was asked for."""

STATES = 3
"""Timesteps at which each prompt is asked."""

FEWEST_PROMPTS, MOST_PROMPTS = 4, 64
"""Prompts: fewer would tell little, more are not in the package."""


@dataclass(frozen=True)
class ForgettingProbes:
    """What was asked before the run, and how it was answered."""

    plain: Probe
    triggered: Probe | None
    """The same prompts with the trigger word in front; None where there is none."""
    seconds: float
    """That asking has taken."""


def make_probes(
    config: ResolvedConfig, model: DiffusionModel, objective: DiffusionObjective
) -> ForgettingProbes | None:
    """Probe the untrained model; None where it takes no text, or `SHARE` of the run is too short for `FEWEST_PROMPTS`.

    Its prompts are asked at the start and in the end.
    """
    number = config.forgetting_prompts
    if number is None:
        passes = training_passes(config, SHARE / 2)
        number = min(MOST_PROMPTS, int(passes / (2 * STATES * (2 if config.trigger else 1))))
        number = 0 if number < FEWEST_PROMPTS else number
    if not model.family.latent or not number:
        return None
    clock = time.perf_counter()
    prompts = generic_prompts(model.family.probe_prompts)[:number]
    model.conditioner.to(model.unet.device)
    plain, triggered = _record(config, model, objective, prompts), None
    if config.trigger:
        triggered = _record(config, model, objective, [with_trigger(prompt, config.trigger) for prompt in prompts])
    return ForgettingProbes(plain, triggered, time.perf_counter() - clock)


def generic_prompts(probe_prompts: str) -> list[str]:
    """64 prompts of what a model knows: "everyday" or "tiny"."""
    return (files("finetune") / f"assets/prompts/{probe_prompts}.txt").read_text(encoding="utf-8").splitlines()


def _record(
    config: ResolvedConfig, model: DiffusionModel, objective: DiffusionObjective, prompts: Sequence[str]
) -> Probe:
    side, unet, conditioner = config.resolution, model.unet, model.conditioner
    time_ids = torch.tensor([[side, side, 0, 0, side, side]] * len(prompts), device=unet.device)
    cond, empty = (
        conditioner.kwargs(moved(conditioner.encode(texts), unet.device), time_ids)
        for texts in (prompts, [""] * len(prompts))
    )
    keys = torch.tensor([seeding.example_key(0, prompt, 0) for prompt in prompts])
    latent = side // model.pipeline().vae_scale_factor  # pyright: ignore[reportAttributeAccessIssue] # of latent ones
    noise = seeding.normal(keys, "forgetting", (unet.config["out_channels"], latent, latent))
    condition = model.image_condition
    unet_channels = None if condition is None else condition.empty(model.encoder.to(unet.device), keys, side)
    return record_probe(
        unet,
        objective,
        cond,
        empty,
        noise,
        states=STATES,
        batch_size=config.train_batch_size,
        unet_channels=unet_channels,
    )


MOST_PROBES = 10
"""How often a run measures it at most."""


class Forgetting:
    """The evaluator of how far unrelated prompts have come to mean something else, in forgetting.jsonl.

    Args:
        probes: of the untrained model.
        trainer: of the run.
        log: of the run.
        total: steps of the run.
    """

    def __init__(self, probes: ForgettingProbes, trainer: Trainer, log: EvaluationLog, *, total: int):
        self.probes, self._trainer, self._log = probes, trainer, log
        self._period = EvaluationPeriod(log.folder, "forgetting", total, every=None, share=SHARE, most=MOST_PROBES)

    def should_run(self, step: int) -> bool:
        """Whether the run measures it after this step."""
        return self._period.includes(step)

    def run(self, step: int) -> None:
        """Measure how far the prompts have drifted, and record it."""
        if any(line["step"] == step for line in self._log.lines(metrics_log.FORGETTING)):
            return
        self._log.set_phase("forgetting", step)
        probes = {"forgetting": self.probes.plain}
        if self.probes.triggered:
            probes["with_trigger"] = self.probes.triggered
        if step:
            with self._log.timed("forgetting", step), self._trainer.ema_weights():
                drifts = {name: self._drift(probe) for name, probe in probes.items()}
        else:
            drifts = dict.fromkeys(probes, 0.0)
            metrics_log.append_seconds(self._log.folder, step, "forgetting", self.probes.seconds)
        trigger = f" ({drifts['with_trigger']:.1%} with the trigger)" if "with_trigger" in drifts else ""
        self._log.write(
            "forgetting",
            {"step": step} | drifts,
            file=metrics_log.FORGETTING,
            tracked={f"forgetting/{name}": drift for name, drift in drifts.items()},
            message=f"step {step}: forgetting {drifts['forgetting']:.1%}{trigger}" if step else "",
        )

    def _drift(self, probe: Probe) -> float:
        batch_size = self._trainer.micro_batch_size or probe.x_t.shape[1]
        return probe_drift(self._trainer.unet, probe, batch_size=batch_size)


def make_forgetting(
    config: ResolvedConfig, model: DiffusionModel, trainer: Trainer[DiffusionObjective], log: EvaluationLog
) -> Forgetting | None:
    """The evaluator of a run, with probes of the untrained model; None where forgetting is not measured."""
    probes = make_probes(config, model, trainer.objective)
    return Forgetting(probes, trainer, log, total=config.max_train_steps) if probes else None
