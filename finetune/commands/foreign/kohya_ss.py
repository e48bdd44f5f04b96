"""Import from JSON presets of kohya_ss, the interface to sd-scripts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.commands.foreign import sd_scripts
from finetune.commands.foreign.imported_config import ImportedConfig, word_value

_GUI = {
    "max_resolution": "resolution", "optimizer": "optimizer_type", "stop_text_encoder_training_pct": "",
    "LoRA_type": "", "conv_dim": "", "conv_alpha": "", "lr_warmup": "", "epoch": "", "sdxl": "", "xformers": "",
    "LyCORIS_preset": "", "factor": "", "rank_dropout": "", "module_dropout": "", "use_tucker": "", "use_cp": "",
    "decompose_both": "", "train_norm": "", "use_scalar": "", "rescaled": "", "constrain": "", "unit": "",
    "bypass_mode": "", "dora_wd": "",
}  # fmt: skip
"""What kohya_ss calls otherwise than sd-scripts, or says in another way (""; see `take`)."""


_OF_NETWORK = ("rank_dropout", "module_dropout")
_OF_LYCORIS = ("conv_alpha", "factor", "use_tucker", "decompose_both", "train_norm", "use_scalar", "rescaled",
               "constrain", "bypass_mode", "dora_wd")  # fmt: skip
_OFF = (None, "", 0, False, -1)


def take(given: Mapping[str, Any], place: Path = Path()) -> ImportedConfig:
    """The settings of a preset of kohya_ss, the page around sd-scripts: JSON.

    Args:
        given: option -> value, much of it text.
        place: the folder that files which it names are relative to.
    """
    kind = str(given.get("LoRA_type", ""))
    flat = {_GUI.get(name, name): value for name, value in given.items() if _GUI.get(name, name)}
    flat["network_module"] = "lycoris.kohya" if "LyCORIS" in kind else "networks.lora"
    flat["network_args"] = [f"{name}={given[name]}" for name in _OF_NETWORK if given.get(name) not in _OFF]
    if "LoCon" in kind or "LyCORIS" in kind:
        algorithm = kind.rpartition("/")[2].lower() if "/" in kind else "locon"
        flat["network_args"] += [f"algo={algorithm}", f"conv_dim={given.get('conv_dim')}"]
        flat["network_args"] += [f"{name}={given[name]}" for name in _OF_LYCORIS if given.get(name) not in _OFF]
        if preset := given.get("LyCORIS_preset"):
            flat["network_args"].append(f"preset={preset}")
    epochs, steps = word_value(given.get("epoch", 0)), word_value(given.get("max_train_steps", 0))
    if not flat.get("max_train_epochs") and not steps and epochs:
        flat["max_train_epochs"] = epochs
    if warmup := word_value(given.get("lr_warmup", 0)):
        flat["lr_warmup_steps"] = warmup / 100 if isinstance(warmup, int | float) else warmup  # it is in percent there
    script = "sdxl_train_network.py" if given.get("sdxl") else "train_network.py"
    imported = sd_scripts.take(flat, script, place)
    imported.tool = "kohya_ss"
    return imported
