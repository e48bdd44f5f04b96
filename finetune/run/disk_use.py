"""How many bytes a run writes, roughly: computed from its options before anything is written."""

import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel

from finetune.cache.store import cache_folder
from finetune.config import ResolvedConfig
from finetune.data.chunks import Chunks
from finetune.data.inpainting import MASKS
from finetune.data.sampler import steps_per_epoch
from finetune.models.conditioners import chunks_of
from finetune.models.loading import scratch_unet
from finetune.models.lora import trainable
from finetune.models.model_info import ModelInfo
from finetune.models.source import open_source
from finetune.run.build import adapt
from finetune.run.memory_estimate import MOMENTS
from finetune.text import pluralize

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
_TOKENS = 77
"""Hidden states that are stored of a caption, for each chunk of 75 tokens."""


class DiskUse(NamedTuple):
    """Bytes that a run writes, at most."""

    encodings: float
    """To the cache; 0 where nothing is cached. Encodings that are there already count too."""
    checkpoint: float
    """Of one checkpoint."""
    checkpoints: int
    """How many there are at a time, at most."""
    exports: float
    """Of the export and of `export_formats`."""

    @property
    def output(self) -> float:
        """In the output folder."""
        return self.checkpoint * self.checkpoints + self.exports


def disk_use(config: ResolvedConfig, model_info: ModelInfo, chunks: Chunks) -> DiskUse:
    """What training with this config writes, pictures and logs left out."""
    learned, weights = _numbers(config, model_info)
    frozen = 0
    if model_info.family.latent:
        source = open_source(model_info)
        frozen = sum(source.numbers(part) for part in model_info.family.components if part[:4] in ("vae", "text"))
    trained = 2 if config.full_bf16 else 4
    checkpoint = learned * (trained + 4 * (MOMENTS[config.optimizer] + bool(config.use_ema)))
    saves = max(1, _saves(config, chunks))
    checkpoints = min(saves, config.checkpoints_total_limit + 1) if config.checkpoints_total_limit else saves
    each = _BYTES[config.export_precision]
    sizes = {"unet": weights, "diffusers": weights + frozen, "single-file": weights + frozen}
    exports = sum(each * sizes[form] for form in config.export_formats)
    if config.method == "lora":
        exports += 4 * learned * (saves + 1)  # both layouts, and one for each checkpoint but the last
    else:
        exports += 4 * (weights + frozen)
    return DiskUse(_encodings(config, model_info, chunks), checkpoint, checkpoints, exports)


def disk_line(config: ResolvedConfig, use: DiskUse, output: Path) -> str:
    """What is written where, and what is free there, as a line for the user."""
    free, folder = free_bytes(output), cache_folder(config.cache_dir)
    items = [
        f"{pluralize(use.checkpoints, 'checkpoint')} of {_formatted(use.checkpoint)}",
        f"exports of {_formatted(use.exports)}",
    ]
    if use.encodings and folder:
        items.insert(0, f"encodings of {_formatted(use.encodings)} in {folder}")
    line = f"about {', '.join(items)}; {_formatted(free)} free"
    return line if use.output <= free else f"{line} in {output}, which may not suffice"


def free_bytes(folder: Path) -> int:
    """Free space on the disk where a folder is, or would be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def _formatted(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"


def _numbers(config: ResolvedConfig, model_info: ModelInfo) -> tuple[int, int]:
    """Parameters that learn, and those of the UNet, counted on a UNet without memory."""
    if config.method == "full" and not model_info.scratch:
        weights = open_source(model_info).numbers("unet")
        return weights, weights
    with torch.device("meta"):
        if model_info.scratch:
            unet = scratch_unet(config.resolution)
        else:
            unet = UNet2DConditionModel(
                **UNet2DConditionModel.extract_init_dict(dict(open_source(model_info).config("unet")))[0]
            )
    weights = sum(parameter.numel() for parameter in unet.parameters())
    if config.method == "lora":
        adapt(config, unet)
    return sum(parameter.numel() for parameter in trainable(unet)), weights


def _saves(config: ResolvedConfig, chunks: Chunks) -> int:
    """Checkpoints that are written, those by the clock left out; the last step writes one."""
    steps, epoch = config.max_train_steps, steps_per_epoch(chunks.epoch_visits, config.global_batch)
    periods = [config.checkpointing_steps, config.save_model_epochs and config.save_model_epochs * epoch]
    return sum(int((steps - 1) / period) for period in periods if period) + 1


def _encodings(config: ResolvedConfig, model_info: ModelInfo, chunks: Chunks) -> float:
    """Bytes of encodings of all pictures and captions."""
    if cache_folder(config.cache_dir) is None:
        return 0.0
    pictures, first = sum(chunks.counts), chunks.first
    pictures += len(first) - len(first.trained)
    each = _BYTES[config.cache_precision]
    if not model_info.family.latent:
        return 0.0 if config.live_encoding else 3.0 * config.resolution**2 * pictures * (1 + first.flips)
    source = open_source(model_info)
    vae, unet = source.config("vae"), source.config("unet")
    positions = (config.resolution // 2 ** (len(vae["block_out_channels"]) - 1)) ** 2
    versions = MASKS if model_info.family.inpainting else 1 + first.flips
    latents = 2 * vae["latent_channels"] * positions * each * versions * pictures
    captions = 0 if config.shuffle_caption else len(set(first.captions)) * len(chunks)
    states = captions * chunks_of(config.max_token_length) * _TOKENS * unet["cross_attention_dim"] * each
    return float(states + (0 if config.live_encoding else latents))
