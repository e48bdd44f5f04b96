"""From a config to a run that can start: every option decided, then its parts built, recorded and printed."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from accelerate import Accelerator

from finetune.atomic_io import json_lines
from finetune.config import ResolvedConfig, TrainConfig, as_settings
from finetune.data.chunks import Chunks
from finetune.data.data_source import check_sources
from finetune.data.user_dataset import MapDataset
from finetune.evaluators import early_stopping, sample_grids
from finetune.evaluators.early_stopping import EarlyStopping
from finetune.evaluators.evaluator import EvaluationLog, Evaluator
from finetune.evaluators.forgetting import make_forgetting
from finetune.evaluators.memorization import make_memorization
from finetune.evaluators.sample_grids import SampleGrids, plan_samples
from finetune.evaluators.validation import Validation, plan_validation, steps_between_validations
from finetune.models.loading import DiffusionModel, check_resolution
from finetune.models.model_info import ModelInfo, locate
from finetune.results import hub, tracking
from finetune.results.events import Events
from finetune.run import html_report, ledger, load_trained
from finetune.run.build import assembled
from finetune.run.build_dataset import identity, open_pictures
from finetune.run.class_images import draw_missing
from finetune.run.context import Run
from finetune.run.html_report import write_training_preview
from finetune.run.ledger import note_chunk, write_ledger
from finetune.run.provenance import check_provenance, run_provenance
from finetune.run.resolve_config import resolve_for, with_absolute_paths
from finetune.run.resume import with_earlier, with_newest
from finetune.run.run_dir import RunDir, begin
from finetune.run.summary import print_summary
from finetune.run.train_loader import TrainDataLoader
from finetune.training import checkpoint
from finetune.training.distributed import Parallel
from finetune.training.trainer import Trainer

_log = logging.getLogger(__name__)


WRITTEN = tuple(
    pattern
    for module in (tracking, hub, checkpoint, early_stopping, html_report, ledger, load_trained, sample_grids)
    for pattern in module.FILES
)
"""Patterns of all that a run writes into its folder, beside its exports: what goes when it is written over."""


def resolve_run(
    config: TrainConfig, dataset: MapDataset | None, device: torch.device, parallel: Parallel
) -> tuple[ResolvedConfig, ModelInfo, Chunks]:
    """Everything that can be known before weights are loaded: each option's value, the model, the pictures."""
    if dataset is None:
        config = with_newest(config)
    config = with_earlier(with_absolute_paths(config))
    if dataset is None:
        check_sources(config.data)  # before a model is downloaded in vain
    model_info = locate(config.model)
    check_resolution(model_info, config.resolution or model_info.resolution)
    draw_missing(config, model_info, device)
    chunks = open_pictures(config, model_info, dataset)
    resolved = resolve_for(config, model_info, chunks, device, processes=parallel.world_size)
    return resolved, model_info, chunks


def build_run(
    *,
    config: ResolvedConfig,
    model_info: ModelInfo,
    chunks: Chunks,
    folder: RunDir,
    accelerator: Accelerator,
    parallel: Parallel,
    events: Events,
    evaluators: Sequence[Callable[[Run], Evaluator]] = (),
) -> Run:
    """Load the model, encode the pictures, and record and say what is going to happen.

    Args:
        config, model_info, chunks, folder, accelerator, parallel, events: of the run.
        evaluators: of the caller, each made from the run.
    """
    pictures = chunks.first
    events.set_phase("loading", folder.step)
    earlier = json_lines(folder.path / tracking.VALIDATION) if folder.checkpoint else []
    plan = plan_validation(config, pictures, earlier)
    model, encoded, trainer = assembled(
        config,
        model_info,
        pictures,
        accelerator.device,
        steps=chunks.local_steps(0, range(folder.step, config.max_train_steps), config.global_batch),
        validated=plan.examples,
        parallel=parallel,
        on_progress=events.progress,
    )
    provenance = run_provenance(model, identity(chunks), accelerator.device, parallel.world_size)
    entered = partial(note_chunk, folder.path, config) if parallel.is_main_process else None
    train_loader = TrainDataLoader(
        config=config, model=model, chunks=chunks, first=encoded, trainer=trainer, entered=entered
    )
    total, log = config.max_train_steps, EvaluationLog(folder.path, events, accelerator)
    every = steps_between_validations(config)
    validation = Validation(plan, encoded, trainer, log, total=total, every=every, seed=config.seed)
    events.set_phase("forgetting", folder.step)
    forgetting = make_forgetting(config, model, trainer, log) if parallel.is_main_process else None
    grids = _sample_grids(config, model, chunks, trainer, log=log, release=train_loader.release_frozen)
    run = Run(
        config=config,
        model=model,
        chunks=chunks,
        encoded=encoded,
        train_loader=train_loader,
        trainer=trainer,
        validation=validation,
        forgetting=forgetting,
        grids=grids,
        early_stopping=EarlyStopping(validation if config.early_stop else None, trainer, folder.path, total=total),
        log=log,
        folder=folder.path,
        accelerator=accelerator,
        provenance=provenance,
        events=events,
    )
    train_loader.release_frozen()
    if parallel.is_main_process:
        memorization = make_memorization(config, pictures, grids, log)
        own = [each for each in (validation, forgetting, grids, memorization) if each]
        run = replace(run, evaluators=(*own, *(make(run) for make in evaluators)))
        _record_start(run, folder)
    return run


def _sample_grids(
    config: ResolvedConfig,
    model: DiffusionModel,
    chunks: Chunks,
    trainer: Trainer,
    *,
    log: EvaluationLog,
    release: Callable[[], None],
) -> SampleGrids:
    pictures = chunks.first
    plan = plan_samples(
        config, latent=model.family.latent, captions=pictures.trained_captions, visits=chunks.epoch_visits
    )
    return SampleGrids(
        plan=plan, model=model, pictures=pictures, trainer=trainer, log=log, config=config, release=release
    )


def _record_start(run: Run, folder: RunDir) -> None:
    """Record what is going to be trained in the run folder, print it, and open the trackers."""
    config = run.config
    if moved := check_provenance(folder.provenance, run.provenance, config.allow_changed):
        _log.warning("%s: from here on the bits are this machine's", moved)
    begin(folder, config, identity(run.chunks), written=WRITTEN)
    write_ledger(folder.path, config, run.chunks, folder.step)
    write_training_preview(run)
    print_summary(run)
    resumed = folder.step > 0
    project = config.tracker_project_name
    tracking.start_trackers(run.accelerator, folder.path, project, as_settings(config), resumed=resumed)
