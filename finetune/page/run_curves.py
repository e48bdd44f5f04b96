"""The curves of a run as the charts of the page take them: lists of steps and values."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.results.curves import spread
from finetune.results.event_reader import RunEvents


@dataclass(frozen=True)
class RunCurve:
    """A curve of a run: a value at each of `steps`, in at most a few hundred points."""

    title: str
    caption: str
    unit: str
    steps: list[float]
    values: list[float]
    faint: list[float] | None = None
    """Values that the curve smooths."""
    low: list[float] | None = None
    high: list[float] | None = None
    """Bounds of the interval around each value."""


def run_curves(run: RunEvents) -> list[RunCurve]:
    """The curves that a run has up to now."""
    curves = [_loss(run), _validation(run), _forgetting(run)]
    curves += [
        _measured("Learning rate", "", run.learning_rates.losses),
        _measured("Speed", "images/s", run.speeds.losses),
        _measured("Peak memory", "GB", run.memories.losses),
    ]
    return [curve for curve in curves if curve]


def _loss(run: RunEvents) -> RunCurve | None:
    losses, averages = run.loss.losses, run.loss.averages
    if not losses:
        return None
    return RunCurve(
        "Training loss",
        "Smoothed over about 20 steps.",
        "",
        [step for step, _ in averages],
        [value for _, value in averages],
        faint=[value for _, value in losses],
    )


def _validation(run: RunEvents) -> RunCurve | None:
    lines: Sequence[dict[str, Any]] = spread([line for _, line in sorted(run.validations.items()) if "change" in line])
    if not lines:
        return None
    best = min(lines, key=lambda line: line["loss"])["step"]
    changes = [[100 * value for value in line["change"]] for line in lines if line["step"]]
    return RunCurve(
        "Validation loss",
        f"Change since step 0, with its 95 % interval; lowest at step {best:g}.",
        "%",
        [0.0, *(line["step"] for line in lines if line["step"])],
        [0.0, *(change for change, _, _ in changes)],
        low=[0.0, *(low for _, low, _ in changes)],
        high=[0.0, *(high for _, _, high in changes)],
    )


def _forgetting(run: RunEvents) -> RunCurve | None:
    lines = spread([line for _, line in sorted(run.forgetting.items())])
    if len(lines) < 2:
        return None
    return RunCurve(
        "Forgetting",
        "Share of the effect of unrelated prompts that has changed.",
        "%",
        [line["step"] for line in lines],
        [100 * line["forgetting"] for line in lines],
    )


def _measured(title: str, unit: str, points: Sequence[tuple[float, float]]) -> RunCurve | None:
    if len(points) < 2:
        return None
    return RunCurve(title, "", unit, [step for step, _ in points], [value for _, value in points])
