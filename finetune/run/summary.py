"""The summary that a run prints before it starts."""

import logging
from collections import Counter
from dataclasses import fields

from finetune.cache.encoded_dataset import EncodedDataset
from finetune.cache.folder import cache_folder
from finetune.cache.store import KIND_NAMES
from finetune.config import ResolvedConfig
from finetune.data.chunks import Chunks
from finetune.data.image_dataset import ImageDataset
from finetune.data.sampler import steps_per_epoch
from finetune.evaluators.sample_grids import SAMPLING_SHARE, SamplePlan
from finetune.log_handlers import labelled
from finetune.models.adapter_types import NAMES
from finetune.models.conditioners import spelt_words
from finetune.models.families import defaults
from finetune.models.lora import LORA_FILE, Adapter, trainable
from finetune.options.objective import ObjectiveOptions
from finetune.results.export import kohya_file
from finetune.run.context import Run
from finetune.text import join_limited, pluralize, pluralize_float
from finetune.training.backend import is_compiled
from finetune.training.diff2flow import Diff2Flow

_log = logging.getLogger(__name__)


def print_summary(run: Run) -> None:
    """Log a row for each of `summary_rows`, and a note for each thing that looks unintended."""
    for name, text in summary_rows(run).items():
        _log.info(text, extra=labelled(name))
    for line in [
        *run.pictures.notes(),
        *_about_words(run),
        *_about_memory(run),
        *_about_sizes(run.grids.plan),
        *_about_options(run),
        *_about_adapter(run),
    ]:
        _log.warning(line)


def summary_rows(run: Run) -> dict[str, str]:
    """What is trained, on what, how and where to: label -> text."""
    config, encoded, family = run.config, run.encoded, run.model.family
    rows = {
        "Model": f"{config.model} ({family.description}); predicts {run.trainer.objective.prediction_type}",
        "Objective": _objective(run),
        "Trainable": _trainable(run),
        "Data": _data(run),
        "Volumes": chunks_row(run.chunks),
        "Validation": _validation(run),
        "Forgetting": _forgetting(run),
        "Masks": _masks(run),
        "Captions": _captions(run) if family.latent else "",
        "Cache": encodings(encoded, config.cache_dir),
        "Optimizer": f"{config.optimizer}, learning rate {config.learning_rate:g}, {config.lr_scheduler} schedule, "
        f"{pluralize(config.lr_warmup_steps, 'warm-up step')}{', EMA' if config.use_ema else ''}",
        "Precision": f"{_precision(config)} on {run.trainer.device.type}{_processes(run)}"
        f"{', compiled' if is_compiled(run.model.unet) else ''}",
        "Samples": _samples(run.grids.plan),
        "Output": str(run.folder),
    }
    return {name: text for name, text in rows.items() if text}


def _objective(run: Run) -> str:
    """The options of the objective that were given."""
    config = run.config
    names = [field.name for field in fields(ObjectiveOptions) if field.name in config.given]
    settings = [f"{name} {value}" for name in names if (value := getattr(config, name)) is not None]
    if isinstance(run.trainer.objective, Diff2Flow):
        settings.append("a model of noise prediction with the loss of flow matching (Diff2Flow)")
    return ", ".join(settings)


def _data(run: Run) -> str:
    config, images = run.config, pluralize(sum(run.chunks.counts), "image")
    epochs = float(config.max_train_steps / steps_per_epoch(run.chunks.epoch_visits, config.global_batch))
    steps = f"{pluralize(config.max_train_steps, 'step')} of batch size {config.global_batch}"
    share = f"{pluralize_float(epochs, 'epoch')}"
    return f"{images}{_repeats(run.encoded)}; {steps} ({share}); {sizes(run.pictures)}"


def chunks_row(chunks: Chunks) -> str:
    """How many there are, where not all images are opened before training."""
    if len(chunks) == 1:
        return ""
    first = pluralize(len(chunks.first), "image")
    return f"{len(chunks)}, each opened when training reaches it; sizes, captions and notes are of the first ({first})"


def _precision(config: ResolvedConfig) -> str:
    if config.full_bf16:
        return f"bf16 only{', updates in the backward pass' if config.fused_backward_pass else ''}"
    return "fp32" if config.mixed_precision == "no" else config.mixed_precision


def _processes(run: Run) -> str:
    world_size = run.trainer.parallel.world_size
    return f" in {world_size} processes" if world_size > 1 else ""


def _trainable(run: Run) -> str:
    learned = sum(p.numel() for p in trainable(run.model.unet)) / 1e6
    total = sum(p.numel() for p in run.model.unet.parameters()) / 1e6
    if run.config.method == "full":
        if run.config.train_modules is not None:
            return f"{learned:.2f}M of {total:.1f}M parameters of the UNet"
        return f"all {learned:.1f}M parameters of the UNet"
    lora = f"{NAMES[run.config.lora_type]}, rank {run.config.rank}, alpha {run.config.lora_alpha:g}"
    if run.config.conv_rank is not None:
        lora += f", convolutions rank {run.config.conv_rank}, alpha {run.config.conv_alpha or run.config.conv_rank:g}"
    return f"{lora}: {learned:.2f}M parameters; the UNet's {total - learned:.1f}M are frozen"


def _validation(run: Run) -> str:
    held, plan = len(run.pictures.held_out), run.validation.plan
    if not held and run.config.validation_fraction:
        return "none: the images chosen for it are near duplicates of too many others; use --validation_data"
    if not held:
        return "none: no images are held out"
    some = "" if held == len(plan.examples) else f", {len(plan.examples)} of them used"
    return f"{pluralize(held, 'image')} held out{some}, {plan.draws} timesteps each"


def _forgetting(run: Run) -> str:
    if run.forgetting is None:
        return ""
    probes = run.forgetting.probes
    trigger = ", with and without the trigger" if probes.triggered else ""
    prompts = pluralize(probes.plain.x_t.shape[1], "unrelated prompt")
    return f"tracking how {prompts} change{trigger}"


def _masks(run: Run) -> str:
    files = len(run.pictures.companion_digests())
    if run.model.image_condition is not None:
        return run.model.image_condition.summary(files, live=run.config.live_encoding)
    if not run.pictures.masked:
        return ""
    alpha = " and alpha channels" if run.config.masked_loss else ""
    return f"{files}{alpha}; loss counts only in white areas"


def _captions(run: Run) -> str:
    named = {
        "txt": ".txt files",
        "caption": ".caption files",
        "prompt": "--prompt",
        "class_prompt": "--class_prompt",
        "folder": "folder names",
    }
    counts = ", ".join(f"{count} from {named.get(source, source)}" for source, count in run.pictures.sources.items())
    return f"{counts} ({len(set(run.encoded.captions))} distinct)"


def _repeats(encoded: EncodedDataset) -> str:
    """How many come more than once in an epoch."""
    counts = sorted(Counter(encoded.repeats).items())
    repeated = [f"{count} repeated {times} times" for times, count in counts if times > 1]
    repeated += [f"{len(some)} taking turns in {visits} visits" for some, visits in encoded.pictures.sampled]
    return f" ({', '.join(repeated)} per epoch)" if repeated else ""


def sizes(pictures: ImageDataset, most: int = 4) -> str:
    """Width and height of the images that are trained on, and how many have each, the most frequent first."""
    every = pictures.sizes()
    counts = Counter(every[index] for index in pictures.trained)
    if set(counts) == {(0, 0)}:
        return "sizes as given"
    if len(counts) == 1:
        ((height, width),) = counts
        return f"{width}x{height}"
    counted = [f"{width}x{height}: {count}" for (height, width), count in counts.most_common()]
    return f"{pluralize(len(counts), 'size')} ({join_limited(counted, most)})"


def encodings(encoded: EncodedDataset, cache_dir: str | None) -> str:
    """How many encodings were cached and how many are new, and where they are kept."""
    folder, parts = cache_folder(cache_dir), list[str]()
    for made in encoded.made:
        kind = KIND_NAMES[made.kind]
        flipped = " with their mirror images" if made.kind == "picture" and encoded.pictures.flips else ""
        new = f"{made.new} new" if made.new else "" if made.left else "all cached"
        left = f"{made.left} to be encoded during training" if made.left else ""
        parts.append(f"{pluralize(made.items, kind)}{flipped} ({', '.join(filter(None, (new, left)))})")
    return f"{', '.join(parts)} in {folder or 'memory'}"


def _samples(samples: SamplePlan) -> str:
    if not samples.prompts:
        return "none"
    size = f"{pluralize(len(samples.prompts), 'prompt')} x {pluralize(samples.pictures, 'image')}"
    if samples.every:
        when = f"every {float(samples.every):.4g} steps"
    else:
        when = f"at the start, the end, and between within {SAMPLING_SHARE:.0%} of the time"
    return f"{size}, {when}; about {max(1, round(100 * samples.share))}% of the run"


def _about_options(run: Run) -> list[str]:
    """Options that look as if they were not meant so."""
    config, lines = run.config, list[str]()
    if config.masked_loss and not run.pictures.companion_digests():
        lines.append("--masked_loss is set, but there are no mask files: only alpha channels count")
    if run.model.family.layout == "sdxl" and config.clip_skip not in (None, 2):
        lines.append(f"--clip_skip {config.clip_skip}: XL is made for 2, and sd-scripts takes 2 whatever it is given")
    pictures = max(1, len(run.pictures.trained))
    usual = defaults(
        run.model.family,
        config.method,
        config.optimizer,
        pictures=pictures,
        resolution=config.resolution,
        varied_captions=False,
    )["learning_rate"]
    if config.learning_rate >= 100 * usual:
        lines.append(f"learning_rate {config.learning_rate:g} is {config.learning_rate / usual:.0f} times the default")
    return lines


def _about_adapter(run: Run) -> list[str]:
    """Adapted layers that some programs do not read, as tests/clients has measured it."""
    adapter = Adapter.attached_to(run.model.unet)
    outside = adapter.layers_outside_blocks() if adapter else []
    if not outside:
        return []
    file, layers = kohya_file(run.folder).name, pluralize(len(outside), "adapted layer")
    return [
        f"{layers} outside of the UNet's blocks ({join_limited(outside)}): diffusers before 0.40 does not load them "
        f"from {file}; it loads {LORA_FILE}. ComfyUI, A1111 and Forge load {file}"
    ]


def _about_sizes(samples: SamplePlan) -> list[str]:
    other = sum(prompt.other_size for prompt in samples.prompts)
    unknown = sorted({setting for prompt in samples.prompts for setting in prompt.unknown})
    lines = (
        [f"--w and --h of {pluralize(other, 'sample prompt')} are ignored: grids have the training resolution"]
        if other
        else []
    )
    return lines + ([f"ignored settings of sample prompts: {' '.join(unknown)}"] if unknown else [])


def _about_memory(run: Run) -> list[str]:
    """Networks that compute less at once than usual."""
    reduced = {"picture": run.model.encoder.fixed_batches.most, "caption": run.model.conditioner.fixed_batches.most}
    return [
        f"out of memory while encoding: {pluralize(most, kind)} at a time from then on; "
        "the last bits of their encodings may differ from those of a run with more memory"
        for kind, most in reduced.items()
        if most is not None
    ]


def _about_words(run: Run) -> list[str]:
    """Captions that the tokenizer will spell or cut."""
    conditioner, encoded = run.model.conditioner, run.encoded
    if conditioner.tokenizer is None:
        return []
    lines = []
    spelt = spelt_words(conditioner.tokenizer, encoded.captions) if run.model.family.tiny_vocabulary else []
    if spelt:
        lines.append(
            f"{run.config.model} splits words that it does not know into several tokens: {join_limited(spelt)}"
        )
    counts, limit = conditioner.token_counts(encoded.captions), conditioner.token_limit
    long = [f"{name} ({count})" for name, count in zip(encoded.ids, counts, strict=True) if count > limit]
    if long:
        more = "; --max_token_length 225 keeps up to 225" if run.config.max_token_length < 225 else ""
        lines.append(
            f"{pluralize(len(long), 'caption')} longer than {limit} tokens, truncated{more}: {join_limited(long)}"
        )
    return lines
