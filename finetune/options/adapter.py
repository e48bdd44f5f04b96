"""The adapter of a LoRA run."""

from dataclasses import dataclass
from typing import Literal

from finetune.option_info import AT_LEAST_ONE, BELOW_ONE, POSITIVE, option


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """Adapter: LoRA and its relatives."""

    init_lora_weights: Literal["gaussian", "pissa"] = option(
        "gaussian", requires="lora_type lora or rslora", suggest_for=("lora_initialisation_style",)
    )
    """gaussian: the adapter starts at zero. pissa: at the largest singular values of the weights, which the base loses
    (Meng et al. 2024); the exported file has twice the rank."""
    lora_type: Literal["lora", "rslora", "dora", "loha", "lokr"] = option(
        "lora", requires="method lora", suggest_for=("algo", "peft_type", "use_dora", "use_rslora", "network_module")
    )
    """lora; rslora: scaled by alpha / sqrt(rank), for high ranks; dora: also learns the norm of each row; loha, lokr:
    products of factors, which reach higher ranks with fewer weights (LyCORIS)."""
    rank: int = option(16, AT_LEAST_ONE, requires="method lora", suggest_for=("network_dim",))
    """LoRA rank."""
    lora_alpha: float | None = option(None, POSITIVE, requires="method lora", suggest_for=("network_alpha",))
    """LoRA alpha. The update is scaled by alpha / rank. Default: the rank."""
    lora_dropout: float = option(
        0.0, BELOW_ONE, requires="lora_type lora, rslora or dora", suggest_for=("network_dropout",)
    )
    """Dropout inside the LoRA layers, in [0, 1)."""
    rank_dropout: float = option(0.0, BELOW_ONE, requires="method lora")
    """Share of the ranks of the adapter that a step leaves out, in [0, 1)."""
    module_dropout: float = option(0.0, BELOW_ONE, requires="method lora")
    """Share of the adapter's layers that a step leaves out, in [0, 1)."""
    lokr_factor: int | None = option(None, AT_LEAST_ONE, requires="lora_type lokr", suggest_for=("decompose_factor",))
    """Size of the smaller factor of a LoKr, as far as it divides the layer. Default: near the square root of the
    layer's size. A rank above the larger factor's keeps that one whole."""
    scale_weight_norms: float | None = option(None, POSITIVE, requires="lora_type lora or rslora")
    """Keep the norm of each layer's update below this; 1 is usual."""
    lora_target_modules: tuple[str, ...] | None = option(
        None, requires="method lora", suggest_for=("lora_layers", "layer_filter", "lora_layer_preset")
    )
    """Layers that get an adapter: attn-only, attn-mlp (all of the transformers), full, or ends or patterns of their
    names (to_q, up_blocks.*.to_k). Default: attention and feed-forward."""
    conv_rank: int | None = option(
        None, AT_LEAST_ONE, requires="method lora", suggest_for=("conv_dim", "network_conv_dim")
    )
    """Also adapt the residual blocks (LoCon), and convolutions with a kernel larger than 1 x 1 with this rank."""
    conv_alpha: float | None = option(None, POSITIVE, requires="conv_rank")
    """Alpha of these convolutions. Default: conv_rank."""
    block_rank: tuple[str, ...] | None = option(
        None, requires="method lora", suggest_for=("rank_pattern", "block_dims")
    )
    """Ranks of single blocks, by the start of layer names: up_blocks.1=32 mid=8. Alpha is the same for all."""
    init_lora: str | None = option(None, requires="method lora", suggest_for=("network_weights",), path=True)
    """LoRA file to start from, in kohya's or peft's format, with the same layers and rank."""
