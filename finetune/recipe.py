"""fine_tune(config): puts the parts together and owns the loop, in plain sight."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from finetune import runs
from finetune.cache.encode import Encoded, Pictures, encode, names_and_captions
from finetune.config import TrainConfig, replace
from finetune.data.datasets import check_source, open_dataset
from finetune.data.loader import batches
from finetune.data.own import OwnPictures
from finetune.data.sampler import steps_per_epoch
from finetune.data.transforms import Preprocess
from finetune.errors import Interrupted, RunError, UsageError
from finetune.interrupts import catch_signals
from finetune.models.families import FAMILIES, Family
from finetune.models.loading import DiffusionModel, check_resolution, load_model, quiet_libraries
from finetune.models.locate import Location, locate
from finetune.models.lora import ATTENTION_AND_FEED_FORWARD, add_lora, trainable
from finetune.plan import SamplePlan, as_settings, changed, global_batch, plan_samples, resolve
from finetune.precision import DTYPES, resolve_precision
from finetune.results import hub, tracking
from finetune.results.export import export, has_adapter
from finetune.results.sampling import draw_pictures, grid, save_picture, side_by_side
from finetune.seeding import fold
from finetune.summary import print_summary
from finetune.training import checkpoint
from finetune.training.ema import Ema
from finetune.training.objective import NoisePrediction
from finetune.training.optim import learning_rate, make_optimizer
from finetune.training.trainer import Trainer

_ABOUT_PICTURES = ("prompt", "trigger", "resize_mode", "center_crop", "random_flip")
"""Options that a dataset with a transform of its own has decided already."""
_LESS_MEMORY = "a smaller --train_batch_size (and more --gradient_accumulation_steps), --gradient_checkpointing, "
_LESS_MEMORY += "a lower --resolution or a LoRA take less"


@dataclass(frozen=True)
class Run:
    """The parts of a run, put together."""

    config: TrainConfig
    model: DiffusionModel
    encoded: Encoded
    trainer: Trainer
    samples: SamplePlan
    folder: Path
    accelerator: Accelerator


def fine_tune(config: TrainConfig, dataset: Pictures | None = None) -> Path:
    """Train as `config` says, and export the result to the run folder.

    Args:
        config: options; those left None take the model family's defaults.
        dataset: pictures to train on instead of `config.data`; a map-style dataset of (image, caption, id).

    Returns:
        The run folder: the export, `samples/`, `metrics.jsonl`, `config.toml` and checkpoints.

    Raises:
        FinetuneError: of the kinds in `finetune.errors`, each with one line that says what to do.
    """
    quiet_libraries()
    if config.push_to_hub:
        hub.check_login(config.hub_model_id)
    accelerator = _accelerator(config)
    config, found, pictures, digest = _decide(config, dataset, accelerator.device)
    folder = runs.choose(config, digest)
    if folder.note:
        print(folder.note)
    if folder.finished:
        _push(config, folder.path)
        return folder.path
    runs.prepare(folder)

    model = _load(config, found).to(accelerator.device)
    encoded = encode(
        pictures, model, live=config.live_encoding, caption_dropout=config.caption_dropout or 0.0, seed=config.seed
    )
    trainer = _trainer(config, model)
    if folder.checkpoint:
        trainer.load_state_dict(checkpoint.load(folder.checkpoint))
        checkpoint.discard_after(folder.path, trainer.steps_done)
    samples = plan_samples(config, latent=found.family.latent, captions=encoded.captions, pictures=len(encoded))
    runs.begin(folder, config, digest)
    print_summary(config, found, model, pictures, encoded, samples, accelerator.device, folder.path)
    tracking.start_trackers(accelerator, folder.path, as_settings(config))
    run = Run(config, model, encoded, trainer, samples, folder.path, accelerator)
    try:
        _train(run)
        _finish(run)
    except torch.OutOfMemoryError as error:
        raise RunError(f"out of memory: {_LESS_MEMORY}") from error
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder.path}: {error}; what was saved before is whole") from error
    return folder.path


def _train(run: Run) -> None:
    """The loop: from the trainer's step to the last."""
    config, trainer, samples = run.config, run.trainer, run.samples
    total = config.max_train_steps or 1
    every_epochs = (config.save_model_epochs or 0) * steps_per_epoch(len(run.encoded), global_batch(config))
    log = tracking.Log(run.folder, trainer.steps_done)
    steps = batches(
        run.encoded,
        batch_size=global_batch(config),
        steps=total,
        seed=config.seed,
        start=trainer.steps_done,
        num_workers=config.dataloader_num_workers,
        device=run.accelerator.device,
    )
    with catch_signals() as stop, tracking.progress_bar(trainer.steps_done, total) as bar:
        if trainer.steps_done == 0 or due(trainer.steps_done, samples.every):
            _draw_samples(run)
        clock = time.perf_counter()
        for batch in steps:
            metrics = trainer.step(batch)
            seconds = time.perf_counter() - clock
            log.write(metrics, seconds)
            tracking.track(run.accelerator, metrics)
            bar.show(metrics, seconds)
            last = metrics.step == total
            if last or stop.number or due(metrics.step, config.checkpointing_steps) or due(metrics.step, every_epochs):
                saved = checkpoint.save(run.folder, trainer.state_dict(), keep=config.checkpoints_total_limit)
                if stop.number and not last:
                    raise Interrupted(f"stopped at step {metrics.step} of {total}; {saved} is kept", stop.number)
            if last or due(metrics.step, samples.every):
                _draw_samples(run)
            clock = time.perf_counter()


def due(step: int, every: int | None) -> bool:
    """True at each multiple of `every`; None and 0 are never."""
    return bool(every) and step % every == 0


def _finish(run: Run) -> None:
    """Export, prove the export, and say where everything is."""
    config, folder = run.config, run.folder
    with _averaged(run.trainer):
        difference = export(run.model, folder)
    first, last = folder / "samples/step-0.png", folder / f"samples/step-{config.max_train_steps}.png"
    if run.samples.prompts and first.exists():
        side_by_side(first, last, folder / "samples/before-after.png")
    run.accelerator.end_training()
    runs.finish(folder, {"steps": run.trainer.steps_done, "reloaded_output_difference": difference})
    load = "pipeline.load_lora_weights" if has_adapter(run.model.unet) else "DiffusionPipeline.from_pretrained"
    print(f'done: {load}("{folder}"), loaded back and compared (largest difference {difference:.0e})')
    if run.samples.prompts:
        print(f"pictures: {folder / 'samples'}")
    _push(config, folder)


def _push(config: TrainConfig, folder: Path) -> None:
    if config.push_to_hub:
        private = bool(config.hub_private_repo)
        print("pushed:", hub.push(folder, config.hub_model_id, private=private, settings=as_settings(config)))


def _accelerator(config: TrainConfig) -> Accelerator:
    tracking.check_installed(config.report_to)
    accelerator = Accelerator(log_with=list(config.report_to) or None, project_dir="runs")
    if accelerator.num_processes > 1:
        raise UsageError(f"{accelerator.num_processes} processes were launched; this version trains on one")
    return accelerator


def _decide(
    config: TrainConfig, dataset: Pictures | None, device: torch.device
) -> tuple[TrainConfig, Location, Pictures, str]:
    """Everything that can be known before weights are loaded: each option's value, model, pictures and their digest."""
    config = _absolute_paths(config)
    if earlier := runs.earlier_config(config):
        config = runs.inherit(config, earlier)
    if dataset is None:
        check_source(config.data)  # before a model is downloaded in vain
    found = locate(config.model)
    resolution = config.resolution or found.resolution
    check_resolution(found, resolution)
    pictures = _open_pictures(config, resolution) if dataset is None else _own_pictures(config, dataset, resolution)
    ids, captions = names_and_captions(pictures)
    empty = captions.count("")
    if found.family.latent and empty:
        raise UsageError(f"{empty} of {len(captions)} pictures have no caption: give --prompt, or captions beside them")
    config = resolve(config, found, pictures=len(ids), varied_captions=len(set(captions)) > 1)
    precision = resolve_precision(config.mixed_precision, device, small=_is_small(found.family, resolution))
    digest = f"{fold(*ids, *captions):016x}"
    return replace(config, mixed_precision=precision), found, pictures, digest


def _absolute_paths(config: TrainConfig) -> TrainConfig:
    """Local folders as absolute paths, so that config.toml repeats the run from anywhere."""
    local = {"data": Path(config.data).expanduser()} if config.data else {}
    if config.model not in FAMILIES:
        local["model"] = Path(config.model).expanduser()
    return replace(config, **{name: str(path.absolute()) for name, path in local.items() if path.exists()})


def _open_pictures(config: TrainConfig, resolution: int) -> Pictures:
    return open_dataset(
        config.data,
        prompt=config.prompt,
        trigger=config.trigger,
        resolution=resolution,
        resize_mode=config.resize_mode,
        center_crop=config.center_crop,
        random_flip=config.random_flip,
        image_column=config.image_column,
        caption_column=config.caption_column,
    )


def _own_pictures(config: TrainConfig, dataset: Pictures, resolution: int) -> Pictures:
    """A dataset of the user's: with our captions and preprocessing, or as it is where it has a `transform`."""
    own = getattr(dataset, "transform", None)
    if own is not None and not isinstance(own, Preprocess):
        raise UsageError(
            f"the dataset's transform is a {type(own).__name__}; allowed is a finetune.Preprocess, or none"
        )
    useless = {"image_column", "caption_column", *(_ABOUT_PICTURES if own is not None else ())}
    if wrong := changed(config) & useless:
        raise UsageError(f"{min(wrong)} cannot be used with a dataset of your own{' that has a transform' * bool(own)}")
    if own is None:
        how = Preprocess(resolution, config.resize_mode, config.center_crop, config.random_flip)
        return OwnPictures(dataset, config.prompt, trigger=config.trigger, transform=how)
    if own.resolution != resolution:
        raise UsageError(f"resolution = {resolution}: the dataset's own transform makes {own.resolution}")
    return dataset


def _is_small(family: Family, resolution: int) -> bool:
    """Networks too small to gain from half precision on a CPU."""
    return family.name == "tiny" or (not family.latent and resolution <= 64)


def _load(config: TrainConfig, found: Location) -> DiffusionModel:
    """The model, with an adapter for LoRA; a frozen base needs no more than half precision, trained weights fp32."""
    half = DTYPES[config.mixed_precision] if config.method == "lora" else None
    model = load_model(
        found,
        resolution=config.resolution,
        dtype=half or torch.float32,
        prediction_type=config.prediction_type,
        max_token_length=config.max_token_length,
        clip_skip=config.clip_skip,
        seed=config.seed,
    )
    if config.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    if config.method == "lora":
        targets = config.lora_target_modules or ATTENTION_AND_FEED_FORWARD
        add_lora(model.unet, config.rank, config.lora_alpha, config.lora_dropout, targets, config.seed)  # pyright: ignore[reportArgumentType] # latent by now
    return model


def _trainer(config: TrainConfig, model: DiffusionModel) -> Trainer:
    assert config.learning_rate is not None
    optimizer = make_optimizer(
        config.optimizer,
        trainable(model.unet),
        learning_rate=config.learning_rate,
        betas=(config.adam_beta1 or 0.0, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        epsilon=config.adam_epsilon,
    )
    learned = {name: p for name, p in model.unet.named_parameters() if p.requires_grad}
    ema = (
        Ema(learned, inv_gamma=config.ema_inv_gamma, power=config.ema_power, max_decay=config.ema_max_decay)
        if config.use_ema
        else None
    )
    return Trainer(
        model.unet,
        model.encoder,
        NoisePrediction(
            model.scheduler,
            snr_gamma=config.snr_gamma,
            noise_offset=config.noise_offset,
            input_perturbation=config.input_perturbation,
        ),
        optimizer,
        learning_rate=partial(
            learning_rate,
            peak=config.learning_rate,
            schedule=config.lr_scheduler or "constant",
            warmup=config.lr_warmup_steps or 0,
            total=config.max_train_steps or 1,
        ),
        micro_batch_size=config.train_batch_size,
        max_grad_norm=config.max_grad_norm,
        precision=DTYPES[config.mixed_precision],
        ema=ema,
        seed=config.seed,
    )


@contextmanager
def _averaged(trainer: Trainer) -> Iterator[None]:
    """Inside, the UNet holds its EMA weights, where there is an EMA."""
    if trainer.ema is None:
        yield
    else:
        with trainer.ema.swapped_in():
            yield


def _draw_samples(run: Run) -> None:
    """A grid with the same prompts and seeds each time, as samples/step-N.png, unless it is there already."""
    config, model, step = run.config, run.model, run.trainer.steps_done
    path = run.folder / f"samples/step-{step}.png"
    if not run.samples.prompts or path.exists():
        return
    with _averaged(run.trainer), run.trainer.autocast():
        rows = draw_pictures(
            model,
            run.samples.prompts,
            range(run.samples.pictures),
            resolution=config.resolution or 0,
            num_inference_steps=config.num_inference_steps or 1,
            guidance_scale=config.guidance_scale,
        )
    model.conditioner.to("cpu")
    if not config.live_encoding:
        model.encoder.to("cpu")
    save_picture(grid(rows, run.samples.prompts, title=f"step {step}"), path)
    tracking.track_pictures(run.accelerator, step, path)
