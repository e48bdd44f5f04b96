"""Estimates of the memory and disk space of a run, computed before anything is loaded."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from finetune.cache.folder import cache_folder
from finetune.config import ResolvedConfig, replace
from finetune.data.chunks import Chunks
from finetune.data.sampler import steps_per_epoch
from finetune.errors import UsageError
from finetune.memory_limit import memory_limit
from finetune.models.conditioners import chunks_of
from finetune.models.image_condition import image_condition_of
from finetune.models.loading import scratch_unet
from finetune.models.lora import trainable
from finetune.models.model_info import ModelInfo
from finetune.models.source import open_source
from finetune.optimizer_table import known_optimizer
from finetune.run.build import adapt, captioning_of
from finetune.source_options import parse_settings
from finetune.text import pluralize
from finetune.training.stochastic_rounding import PIECE

LIBRARIES = 0.8e9
"""Bytes that Python and the libraries take in main memory."""

_HEAP = 1.1
"""In main memory a tenth more lies idle between what is in use. Six kinds of runs with Stable Diffusion 1.5 and XL
(LoRA and full, fp32 and bf16; benchmarks/RESULTS.md) took from 9 % less to 10 % more than what this says."""

_RESIDUAL, _TRANSFORMER, _ATTENTION = 9, 31, 9
"""Numbers kept for the backward pass per position and channel of a block: of its residual part, and beside it of a
transformer (latent models) or of plain attention (pixel space). Counted with torch's hooks for saved tensors on the
UNets of Stable Diffusion 1.5 and of the tutorial, at four sizes each: within 3 %."""

_CHECKPOINTED = {0.0: 1.0, 0.25: 0.64, 0.5: 0.4, 0.75: 0.28, 1.0: 0.2}
"""What gradient checkpointing of a share of the blocks leaves of them, about: counted for Stable Diffusion 1.5 at 512
px after the forward pass (1, 0.60, 0.37, 0.24, 0.17), and one block that is computed again."""

_IN_A_PIECE = 28
"""Bytes for each weight that `StochasticRounding` updates at once: it and its gradient in fp32, the optimizer's
temporary values, and the random numbers that round it."""


def kept_numbers(unet: Mapping[str, Any], side: int, *, latent: bool) -> float:
    """Numbers that a forward pass of one example keeps for the backward pass.

    Args:
        unet: its config.
        side: height and width of what it sees (latents, or pixels).
        latent: it looks at a prompt as well.
    """
    blocks = list(zip(unet["block_out_channels"], unet["down_block_types"], strict=True))
    deep = unet.get("transformer_layers_per_block") or 1
    layers = [deep] * len(blocks) if isinstance(deep, int) else [float(np.mean(level)) for level in deep]
    many = unet["layers_per_block"]
    counts = [many] * len(blocks) if isinstance(many, int) else list(many)
    total = 0.0
    for level, (channels, kind) in enumerate(blocks):
        positions = side**2 / 4**level
        attention = _TRANSFORMER * layers[level] if latent else _ATTENTION
        each = _RESIDUAL + (attention if "Attn" in kind else 0)
        total += positions * channels * each * (2 * counts[level] + 1)  # those down, and one more up
        if level == len(blocks) - 1:  # the middle: two residual blocks around an attention
            total += positions * channels * (2 * _RESIDUAL + attention)
    return total


def needed_bytes(config: ResolvedConfig, model_info: ModelInfo, device: torch.device) -> float:
    """What training takes where the UNet is: its weights, what learns, and a micro-batch on its way."""
    latent, side, frozen = model_info.family.latent, largest_resolution(config), 0
    if model_info.scratch:
        with torch.device("meta"):
            unet = scratch_unet(config.resolution)
        shape, weights = dict(unet.config), sum(p.numel() for p in unet.parameters())
    else:
        source = open_source(model_info)
        shape, weights = source.config("unet"), source.numbers("unet")
        if latent:
            frozen = sum(source.numbers(part) for part in model_info.family.components if part[:4] in ("vae", "text"))
            side //= 2 ** (len(source.config("vae")["block_out_channels"]) - 1)
    activations = kept_numbers(shape, side, latent=latent) * config.train_batch_size
    needed = bytes_of(config, weights, activations)
    return _HEAP * (needed + 4 * frozen) + LIBRARIES if device.type == "cpu" else needed


def largest_resolution(config: ResolvedConfig) -> int:
    """The largest resolution of the run and its sources of images."""
    sides = [parse_settings(text).get("resolution", 0) for text in config.source_settings]
    return max([config.resolution, *sides])


def bytes_of(config: ResolvedConfig, weights: int, activations: float) -> float:
    """Estimate the bytes from the number of weights and of activations kept for the backward pass, within a tenth.

    An H100 with Stable Diffusion 1.5 at 512 px took 2.9 GB for a LoRA at batch 1, 17.5 at batch 16, 43.7 for full
    fine-tuning at batch 32 (benchmarks/RESULTS.md); this says 2.7, 16.6 and 43.6.
    """
    bytes_each = 4 if config.mixed_precision == "no" else 2
    activations *= float(np.interp(config.gradient_checkpointing, list(_CHECKPOINTED), list(_CHECKPOINTED.values())))
    total = (weights + activations) * bytes_each
    if config.method == "full":
        # The weights that are computed with are copies of masters, as a rule.
        masters = 4 if bytes_each == 2 and not config.full_bf16 else 0
        kept_beside = masters + 4 * (known_optimizer(config.optimizer).moments + config.use_ema)
        piece = _IN_A_PIECE * min(PIECE, weights) if config.full_bf16 else 0
        if config.fused_backward_pass:  # from the first piece on, when few activations are gone
            total += weights * kept_beside + piece
        else:  # with a gradient; later, without activations, half precision's is gathered in fp32, or piece by piece
            per_weight = bytes_each + kept_beside
            total = max(total + weights * per_weight, weights * (bytes_each + per_weight + masters) + piece)
        total += weights * bytes_each * bool(config.prior_prediction)  # as it was
    return total


def check_memory(
    config: ResolvedConfig, model_info: ModelInfo, device: torch.device, total: float | None = None
) -> str:
    """What training will take and what there is, as a line for the user; where that is too little, what would fit.

    Args:
        config: of the run.
        model_info: its model.
        device: where the UNet runs.
        total: bytes of a GPU that is not here; None: what there is here.

    Raises:
        UsageError: it takes more than twice of what the machine has. The estimate is rough; below that, let it try.
    """
    where = "here" if total is None else "planned for"
    if total is None and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    total = memory_limit() if total is None else total
    needed = needed_bytes(config, model_info, device)
    line = f"about {needed / 1e9:.1f} GB of the {total / 1e9:.1f} GB {where}"
    if needed <= total:
        return line
    less = takes_less(config, model_info, device, total)
    if needed <= 2 * total:
        return f"{line}, which may not suffice; {less}"
    pictures = f"{config.train_batch_size} x {largest_resolution(config)} px"
    raise UsageError(f"training {pictures} at once would take {line}; {less}")


def out_of_memory(config: ResolvedConfig, model_info: ModelInfo, device: torch.device) -> str:
    """What to say when it did not suffice, for smaller parts of a step either, which the trainer tries by itself."""
    if not config.fused_backward_pass:
        passes = config.train_batch_size * config.gradient_accumulation_steps
        config = replace(config, train_batch_size=1, gradient_accumulation_steps=passes)
    foretold = needed_bytes(config, model_info, device)
    less = takes_less(config, model_info, device, 0.9 * foretold)
    pictures = f"{config.train_batch_size} x {largest_resolution(config)} px"
    return f"out of memory, of which training {pictures} was thought to take about {foretold / 1e9:.1f} GB; {less}"


def takes_less(config: ResolvedConfig, model_info: ModelInfo, device: torch.device, at_most: float) -> str:
    """The options that take at most so many bytes and cost the least time, in words; or those that take the least."""
    foretold, needed = needed_bytes(config, model_info, device), {}
    for changes in _lighter(config, latent=model_info.family.latent):
        new = {name: value for name, value in changes.items() if getattr(config, name) != value}
        takes = needed_bytes(replace(config, **new), model_info, device)
        if takes < foretold:
            needed[_flags(new)] = takes
    fitting = [words for words, takes in needed.items() if takes <= at_most] or sorted(needed, key=needed.__getitem__)
    if not fitting:
        return "a lower --resolution takes less"
    lower = "" if needed[fitting[0]] <= at_most else ", and a lower --resolution less"
    return f"{fitting[0]} would take about {needed[fitting[0]] / 1e9:.1f} GB{lower}"


def _lighter(config: ResolvedConfig, *, latent: bool) -> Iterator[dict[str, Any]]:
    """Changes that take less memory, or as much, as a rule the more time the later."""
    batch, passes = config.train_batch_size, config.gradient_accumulation_steps
    again, fewer = {"gradient_checkpointing": True}, {}
    while batch > 1:
        batch, passes = (batch // 2, passes * 2) if batch % 2 == 0 else (1, passes * batch)
        fewer = {"train_batch_size": batch, "gradient_accumulation_steps": passes}
        yield fewer
    yield again
    yield again | fewer
    if config.method != "full":
        return
    if config.mixed_precision == "bf16" and not config.prior_prediction:
        alone = {"full_bf16": True, "optimizer": "adafactor", "use_ema": False} | again
        yield alone | fewer
        one = {"train_batch_size": 1, "gradient_accumulation_steps": 1, "max_grad_norm": 0.0}
        yield alone | one | {"fused_backward_pass": True}
    if latent:
        yield {"method": "lora"} | again | fewer


def _flags(changes: Mapping[str, Any]) -> str:
    """As they are typed; what follows from another of them is left out."""
    follows = ("use_ema", "max_grad_norm")
    if "fused_backward_pass" in changes:
        follows += ("gradient_accumulation_steps",)
    shown = {name: value for name, value in changes.items() if name not in follows}
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in shown.items())


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
    checkpoint = learned * (trained + 4 * (known_optimizer(config.optimizer).moments + bool(config.use_ema)))
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
        f"{pluralize(use.checkpoints, 'checkpoint')} of {_size(use.checkpoint)}",
        f"exports of {_size(use.exports)}",
    ]
    if use.encodings and folder:
        items.insert(0, f"encodings of {_size(use.encodings)} in {folder}")
    line = f"about {', '.join(items)}; {_size(free)} free"
    return line if use.output <= free else f"{line} in {output}, which may not suffice"


def free_bytes(folder: Path) -> int:
    """Free space on the disk where a folder is, or would be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def _size(size: float) -> str:
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
    condition = image_condition_of(model_info.family.image_condition)
    conditions = len(condition.variants(None, has_companion=False)) if condition else 0
    latents = 2 * vae["latent_channels"] * positions * each * (1 + first.flips) * (1 + conditions) * pictures
    captions = 0 if captioning_of(config).varies else len(set(first.captions)) * len(chunks)
    states = captions * chunks_of(config.max_token_length) * _TOKENS * unet["cross_attention_dim"] * each
    return float(states + (0 if config.live_encoding else latents))
