"""The lines a run prints before it starts: everything that a person would want to stop it for."""

from collections import Counter

from finetune.cache.encoded_dataset import EncodedDataset
from finetune.cache.store import cache_folder
from finetune.config import ResolvedConfig
from finetune.data.chunks import Chunks
from finetune.data.image_dataset import ImageDataset
from finetune.data.inpainting import MASKS
from finetune.data.sampler import steps_per_epoch
from finetune.models.adapter_types import NAMES
from finetune.models.conditioners import spelt_words
from finetune.models.families import defaults
from finetune.models.lora import trainable
from finetune.run.backend import is_compiled
from finetune.run.context import Run
from finetune.run.sample_grids import SAMPLING_SHARE, SamplePlan
from finetune.text import join_limited, pluralize


def print_summary(run: Run) -> None:
    """A line for each of `summary_rows`; then what was noticed."""
    for name, text in summary_rows(run).items():
        print(f"{name:>10}  {text}")
    for line in [
        *run.pictures.notes(),
        *_about_words(run),
        *_about_memory(run),
        *_about_sizes(run.grids.plan),
        *_about_options(run),
    ]:
        print(f"{'note':>10}  {line}")


def summary_rows(run: Run) -> dict[str, str]:
    """Model, pictures, captions, schedule, precision, samples and output: name -> text."""
    config, encoded, family = run.config, run.encoded, run.model.family
    epochs = float(config.max_train_steps / steps_per_epoch(run.chunks.epoch_visits, config.global_batch))
    rows = {
        "model": f"{config.model} ({family.description}), predicts {run.trainer.objective.prediction_type}",
        "learns": f"{_learns(run)} parameters",
        "pictures": f"{pluralize(sum(run.chunks.counts), 'photo')}{_repeats(encoded)}: "
        f"{pluralize(config.max_train_steps, 'step')} of {config.global_batch}, {epochs:.4g} epochs, "
        f"{sizes(run.pictures)}",
        "volumes": chunks_row(run.chunks),
        "validation": _validation(run),
        "forgetting": _forgetting(run),
        "masks": _masks(run),
        "captions": _captions(run) if family.latent else "",
        "encodings": encodings(encoded, config.cache_dir),
        "optimizer": f"{config.optimizer}, learning rate {config.learning_rate:g} {config.lr_scheduler}, "
        f"{config.lr_warmup_steps} warm-up steps{', EMA' if config.use_ema else ''}",
        "precision": f"{_precision(config)} on {run.trainer.device.type}{_processes(run)}"
        f"{', compiled' if is_compiled(run.model.unet) else ''}",
        "samples": _samples(run.grids.plan),
        "output": str(run.folder),
    }
    return {name: text for name, text in rows.items() if text}


def chunks_row(chunks: Chunks) -> str:
    """How many there are, where not all pictures are looked at at once."""
    if len(chunks) == 1:
        return ""
    return (
        f"{len(chunks)}, each looked at when the run comes to it; sizes, captions and notes here are those of the "
        f"first, of {pluralize(len(chunks.first), 'picture')}"
    )


def _precision(config: ResolvedConfig) -> str:
    if config.full_bf16:
        return f"bf16 alone{', updates in the backward pass' if config.fused_backward_pass else ''}"
    return "fp32" if config.mixed_precision == "no" else config.mixed_precision


def _processes(run: Run) -> str:
    probe_prompts = run.trainer.parallel.world_size
    return f" in {probe_prompts} processes" if probe_prompts > 1 else ""


def _learns(run: Run) -> str:
    learned = sum(p.numel() for p in trainable(run.model.unet)) / 1e6
    total = sum(p.numel() for p in run.model.unet.parameters()) / 1e6
    if run.config.method == "full":
        return f"every weight of the UNet: {learned:.1f} M"
    lora = f"{NAMES[run.config.lora_type]} rank {run.config.rank}, alpha {run.config.lora_alpha:g}"
    return f"{lora}: {learned:.2f} M beside the UNet's {total - learned:.1f} M"


def _validation(run: Run) -> str:
    held, plan = len(run.pictures.held_out), run.validation.plan
    if not held and run.config.validation_fraction:
        return "none: those drawn for it are near duplicates of too many others; --validation_data names others"
    if not held:
        return "none: no pictures are held out"
    some = "" if held == len(plan.examples) else f", {len(plan.examples)} of them used"
    return f"{pluralize(held, 'photo')} held out{some}, at {plan.draws} timesteps each"


def _forgetting(run: Run) -> str:
    if run.forgetting is None:
        return ""
    probes = run.forgetting.probes
    trigger = ", with and without the trigger" if probes.triggered else ""
    prompts = pluralize(probes.plain.x_t.shape[1], "unrelated prompt")
    return f"tracking how {prompts} change{trigger}"


def _masks(run: Run) -> str:
    files = pluralize(len(run.pictures.mask_digests), "file")
    if run.model.inpainting:
        drawn = "drawn anew at each visit" if run.config.live_encoding else f"drawn, {MASKS} for each picture"
        if not run.pictures.mask_digests:
            return f"the model paints where they are white: {drawn}"
        return f"the model paints where these are white: {files}; for other pictures {drawn}"
    if not run.pictures.masked:
        return ""
    alpha = ", and alpha channels" if run.config.masked_loss else ""
    return f"errors count where these are white: {files}{alpha}"


def _captions(run: Run) -> str:
    named = {
        "txt": ".txt files",
        "caption": ".caption files",
        "prompt": "--prompt",
        "class_prompt": "--class_prompt",
        "folder": "the folders' names",
    }
    counts = ", ".join(f"{count} from {named.get(source, source)}" for source, count in run.pictures.sources.items())
    return f"{counts} ({len(set(run.encoded.captions))} distinct)"


def _repeats(encoded: EncodedDataset) -> str:
    """How many come more than once in an epoch."""
    counts = sorted(Counter(encoded.repeats).items())
    counted = [f"{count} of them {times} times" for times, count in counts if times > 1]
    return f" ({', '.join(counted)} an epoch)" if counted else ""


def sizes(pictures: ImageDataset, most: int = 4) -> str:
    """Width and height of what is trained, and of how many pictures, the most frequent first."""
    transform = pictures.transform
    if transform is None:
        return "as they are"
    if transform.buckets is None:
        return f"{transform.resolution} px"
    counts = Counter(transform.size(*pictures.image_info(index).size) for index in range(len(pictures)))
    counted = [f"{width}x{height}: {count}" for (height, width), count in counts.most_common()]
    return f"in {pluralize(len(counts), 'size')} ({join_limited(counted, most)})"


def encodings(encoded: EncodedDataset, cache_dir: str | None) -> str:
    """How many were found and how many were made, and where they are kept."""
    mirrored = " (mirrored ones too)" * encoded.pictures.flips
    lines = [
        f"{pluralize(made.items, made.kind)}{mirrored * (made.kind == 'picture')}, {made.new} of them new"
        + (f", {made.left} to be encoded when the run comes to them" if made.left else "")
        for made in encoded.made
    ]
    folder = cache_folder(cache_dir)
    return f"{'; '.join(lines)}; kept {f'in {folder}' if folder else 'in memory'}"


def _samples(samples: SamplePlan) -> str:
    if not samples.prompts:
        return "none: turned off"
    if samples.every:
        when = f", every {float(samples.every):.4g} steps"
    else:
        when = f", and between as often as {SAMPLING_SHARE:.0%} of the time allows"
    size = f"{pluralize(len(samples.prompts), 'prompt')} x {pluralize(samples.pictures, 'picture')}"
    return f"{size} at the start and the end{when}; about {100 * samples.share:.2g} % of the run"


def _about_options(run: Run) -> list[str]:
    """Options that look as if they were not meant so."""
    config, lines = run.config, list[str]()
    if config.masked_loss and not run.pictures.mask_digests:
        lines.append("--masked_loss, but no mask lies beside the pictures: only their alpha channels count")
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
        lines.append(
            f"learning_rate {config.learning_rate:g} is {config.learning_rate / usual:.0f} times the usual one"
        )
    return lines


def _about_sizes(samples: SamplePlan) -> list[str]:
    other = sum(prompt.other_size for prompt in samples.prompts)
    unknown = sorted({setting for prompt in samples.prompts for setting in prompt.unknown})
    lines = (
        [f"--w and --h of {pluralize(other, 'sample prompt')}: grids have the resolution of the run"] if other else []
    )
    return lines + ([f"settings of sample prompts that are passed over: {' '.join(unknown)}"] if unknown else [])


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
        lines.append(f"words that {run.config.model} does not know, spelt with several tokens: {join_limited(spelt)}")
    counts, limit = conditioner.token_counts(encoded.captions), conditioner.token_limit
    long = [f"{name} ({count})" for name, count in zip(encoded.ids, counts, strict=True) if count > limit]
    if long:
        lines.append(f"over {limit} tokens and cut, {pluralize(len(long), 'caption')}: {join_limited(long)}")
    return lines
