"""The network of a run of sd-scripts: its own LoRA, or LyCORIS."""

from collections.abc import Mapping
from typing import Any

from finetune.commands.foreign.imported_config import ImportedConfig, word_value
from finetune.models.lora_layers import RESIDUAL_BLOCKS
from finetune.options import ATTENTION_AND_FEED_FORWARD

TRANSFORMERS = (*ATTENTION_AND_FEED_FORWARD, "proj_in", "proj_out")
"""The layers that sd-scripts adapts: every linear layer and 1 x 1 convolution of a transformer."""
_EVERYWHERE = (*TRANSFORMERS, *RESIDUAL_BLOCKS, "conv_in", "conv_out", "time_embedding.linear_1",
               "time_embedding.linear_2")  # fmt: skip
_PRESETS = {
    "full": _EVERYWHERE, "unet-transformer-only": TRANSFORMERS, "attn-mlp": ATTENTION_AND_FEED_FORWARD,
    "attn-only": ("to_q", "to_k", "to_v", "to_out.0"), "unet-convblock-only": RESIDUAL_BLOCKS,
}  # fmt: skip
"""LyCORIS' presets (`lycoris/config.py`) -> the layers of the UNet that they adapt."""
_ALGORITHMS = {"lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr"}


def take_network(imported: ImportedConfig, module: Any, arguments: Any, weight_norms: Any) -> None:
    """The kind of adapter, its layers and its dropouts; once rank and alpha are known.

    Args:
        imported: has rank and alpha.
        module: `network_module`.
        arguments: `network_args`.
        weight_norms: `scale_weight_norms`.
    """
    words = arguments if isinstance(arguments, list) else str(arguments or "").split()
    given = {name: word_value(text) for name, _, text in (str(word).partition("=") for word in words)}
    _take_kind(imported, given)
    if module == "lycoris.kohya":
        _take_lycoris_layers(imported, given)
    elif rank := given.pop("conv_dim", None):
        imported.set("conv_rank", rank, "network_args.conv_dim")
        imported.set("conv_alpha", given.pop("conv_alpha", 1), "network_args.conv_alpha")
    given.pop("conv_alpha", None)
    for name, ours in {
        "rank_dropout": "rank_dropout",
        "module_dropout": "module_dropout",
        "dropout": "lora_dropout",
        "loraplus_lr_ratio": "loraplus_lr_ratio",
        "loraplus_unet_lr_ratio": "loraplus_lr_ratio",
    }.items():
        if share := given.pop(name, None):
            imported.set(ours, share, f"network_args.{name}")
    kind = imported.ours.get("lora_type", "lora")
    for name in ("lora_dropout", "loraplus_lr_ratio"):
        if kind in ("loha", "lokr") and name in imported.ours:
            imported.skip(name, imported.ours.pop(name), f"{kind} has none here")
    if weight_norms and kind in ("lora", "rslora"):
        imported.set("scale_weight_norms", weight_norms, "scale_weight_norms")
    elif weight_norms:
        imported.skip("scale_weight_norms", weight_norms, "it is for lora_type lora and rslora here")
    for name, value in given.items():
        if value not in (None, False, "", 0):
            imported.skip(f"network_args.{name}", value)


_MODULES = {
    "Attention": ("to_q", "to_k", "to_v", "to_out.0"), "FeedForward": ("ff.net.0.proj", "ff.net.2"),
    "Transformer2DModel": TRANSFORMERS, "ResnetBlock2D": RESIDUAL_BLOCKS, "BasicTransformerBlock":
    ATTENTION_AND_FEED_FORWARD, "UNet2DConditionModel": _EVERYWHERE,
}  # fmt: skip
"""Classes of modules that a preset of LyCORIS names -> the layers in them."""


def take_lycoris(imported: ImportedConfig, settings: Mapping[str, Any]) -> None:
    """The network of LyCORIS by itself, as a table of its arguments (`lycoris.create_lycoris`)."""
    given = dict(settings)
    imported.set("rank", given.pop("linear_dim", 4), "lycoris_config.linear_dim")
    imported.set("lora_alpha", given.pop("linear_alpha", 1), "lycoris_config.linear_alpha")
    preset = given.pop("apply_preset", None) or {}
    names = preset.get("target_module") or list(_MODULES)
    if unknown := [name for name in names if name not in _MODULES]:
        imported.skip("lycoris_config.target_module", unknown, f"the modules of a UNet: {', '.join(_MODULES)}")
    layers = dict.fromkeys(layer for name in names for layer in _MODULES.get(name, ()))
    imported.ours["lora_target_modules"] = tuple(layers) or ATTENTION_AND_FEED_FORWARD
    factors = {
        str(module.get("factor")) for module in (preset.get("module_algo_map") or {}).values() if module.get("factor")
    }
    if factors - {str(given.get("factor"))}:
        imported.skip("lycoris_config.module_algo_map", sorted(factors), "one factor is taken for all layers")
    _take_kind(imported, given)
    if "conv1" in layers:
        imported.set("conv_rank", given.pop("conv_dim", None) or imported.ours["rank"], "lycoris_config.conv_dim")
        alpha = given.pop("conv_alpha", None) or imported.ours["lora_alpha"]
        imported.set("conv_alpha", alpha, "lycoris_config.conv_alpha")
    for name in ("dropout", "rank_dropout", "module_dropout"):
        if share := given.pop(name, None):
            imported.set("lora_dropout" if name == "dropout" else name, share, f"lycoris_config.{name}")
    neutral = {"multiplier": 1.0, "bypass_mode": given.get("bypass_mode"), "conv_dim": given.get("conv_dim"),
               "conv_alpha": given.get("conv_alpha")}  # fmt: skip
    for name, value in given.items():
        if value not in (None, False, "", 0, neutral.get(name)):
            imported.skip(f"lycoris_config.{name}", value)


def _take_kind(imported: ImportedConfig, given: dict[str, Any]) -> None:
    algorithm = given.pop("algo", "lora")
    if algorithm in _ALGORITHMS:
        imported.ours["lora_type"] = _ALGORITHMS[algorithm]
    else:
        imported.skip("network_args.algo", algorithm, f"the kinds here: {', '.join(_ALGORITHMS)}")
    kind = imported.ours.get("lora_type", "lora")
    factor = given.pop("factor", None)
    if kind == "lokr" and factor and factor > 0:
        imported.set("lokr_factor", factor, "network_args.factor")
    if kind == "lokr" and given.pop("full_matrix", False):
        imported.ours["rank"] = 10_000  # above that of every factor, of which the larger one is whole then
    for switch, ours in {"dora_wd": "dora", "rs_lora": "rslora"}.items():
        if not given.pop(switch, False):
            continue
        if kind == "lora":
            imported.ours["lora_type"] = kind = ours
        else:
            imported.skip(f"network_args.{switch}", True, f"{kind} is taken, of which there is no {ours} here")


def _take_lycoris_layers(imported: ImportedConfig, given: dict[str, Any]) -> None:
    """LyCORIS adapts convolutions too, with the rank and alpha of the other layers unless they have their own."""
    preset = given.pop("preset", "full")
    if preset not in _PRESETS:
        imported.skip("network_args.preset", preset, f"the presets here: {', '.join(_PRESETS)}")
    layers = _PRESETS.get(preset, _EVERYWHERE)
    imported.ours["lora_target_modules"] = layers
    if "conv1" in layers:
        rank, alpha = imported.ours.get("rank", 4), imported.ours.get("lora_alpha", 1.0)
        imported.set("conv_rank", given.pop("conv_dim", None) or rank, "network_args.conv_dim")
        imported.set("conv_alpha", given.pop("conv_alpha", None) or alpha, "network_args.conv_alpha")
    given.pop("conv_dim", None)
