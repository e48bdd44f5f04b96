"""Adapter types that peft has and kohya's format can hold."""

import re
from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from typing import Any, Literal

from peft import LoHaConfig, LoKrConfig, LoraConfig
from peft.tuners.lokr import LoKrLayer
from torch import nn

from finetune.errors import UsageError

Kind = Literal["lora", "rslora", "dora", "loha", "lokr"]

NAMES: dict[Kind, str] = {
    "lora": "LoRA",
    "rslora": "rank-stabilised LoRA",
    "dora": "DoRA",
    "loha": "LoHa",
    "lokr": "LoKr",
}


def settings_of(
    kind: Kind,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    rank_dropout: float,
    module_dropout: float,
    lokr_factor: int | None,
    target_modules: Sequence[str],
    block_ranks: Mapping[str, float],
    kernels: Mapping[str, tuple[int, float]],
) -> Any:
    """peft's config for a kind of adapter; see `finetune.models.lora.add_lora`.

    `kernels` are the layers with a kernel larger than 1 x 1 that have a rank and an alpha of their own.
    """
    if any(ranks < 1 or ranks != int(ranks) for ranks in block_ranks.values()):
        raise UsageError("block_rank: a rank is a whole number, 1 or more")
    ranks = {_pattern(begin, block_ranks): int(rank) for begin, rank in block_ranks.items()}
    if kind == "rslora" and ranks:
        why = "with rslora each rank has an alpha of its own, and diffusers reads such files wrongly"
        raise UsageError(f"block_rank: {why}")
    ranks |= {f"^{re.escape(layer)}$": own_rank for layer, (own_rank, _) in kernels.items()}
    alphas = {
        f"^{re.escape(layer)}$": own_alpha * sqrt(own_rank) if kind == "rslora" else own_alpha
        for layer, (own_rank, own_alpha) in kernels.items()
    }
    shared: dict[str, Any] = {"r": rank, "target_modules": list(target_modules)}
    shared |= {"rank_pattern": ranks, "alpha_pattern": alphas}
    if kind in ("loha", "lokr"):
        shared |= {"rank_dropout": rank_dropout, "module_dropout": module_dropout}
        if kind == "loha":
            return LoHaConfig(alpha=alpha, **shared)  # pyright: ignore[reportArgumentType]
        factor = -1 if lokr_factor is None else lokr_factor
        return LoKrConfig(alpha=alpha, decompose_factor=factor, **shared)  # pyright: ignore[reportArgumentType]
    return LoraConfig(
        # peft's own `use_rslora` is forgotten by its older versions where diffusers sets an adapter's weight.
        lora_alpha=alpha * sqrt(rank) if kind == "rslora" else alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=dropout,
        **shared,
        init_lora_weights="gaussian",
        use_dora=kind == "dora",
    )


def _pattern(begin: str, begins: Iterable[str]) -> str:
    """The layers that begin like this, but like no longer one of `begins`: peft takes the first pattern that fits."""
    longer = "|".join(re.escape(other) for other in begins if other != begin and other.startswith(begin))
    return f"^{f'(?!{longer})' if longer else ''}{re.escape(begin)}.*"


def read_settings(settings: dict[str, Any]) -> Any:
    """peft's config from what a file says of a LoHa or LoKr."""
    kind = {"LOHA": LoHaConfig, "LOKR": LoKrConfig}[settings["peft_type"]]
    fields = set(kind.__dataclass_fields__)
    return kind(**{name: value for name, value in settings.items() if name in fields})


def kind_of(settings: Any) -> Kind:
    """The kind of adapter that peft's config describes; a rank-stabilised LoRA is one with another alpha."""
    if isinstance(settings, LoraConfig):
        return "dora" if settings.use_dora else "lora"
    return "loha" if isinstance(settings, LoHaConfig) else "lokr"


def without_alpha_for_whole_factors(unet: nn.Module, name: str, settings: Any) -> None:
    """Take alpha as the rank in layers of a LoKr whose two factors are whole.

    peft scales these by alpha / rank as well; LyCORIS, which made LoKr, and viewers do not, since there is no rank.
    """
    for layer, module in unet.named_modules():
        if isinstance(module, LoKrLayer) and name in module.lokr_w1 and name in module.lokr_w2:
            module.alpha[name], module.scaling[name] = module.r[name], 1.0
            settings.alpha_pattern[layer] = module.r[name]
