"""Optimizers by name, and the learning rate as a pure function of the step."""

import contextlib
import io
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from finetune.errors import UsageError


def make_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    *,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.01,
    epsilon: float = 1e-8,
    foreach: bool = True,
) -> torch.optim.Optimizer:
    """An optimizer by name.

    adamw and sgd (both fused) and adafactor are torch's, prodigy is prodigyopt's, and adamw8bit bitsandbytes': AdamW
    with moments of 8 bits, scaled block by block (Dettmers et al. 2021).

    `parameters` may be groups, as `parameter_groups` makes them.

    Args:
        foreach: adafactor updates all parameters together, which takes about 4 more bytes for each weight on the way;
            False: one after the other, which keeps a GPU waiting. The other optimizers have one way.

    Raises:
        UsageError: unknown name, or the package that has it is not installed.
    """
    some: Any = list(parameters)
    if name == "adamw":
        return torch.optim.AdamW(
            some, lr=learning_rate, betas=betas, weight_decay=weight_decay, eps=epsilon, fused=True
        )
    if name == "sgd":
        return torch.optim.SGD(some, lr=learning_rate, weight_decay=weight_decay, fused=True)
    if name == "adafactor":
        return torch.optim.Adafactor(some, lr=learning_rate, weight_decay=weight_decay, foreach=foreach)
    if name == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise UsageError("optimizer = 'adamw8bit' needs a package: pip install bitsandbytes") from error
        return AdamW8bit(some, lr=learning_rate, betas=betas, weight_decay=weight_decay, eps=epsilon)
    if name != "prodigy":
        raise UsageError(f"optimizer = {name!r}: choose one of adamw, adamw8bit, adafactor, prodigy, sgd")
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise UsageError("optimizer = 'prodigy' needs a package: pip install prodigyopt") from error
    weights: Any = {"weight_decay": weight_decay}  # Prodigy says int, and takes a fraction
    with contextlib.redirect_stdout(io.StringIO()):  # it says how it decays weights
        # Without the safeguard a warm-up spoils its estimate of the step size.
        return Prodigy(some, lr=learning_rate, betas=betas, eps=epsilon, safeguard_warmup=True, **weights)


def parameter_groups(
    named: Mapping[str, nn.Parameter], blocks: Mapping[str, float], b_factor: float = 1.0
) -> list[dict[str, Any]]:
    """Parameters in groups of equal `factor`, by which the schedule's learning rate is multiplied.

    Args:
        named: name -> parameter.
        blocks: beginning of a name -> factor; the longest that fits holds.
        b_factor: of LoRA's matrix B (LoRA+, Hayou et al. 2024).
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in named.items():
        fitting = [begin for begin in blocks if name.startswith(begin)]
        factor = blocks[max(fitting, key=len)] if fitting else 1.0
        factor *= b_factor if ".lora_B." in name else 1.0
        groups.setdefault(factor, []).append(parameter)
    return [{"params": parameters, "factor": factor} for factor, parameters in groups.items()]


def learning_rate(step: int, *, peak: float, schedule: str, warmup: int, total: int) -> float:
    """The learning rate of a step; the same values as `diffusers.optimization.get_scheduler`.

    Args:
        step: 0 for the first optimizer step.
        peak: rate at the end of the warm-up, reached linearly from 0.
        schedule: "constant", "linear" (to 0 at `total`), "cosine" (half a period, to 0; Loshchilov & Hutter 2016,
            eq. 5) or "polynomial" (linear to 1e-7, as the scripts' default power of 1).
        warmup: steps of the warm-up.
        total: steps of the whole run.
    """
    if step < warmup:
        return peak * step / warmup
    if schedule == "constant":
        return peak
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    floor = 1e-7 if schedule == "polynomial" else 0.0
    return floor + (peak - floor) * (1 - done)
