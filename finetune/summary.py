"""The lines a run prints before it starts: everything that a person would want to stop it for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from finetune.cache.encode import Encoded
from finetune.config import TrainConfig
from finetune.data.sampler import steps_per_epoch
from finetune.models.conditioners import ClipConditioner, spelt_words
from finetune.models.families import Family
from finetune.models.loading import DiffusionModel
from finetune.models.locate import Location
from finetune.models.lora import trainable
from finetune.plan import SamplePlan, global_batch

NAMED = 5
"""How many files a line names before it only counts the rest."""


def print_summary(
    config: TrainConfig,
    found: Location,
    model: DiffusionModel,
    pictures: Any,
    encoded: Encoded,
    samples: SamplePlan,
    device: torch.device,
    folder: Path,
) -> None:
    """Model, pictures, captions, schedule, precision, samples and output, a line each; then what was noticed."""
    learned = sum(p.numel() for p in trainable(model.unet)) / 1e6
    whole = sum(p.numel() for p in model.unet.parameters()) / 1e6
    learns = f"every weight of the UNet: {learned:.1f} M"
    if config.method == "lora":
        lora = f"LoRA rank {config.rank}, alpha {config.lora_alpha:g}"
        learns = f"{lora}: {learned:.2f} M beside the UNet's {whole - learned:.1f} M"
    batch = min(global_batch(config), len(encoded))
    epochs = (config.max_train_steps or 0) / steps_per_epoch(len(encoded), batch)
    rows = {
        "model": f"{config.model} ({found.family.description}), predicts {model.scheduler.config['prediction_type']}",
        "learns": f"{learns} parameters",
        "pictures": f"{len(encoded)} photos: {config.max_train_steps} steps of {batch}, {epochs:.4g} epochs, "
        f"{config.resolution} px",
        "captions": _captions(getattr(pictures, "sources", {}), encoded, found.family.latent),
        "optimizer": f"{config.optimizer}, learning rate {config.learning_rate:g} {config.lr_scheduler}, "
        f"{config.lr_warmup_steps} warm-up steps{', EMA' if config.use_ema else ''}",
        "precision": f"{'fp32' if config.mixed_precision == 'no' else config.mixed_precision} on {device.type}",
        "samples": _samples(samples),
        "output": str(folder),
    }
    for name, text in rows.items():
        if text:
            print(f"{name:>10}  {text}")
    for line in _noticed(config, pictures, encoded, model, found.family):
        print(f"{'note':>10}  {line}")


def _captions(sources: Mapping[str, int], encoded: Encoded, latent: bool) -> str:
    if not latent:
        return ""
    named = {"txt": ".txt files", "caption": ".caption files", "prompt": "--prompt"}
    counts = ", ".join(f"{count} from {named.get(source, source)}" for source, count in sources.items())
    distinct = len(set(encoded.captions))
    return f"{counts or len(encoded.captions)} ({distinct} distinct)"


def _samples(samples: SamplePlan) -> str:
    if not samples.prompts:
        return "none: they would take over 5 % of so short a run (ask with --sample_every) or are turned off"
    when = f", every {samples.every} steps" if samples.every else ""
    return (
        f"{len(samples.prompts)} prompts x {samples.pictures} pictures at the start and the end{when}: "
        f"about {100 * samples.share:.1f} % of the run"
    )


def _noticed(config: TrainConfig, pictures: Any, encoded: Encoded, model: DiffusionModel, family: Family) -> list[str]:
    lines = []
    skipped = getattr(pictures, "skipped", [])
    if skipped:
        lines.append(f"{len(skipped)} skipped: {_listed([f'{bad.path} ({bad.reason})' for bad in skipped])}")
    if orphans := getattr(pictures, "orphans", []):
        lines.append(f"caption files without a picture, {len(orphans)}: {_listed([str(path) for path in orphans])}")
    if small := getattr(pictures, "small", 0):
        lines.append(f"smaller than {config.resolution} px and enlarged: {small} pictures")
    if isinstance(model.conditioner, ClipConditioner):
        spelt = spelt_words(model.conditioner.tokenizer, encoded.captions) if family.name == "tiny" else []
        if spelt:
            lines.append(f"words that tiny does not know, spelt with several tokens: {_listed(spelt)}")
        if triggerless := getattr(pictures, "triggerless", 0):
            lines.append(f"{triggerless} captions say [trigger], but no --trigger is given: it is left out of them")
        counts = model.conditioner.token_counts(encoded.captions)
        limit = model.conditioner.token_limit
        long = [f"{name} ({count})" for name, count in zip(encoded.ids, counts, strict=True) if count > limit]
        if long:
            lines.append(f"{len(long)} captions are over {limit} tokens and are cut: {_listed(long)}")
    return lines


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + rest
