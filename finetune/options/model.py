"""The model of a run: what is loaded, in which numbers, and what of it learns."""

from dataclasses import dataclass
from typing import Literal

from finetune.option_info import POSITIVE, SHARE, option


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Model and number formats."""

    model: str = option("tiny", aliases=("pretrained_model_name_or_path",), path=True)
    """sd15, sd21, sd21-base, sdxl, ddpm, tiny, sd15-inpainting (sd21-, sdxl-), a hub id (owner/name), a diffusers
    folder, or a .safetensors file."""
    tokenizer: str | None = option(None, requires="a checkpoint in one file", path=True)
    """Tokenizer of a checkpoint in one file: a folder, or bpe_simple_vocab_16e6.txt.gz. Default: from the package
    open_clip, or from the hub cache."""
    method: Literal["lora", "full"] | None = None
    """lora: train a small adapter (default for latent models). full: train all weights of the UNet (default for
    ddpm)."""
    train_modules: tuple[str, ...] | None = option(
        None, requires="method full", suggest_for=("trainable_modules", "layer_filter_regex")
    )
    """Layers of the UNet that learn, by ends or patterns of their names (attn2, up_blocks.*.to_k). Default: all."""
    vae: str | None = option(
        None, requires="text", suggest_for=("pretrained_vae_model_name_or_path", "vae_name"), path=True
    )
    """Diffusers folder or .safetensors file with a VAE that replaces the model's own."""
    vae_scale: tuple[float, ...] | None = option(None, POSITIVE, requires="text", suggest_for=("vae_custom_scale",))
    """Factor that latents are scaled by, or one for each channel, where the model is used to another one than its VAE's
    config says (EQ-VAEs)."""
    vae_shift: tuple[float, ...] | None = option(None, requires="text", suggest_for=("vae_custom_shift",))
    """What is taken from latents before that, or one number for each channel."""
    vae_reflection_padding: bool = option(False, requires="text")
    """Pad the VAE's convolutions by reflection, as EQ-VAEs are trained; most programs that draw with them pad by
    zeros."""
    gradient_checkpointing: bool | float = option(False, SHARE)
    """Recompute activations in the backward pass: less memory for a third more arithmetic. A number: only in this share
    of the blocks, in the order of memory saved per time."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = option("auto", affects="machine")
    """Number format of the UNet's computation. auto: bf16 where the hardware multiplies it natively (CPUs included),
    else fp16 on a GPU and no on a CPU."""
    full_bf16: bool | None = option(
        None, requires="method full, no use_ema, and optimizer adamw, adamw8bit, adafactor or sgd"
    )
    """Keep trained weights in bf16 only, with stochastic rounding: 4 to 8 bytes less per weight. Works best with
    adamw8bit and adafactor. Gradients are accumulated in bf16 too."""
    fused_backward_pass: bool | None = option(None, requires="full_bf16")
    """Update weights during the backward pass and never hold the whole gradient: 2 bytes less per weight. For steps of
    one forward pass (with buckets: of one image), without clipping, in one process."""
    compile: bool | None = option(None, affects="machine", suggest_for=("torch_compile", "compile_unet"))
    """Compile the UNet's blocks with torch.compile. Default: on a GPU, if the run is long enough to recover the
    time."""
    cuda_graphs: bool = option(True, affects="machine")
    """On a GPU, launch a step as one CUDA graph instead of kernel by kernel, if it fits into memory."""
