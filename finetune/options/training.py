"""The length of a run, its optimizer and its learning rate."""

from dataclasses import dataclass
from typing import Literal

from finetune.optimizer_table import OPTIMIZERS
from finetune.option_info import AT_LEAST_ONE, BELOW_ONE, NOT_NEGATIVE, POSITIVE, STEPS_OR_SHARE, Range, option

SCHEDULES = ("constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt", "rex", "wsd")
_OWN = "package.module:name"
SCHEDULE = Range(f"{', '.join(SCHEDULES)} or {_OWN}", lambda value: value in SCHEDULES or ":" in str(value))
OPTIMIZER = Range(f"{', '.join(OPTIMIZERS)} or {_OWN}", lambda value: value in OPTIMIZERS or ":" in str(value))


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Training. A step is one optimizer step."""

    max_train_steps: int | None = option(None, AT_LEAST_ONE, affects="length", suggest_for=("steps",))
    """Length of the run in optimizer steps."""
    num_train_epochs: int | None = option(
        None, AT_LEAST_ONE, affects="length", aliases=("num_epochs",), suggest_for=("epochs", "max_train_epochs")
    )
    """Length of the run in epochs (max_train_steps takes precedence)."""
    max_train_minutes: float | None = option(None, POSITIVE, affects="free")
    """Stop with a checkpoint after this many minutes, before a cluster's time limit; exit code 124. The same command
    resumes the run."""
    train_batch_size: int | None = option(None, AT_LEAST_ONE, suggest_for=("batch_size",))
    """Images per device in one forward pass."""
    gradient_accumulation_steps: int | None = option(None, AT_LEAST_ONE)
    """Forward passes per optimizer step in each process. Default: 1 (sdxl: 4)."""
    num_processes: int | None = option(None, AT_LEAST_ONE, affects="on resume")
    """Number of processes whose batches form a step. Default: the number that is launched. A resume keeps the number
    that the run began with, on any number of processes."""
    learning_rate: float | None = option(None, POSITIVE, suggest_for=("lr", "unet_lr"))
    """Peak learning rate of the schedule."""
    block_learning_rate: tuple[str, ...] | None = option(
        None, requires="an optimizer other than prodigy", suggest_for=("block_lr", "down_lr_weight", "up_lr_weight")
    )
    """Factors of the learning rate, by the start of layer names: up_blocks=2 mid=0.5."""
    loraplus_lr_ratio: float = option(1.0, POSITIVE, requires="LoRA or DoRA, and an optimizer other than prodigy")
    """Factor of the learning rate of LoRA's matrix B (LoRA+, Hayou et al. 2024); 16 is usual."""
    lr_scheduler: (
        Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt", "rex", "wsd"]
        | str
        | None
    ) = option(None, SCHEDULE, suggest_for=("learning_rate_scheduler",))
    """Shape of the learning rate after the warm-up. wsd: constant, then a decay. Or package.module:function, called as
    f(step, peak=, warmup=, total=)."""
    lr_warmup_steps: int | float | None = option(None, STEPS_OR_SHARE, suggest_for=("warmup_ratio", "lr_warmup"))
    """Steps in which the learning rate rises from 0; below 1: a share of the run. Default: min(100, 5 % of the run)."""
    lr_end: float | None = option(None, NOT_NEGATIVE, requires="a schedule that has an end", suggest_for=("lr_min",))
    """Learning rate at the end. Default: 0; of polynomial 1e-7."""
    lr_num_cycles: int = option(
        1, AT_LEAST_ONE, requires="lr_scheduler cosine_with_restarts", suggest_for=("lr_scheduler_num_cycles",)
    )
    """Number of cosines."""
    lr_power: float = option(1.0, POSITIVE, requires="lr_scheduler polynomial", suggest_for=("lr_scheduler_power",))
    """Power of the polynomial."""
    lr_decay_steps: int | float | None = option(None, STEPS_OR_SHARE, requires="lr_scheduler wsd")
    """Steps of the decay; below 1: a share of the run. Default: a fifth of the run."""
    optimizer: Literal[
        "adamw", "adamw8bit", "adafactor", "prodigy", "sgd", "ademamix", "adopt", "came", "lion", "muon",
        "prodigy_schedulefree", "schedulefree_adamw", "schedulefree_sgd", "soap", "stableadamw"
    ] | str = option("adamw", OPTIMIZER, suggest_for=("optimizer_type",))  # fmt: skip
    """Optimizer, or package.module:Class. The default learning rate depends on it. adamw8bit keeps its moments in 8
    bits. All but adamw, adafactor and sgd need pip install 'finetune-unet[optimizers]'."""
    optimizer_args: tuple[str, ...] = ()
    """Further arguments of the optimizer's class: weight_decay=0.1 betas=0.9,0.99."""
    adam_beta1: float | None = option(None, BELOW_ONE, requires="an optimizer of the Adam family")
    """Decay of AdamW's first moment."""
    adam_beta2: float = option(0.999, BELOW_ONE, requires="an optimizer of the Adam family")
    """Decay of AdamW's second moment."""
    adam_weight_decay: float = option(0.01, NOT_NEGATIVE)
    """Decoupled weight decay."""
    adam_epsilon: float = option(1e-8, POSITIVE, requires="an optimizer of the Adam family")
    """AdamW's epsilon."""
    max_grad_norm: float = option(1.0, NOT_NEGATIVE)
    """Clip the gradient to this norm; 0: no clipping. fused_backward_pass also turns it off."""
    max_bad_steps: int = option(1, AT_LEAST_ONE, affects="on resume")
    """End the run after this many steps in a row whose loss or gradient is not finite. Such steps change no weight;
    faults.jsonl records them."""
    use_ema: bool | None = option(None, suggest_for=("ema",))
    """Keep an exponential moving average (EMA) of the weights and export it."""
    ema_inv_gamma: float = option(1.0, POSITIVE, requires="use_ema")
    """The EMA decay at step s is 1 - (1 + s / inv_gamma) ** -power, at most ema_max_decay."""
    ema_power: float = option(0.75, POSITIVE, requires="use_ema")
    """See ema_inv_gamma."""
    ema_max_decay: float = option(0.9999, BELOW_ONE, requires="use_ema")
    """See ema_inv_gamma."""
    deterministic: bool = option(False, affects="on resume")
    """On a GPU, use deterministic algorithms only; they are slower. A CPU always does."""
    seed: int = option(0, NOT_NEGATIVE)
    """Seed of all random numbers: order, noise, timesteps, crops, flips, initial weights."""
