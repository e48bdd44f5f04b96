"""The learning rate as a pure function of the step."""

import math
from collections.abc import Callable

from finetune.errors import RunError
from finetune.import_path import load_object


def learning_rate(
    step: int,
    *,
    peak: float,
    schedule: str,
    warmup: int,
    total: int,
    end: float | None = None,
    cycles: int = 1,
    power: float = 1.0,
    decay_steps: int | None = None,
) -> float:
    """The learning rate of a step; the same values as diffusers' and transformers' schedulers of these names.

    Args:
        step: 0 for the first optimizer step.
        peak: rate at the end of the warm-up, reached linearly from 0.
        schedule: how it goes on to `end`:
            "constant": it stays.
            "linear": in a straight line.
            "cosine": half a period (Loshchilov & Hutter 2016, "SGDR", eq. 5).
            "cosine_with_restarts": `cycles` of them, each from `peak` again.
            "polynomial": as (1 - share of the steps) to the `power`.
            "rex": as (1 - z) / (1/2 + (1 - z) / 2), z being the share of the steps (Chen et al. 2022, "REX").
            "wsd": it stays, and falls by half a period of a cosine in the last `decay_steps` (Hu et al. 2024,
            "MiniCPM", has the three phases).
            "inverse_sqrt": as 1 / sqrt(step), from the warm-up on; it has no end.
            Or package.module:function, called with `step` and, by keyword, `peak`, `warmup` and `total`.
        warmup: steps of the warm-up.
        total: steps of the whole run.
        end: the last rate; None: 0, of polynomial 1e-7.
        cycles: of cosine_with_restarts.
        power: of polynomial.
        decay_steps: of wsd; None: a fifth of the run.

    Raises:
        RunError: a function by import path returns no number that a learning rate can be.
    """
    if ":" in schedule:
        return _checked(
            load_object(schedule, "lr_scheduler")(step, peak=peak, warmup=warmup, total=total), schedule, step
        )
    if step < warmup:
        return peak * step / warmup
    if schedule == "constant":
        return peak
    if schedule == "inverse_sqrt":
        timescale = warmup or 10_000  # as transformers
        return peak * math.sqrt(timescale / (step - warmup + timescale))
    floor = end if end is not None else 1e-7 if schedule == "polynomial" else 0.0
    if schedule == "wsd":
        decay = min(total - warmup, total // 5 if decay_steps is None else decay_steps)
        done = max(0.0, min(1.0, (step - (total - decay)) / max(1, decay)))
    else:
        done = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (peak - floor) * _SHAPES[schedule](done, cycles, power)


def _cosine(done: float, cycles: int, power: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def _restarts(done: float, cycles: int, power: float) -> float:
    return 0.0 if done >= 1 else 0.5 * (1 + math.cos(math.pi * (cycles * done % 1)))


_SHAPES: dict[str, Callable[[float, int, float], float]] = {
    "linear": lambda done, cycles, power: 1 - done,
    "cosine": _cosine,
    "wsd": _cosine,
    "cosine_with_restarts": _restarts,
    "polynomial": lambda done, cycles, power: (1 - done) ** power,
    "rex": lambda done, cycles, power: (1 - done) / (0.5 + 0.5 * (1 - done)),
}
"""Schedule -> the share of the way from the end to the peak, of the share of the steps that are done."""


def _checked(rate: object, schedule: str, step: int) -> float:
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < math.inf:
        raise RunError(f"lr_scheduler {schedule} returned {rate!r} for step {step}: expected a number, 0 or more")
    return float(rate)
