"""finetune-unet lora info: show the contents of a LoRA file as a table."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.log_handlers import row

_SHOWN = {
    "ss_base_model_version": "base", "ss_sd_model_name": "model", "modelspec.prediction_type": "predicts",
    "ss_steps": "steps", "ss_epoch": "epochs", "ss_num_train_images": "pictures", "ss_resolution": "resolution",
    "ss_learning_rate": "rate", "ss_optimizer": "optimizer", "modelspec.trigger_phrase": "trigger",
}  # fmt: skip
"""Entry of the metadata -> its row's name."""
_TAGS = 8
"""How many of the most frequent tags are shown."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Show format, type, ranks, layers and metadata of a LoRA file."""

    file: str
    """LoRA file in kohya's or peft's format."""
    model: str | None = None
    """Model that the LoRA is for, if its tensors do not show that."""


def run(options: Options) -> None:
    """Print the table. Raises UsageError for no file, and ModelError for one that is no LoRA of a UNet."""
    from finetune.models.lora import Adapter
    from finetune.models.lora_tools import open_lora
    from finetune.text import pluralize

    path = Path(options.file).expanduser()
    lora = open_lora(path, options.model)
    metadata = Adapter.read_metadata(path)
    layers = lora.layers()
    numbers = sum(tensor.numel() for tensor in lora.tensors.values())
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in lora.tensors.values()})
    rows: dict[str, Any] = {
        "file": f"{path} ({path.stat().st_size / 1e6:.1f} MB)",
        "layout": lora.layout,
        "kind": lora.kind + (" with the norms of a DoRA" if lora.has_norms and lora.kind != "dora" else ""),
        "made for": lora.family or "unknown",
        "rank": _counts(lora.ranks().values()),
        "alpha": _counts(lora.alphas.get(layer, "= rank") for layer in layers),
        "layers": f"{len(layers)}: {_counts(map(_place, layers))}",
        "numbers": f"{numbers / 1e6:.2f} M in {', '.join(dtypes)}",
        "text": f"{pluralize(lora.text_tensors, 'tensor')} for text encoders" if lora.text_tensors else "",
    }
    rows |= {name: metadata.get(entry, "") for entry, name in _SHOWN.items()} | {"tags": _tags(metadata)}
    for name, text in rows.items():
        if text:
            print(row(name, text))


def _counts(values: Iterable[Any]) -> str:
    """ "16 (190 layers), 4 (2 layers)"; one value alone needs no number."""
    counts = Counter(f"{value:g}" if isinstance(value, float) else str(value) for value in values).most_common()
    return counts[0][0] if len(counts) == 1 else ", ".join(f"{value} ({count})" for value, count in counts)


def _place(layer: str) -> str:
    """What a layer is, in a word."""
    if "attn" in layer:
        return "attention"
    if ".ff." in layer:
        return "feed-forward"
    return "projections" if "proj" in layer else "convolutions" if "conv" in layer else "others"


def _tags(metadata: "dict[str, str]") -> str:
    counts: Counter[str] = Counter()
    for tags in json.loads(metadata.get("ss_tag_frequency", "{}")).values():
        counts.update(tags)
    return ", ".join(f"{tag} ({count})" for tag, count in counts.most_common(_TAGS))
