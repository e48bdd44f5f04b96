"""From a config to a run that can start: every option decided, then its parts built, recorded and printed."""

from functools import partial

import torch
from accelerate import Accelerator

from finetune.atomic_io import json_lines
from finetune.config import ResolvedConfig, TrainConfig, as_settings
from finetune.data.chunks import Volumes
from finetune.data.data_source import check_sources
from finetune.data.user_dataset import Rows
from finetune.models.loading import check_resolution
from finetune.models.model_info import Location, locate
from finetune.results import tracking
from finetune.results.events import Events
from finetune.run.build import assembled
from finetune.run.build_dataset import identity, open_pictures
from finetune.run.class_images import draw_missing
from finetune.run.context import Run
from finetune.run.forgetting import meter
from finetune.run.html_report import lay_out_pictures
from finetune.run.ledger import note_volume, write_ledger
from finetune.run.memorization import known_pictures
from finetune.run.provenance import about_run, compared
from finetune.run.resolve_config import resolve_for, with_absolute_paths
from finetune.run.resume import with_earlier, with_newest
from finetune.run.run_dir import RunFolder, begin
from finetune.run.sample_grids import plan_samples
from finetune.run.summary import print_summary
from finetune.run.train_loader import Reading
from finetune.run.validation import plan_validation
from finetune.training.distributed import Parallel


def resolve_run(
    config: TrainConfig, dataset: Rows | None, device: torch.device, parallel: Parallel
) -> tuple[ResolvedConfig, Location, Volumes]:
    """Everything that can be known before weights are loaded: each option's value, the model, the pictures."""
    if dataset is None:
        config = with_newest(config)
    config = with_earlier(with_absolute_paths(config))
    if dataset is None:
        check_sources(config.data)  # before a model is downloaded in vain
    model_info = locate(config.model)
    check_resolution(model_info, config.resolution or model_info.resolution)
    draw_missing(config, model_info, device)
    volumes = open_pictures(config, model_info, dataset)
    resolved = resolve_for(config, model_info, volumes, device, processes=parallel.world)
    return resolved, model_info, volumes


def build_run(
    *,
    config: ResolvedConfig,
    model_info: Location,
    volumes: Volumes,
    folder: RunFolder,
    accelerator: Accelerator,
    parallel: Parallel,
    events: Events,
) -> Run:
    """Load the model, encode the pictures, and record and say what is going to happen."""
    pictures = volumes.first
    events.phase("loading", folder.step)
    earlier = json_lines(folder.path / tracking.VALIDATION) if folder.checkpoint else []
    validation = plan_validation(config, pictures, earlier)
    model, encoded, trainer = assembled(
        config,
        model_info,
        pictures,
        accelerator.device,
        steps=volumes.own_steps(0, range(folder.step, config.max_train_steps), config.global_batch),
        validated=validation.examples,
        parallel=parallel,
        told=events.progress,
    )
    samples = plan_samples(
        config, latent=model_info.family.latent, captions=pictures.trained_captions, visits=volumes.epoch_visits
    )
    about = about_run(model, identity(volumes), accelerator.device, parallel.world)
    events.phase("forgetting", folder.step)
    asked = meter(config, model) if parallel.first else None
    comparable = samples.prompts and not model.inpainting  # whose pictures hold most of a training picture
    known = known_pictures(config, pictures) if parallel.first and comparable else None
    entered = partial(note_volume, folder.path, config) if parallel.first else None
    reading = Reading(config=config, model=model, volumes=volumes, first=encoded, trainer=trainer, entered=entered)
    run = Run(
        config=config,
        model=model,
        volumes=volumes,
        encoded=encoded,
        reading=reading,
        trainer=trainer,
        samples=samples,
        validation=validation,
        meter=asked,
        originals=known,
        folder=folder.path,
        accelerator=accelerator,
        about=about,
        events=events,
    )
    run.release()
    if parallel.first:
        if moved := compared(folder.about, about, config.allow_changed):
            print(f"{'note':>10}  {moved}: from here on the bits are this machine's")
        begin(folder, config, identity(volumes))
        write_ledger(folder.path, config, volumes, folder.step)
        lay_out_pictures(run)
        print_summary(run)
        resumed = folder.step > 0
        project = config.tracker_project_name
        tracking.start_trackers(accelerator, folder.path, project, as_settings(config), resumed=resumed)
    return run
