"""The optimizers that have a short name, and what is known of each. Free of torch, for `--help`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class NamedOptimizer:
    """An optimizer that has a short name."""

    path: str
    """Where it is, as package.module:Class."""
    package: str | None = None
    """What to install where it is missing; None: torch has it."""
    rate: float = 1.0
    """Its default learning rate, as a multiple of AdamW's."""
    full_rate: float | None = None
    """The same for all weights of the UNet; None: as for a LoRA."""
    fixed_rate: float | None = None
    """Its default learning rate, where that has nothing to do with AdamW's."""
    schedule: str | None = None
    """The learning rate schedule that suits it; None: that of the model's family."""
    moments: float = 2
    """Numbers that it keeps per weight."""
    averages: bool = False
    """Whether it averages the weights itself (schedule-free), so that an EMA has no use."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that it is made with, unless others are given."""


_PRODIGY_PLUS = "prodigy-plus-schedule-free"
OPTIMIZERS: Mapping[str, NamedOptimizer] = {
    "adamw": NamedOptimizer("torch.optim:AdamW", arguments={"fused": True}),
    "adamw8bit": NamedOptimizer("bitsandbytes.optim:AdamW8bit", "bitsandbytes", moments=0.5),
    # Its rate is a share of a weight's size, and a LoRA begins at zero.
    "adafactor": NamedOptimizer("torch.optim:Adafactor", rate=50, full_rate=10, moments=0),
    # Mishchenko & Defazio 2023: its rate is a multiple of the one that it finds; annealed. Without the safeguard a
    # warm-up spoils its estimate.
    "prodigy": NamedOptimizer(
        "prodigyopt:Prodigy", "prodigyopt", fixed_rate=1.0, schedule="cosine", moments=4,
        arguments={"safeguard_warmup": True},
    ),
    "sgd": NamedOptimizer("torch.optim:SGD", fixed_rate=0.3, moments=0, arguments={"fused": True}),
    "ademamix": NamedOptimizer("pytorch_optimizer:AdEMAMix", "pytorch_optimizer", moments=3),
    "adopt": NamedOptimizer("pytorch_optimizer:ADOPT", "pytorch_optimizer"),
    "came": NamedOptimizer("pytorch_optimizer:CAME", "pytorch_optimizer", rate=0.3, full_rate=0.03, moments=1),
    # Chen et al. 2023, section 5: 3 to 10 times smaller than AdamW's.
    "lion": NamedOptimizer("pytorch_optimizer:Lion", "pytorch_optimizer", rate=0.3, moments=1),
    # Liu et al. 2025, "Muon is Scalable for LLM Training": updates of the size of AdamW's.
    "muon": NamedOptimizer(
        "pytorch_optimizer:Muon", "pytorch_optimizer", rate=2.0, moments=1, arguments={"use_adjusted_lr": True}
    ),
    "prodigy_schedulefree": NamedOptimizer(
        "prodigyplus:ProdigyPlusScheduleFree", _PRODIGY_PLUS, fixed_rate=1.0, schedule="constant", averages=True
    ),
    # Defazio et al. 2024, "The Road Less Scheduled": no schedule.
    "schedulefree_adamw": NamedOptimizer(
        "pytorch_optimizer:ScheduleFreeAdamW", "pytorch_optimizer", schedule="constant", averages=True
    ),
    "schedulefree_sgd": NamedOptimizer(
        "pytorch_optimizer:ScheduleFreeSGD", "pytorch_optimizer", fixed_rate=0.3, schedule="constant", moments=1,
        averages=True,
    ),
    "soap": NamedOptimizer("pytorch_optimizer:SOAP", "pytorch_optimizer", rate=2.0, moments=4),
    "stableadamw": NamedOptimizer("pytorch_optimizer:StableAdamW", "pytorch_optimizer"),
}  # fmt: skip
"""Short name -> what is known of the optimizer."""

TUNED = ("adamw", "adamw8bit", "adafactor", "prodigy", "sgd")
"""Those that are made from `adam_beta1` and the options like it; the others have their own defaults."""


def known_optimizer(name: str) -> NamedOptimizer:
    """What is known of an optimizer; of one by import path its path alone."""
    return OPTIMIZERS.get(name) or NamedOptimizer(name)
