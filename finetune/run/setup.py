"""Setting up a run: from a config to a plan, and from a plan to a `Run` that can start."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from finetune.atomic_io import json_lines
from finetune.config import ResolvedConfig, TrainConfig, as_settings, config_text, decided_otherwise
from finetune.data.chunks import Chunks
from finetune.data.data_source import check_sources
from finetune.data.user_dataset import MapDataset
from finetune.errors import RunError, UsageError
from finetune.evaluators import early_stopping, sample_grids
from finetune.evaluators.early_stopping import EarlyStopping
from finetune.evaluators.evaluator import EvaluationLog, Evaluator
from finetune.evaluators.forgetting import make_forgetting
from finetune.evaluators.memorization import make_memorization
from finetune.evaluators.sample_grids import SampleGrids, plan_samples
from finetune.evaluators.validation import Validation, plan_validation, steps_between_validations
from finetune.log_handlers import labelled
from finetune.models.loading import DiffusionModel, check_resolution
from finetune.models.model_info import ModelInfo, locate
from finetune.out_of_memory import means_out_of_memory
from finetune.results import hub, metrics_log, trackers
from finetune.results.events import Events
from finetune.run import exports, html_report, ledger
from finetune.run.build import assembled
from finetune.run.build_dataset import identity, open_pictures
from finetune.run.class_images import draw_missing
from finetune.run.context import Run
from finetune.run.device_users import device_name, using_device
from finetune.run.html_report import write_training_preview
from finetune.run.ledger import note_chunk, write_ledger
from finetune.run.measured_prediction import with_measured_prediction
from finetune.run.provenance import check_provenance, recorded_threads, run_provenance, threads
from finetune.run.resolve_config import resolve_for, with_absolute_paths
from finetune.run.resource_estimate import check_memory, disk_line, disk_use, out_of_memory
from finetune.run.resume import choose, with_earlier, with_newest
from finetune.run.run_dir import RunDir, begin, occupied
from finetune.run.summary import print_summary
from finetune.run.train_loader import TrainDataLoader
from finetune.training import checkpoint
from finetune.training.backend import gpu_algorithms, tuning_pays
from finetune.training.distributed import Parallel
from finetune.training.trainer import Trainer

_log = logging.getLogger(__name__)


WRITTEN = tuple(
    pattern
    for module in (metrics_log, trackers, hub, checkpoint, early_stopping, html_report, ledger, exports, sample_grids)
    for pattern in module.FILES
)
"""Patterns of all that a run writes into its folder, beside its exports: what goes when it is written over."""


class RunPlan(NamedTuple):
    """What is known of a run before weights are loaded."""

    config: ResolvedConfig
    """The value of every option."""
    model_info: ModelInfo
    chunks: Chunks
    folder: RunDir
    """Where it writes, and what an earlier part of it has left there."""


def plan_run(
    config: TrainConfig, dataset: MapDataset | None, device: torch.device, parallel: Parallel, *, repeats: Path | None
) -> RunPlan:
    """Decide all that can be known before weights are loaded, and log what it will take.

    Args:
        config, dataset, repeats: as for `fine_tune`.
        device: the device of this process.
        parallel: all processes, which must come to the same plan.

    Raises:
        FinetuneError: an option, the pictures or the model cannot be used, or the processes come to other plans.
    """
    with parallel.main_process_first():
        if config.push_to_hub:
            hub.check_login(config.hub_model_id)
        plan = _resolve(config, dataset, device, parallel)
    config, model_info, chunks, folder = plan
    if not parallel.all_equal((config_text(config), identity(chunks), str(folder.checkpoint))):
        raise UsageError("the processes see different images, options or checkpoints: they need one file system")
    if folder.note:
        _log.info(folder.note)
    if folder.finished:
        return plan
    if repeats is not None and (changed := decided_otherwise(repeats, config)):
        _log.warning(changed)
    _log.info(check_memory(config, model_info, device), extra=labelled("Memory"))
    _log.info(disk_line(config, disk_use(config, model_info, chunks), folder.path), extra=labelled("Disk"))
    return plan


def _resolve(config: TrainConfig, dataset: MapDataset | None, device: torch.device, parallel: Parallel) -> RunPlan:
    if dataset is None:
        config = with_newest(config)
    config = with_earlier(with_absolute_paths(config))
    if dataset is None:
        check_sources(config.data)  # before a model is downloaded in vain
    model_info = locate(config.model)
    check_resolution(model_info, config.resolution or model_info.resolution)
    draw_missing(config, model_info, device)
    chunks = open_pictures(config, model_info, dataset)
    config = with_measured_prediction(config, model_info, chunks.first, device)
    resolved = resolve_for(config, model_info, chunks, device, processes=parallel.world_size)
    return RunPlan(resolved, model_info, chunks, choose(resolved, identity(chunks)))


@contextmanager
def run_environment(plan: RunPlan, device: torch.device, parallel: Parallel, events: Events) -> Iterator[None]:
    """Hold the run folder and compute as its earlier parts did; errors name what can be done about them.

    Args:
        plan: of the run.
        device: the device of this process.
        parallel: all processes; the main one locks the folder and writes the events.
        events: of the run.

    Raises:
        RunError: memory does not suffice, the folder cannot be written, or a worker process has died.
    """
    config, folder = plan.config, plan.folder
    steps = {"step": folder.step, "total": config.max_train_steps}
    tuned = device.type == "cuda" and tuning_pays(
        config.max_train_steps, sizes=len(set(plan.chunks.first.shapes())), batch_size=config.global_batch
    )
    with ExitStack() as stack:
        if parallel.is_main_process:
            stack.enter_context(occupied(folder.path, folder.mark, lock=config.lock_output_dir))
            stack.enter_context(using_device(device_name(device.type, device.index), folder.path))
            stack.enter_context(events.written_to(folder.path, **steps, anew=folder.overwrite))
        stack.enter_context(gpu_algorithms(deterministic=config.deterministic, tuned=tuned))
        stack.enter_context(threads(recorded_threads(folder.provenance, device, parallel.world_size)))
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if means_out_of_memory(error):
                raise RunError(out_of_memory(config, plan.model_info, device)) from error
            if "DataLoader worker" not in str(error):  # as torch says, wherever we are, when one of them has died
                raise
            why = f"a process that prepares images has died ({str(error).strip()})"
            raise RunError(f"{why}; fewer --dataloader_num_workers take less memory") from error
        except (OSError, SafetensorError) as error:
            raise RunError(f"{folder.path}: {error}; earlier checkpoints are complete") from error


def build_run(
    plan: RunPlan,
    *,
    accelerator: Accelerator,
    parallel: Parallel,
    events: Events,
    evaluators: Sequence[Callable[[Run], Evaluator]] = (),
) -> Run:
    """Load the model, encode the pictures, and record and say what is going to happen.

    Args:
        plan, accelerator, parallel, events: of the run.
        evaluators: of the caller, each made from the run.
    """
    config, model_info, chunks, folder = plan
    pictures = chunks.first
    events.set_phase("loading", folder.step)
    earlier = json_lines(folder.path / metrics_log.VALIDATION) if folder.checkpoint else []
    validated = plan_validation(config, pictures, earlier)
    model, encoded, trainer = assembled(
        config,
        model_info,
        pictures,
        accelerator.device,
        steps=chunks.local_steps(0, range(folder.step, config.max_train_steps), config.global_batch),
        validated=validated.examples,
        parallel=parallel,
        on_progress=events.progress,
    )
    provenance = run_provenance(model, identity(chunks), accelerator.device, parallel.world_size)
    on_chunk_opened = partial(note_chunk, folder.path, config) if parallel.is_main_process else None
    train_loader = TrainDataLoader(
        config=config, model=model, chunks=chunks, first=encoded, trainer=trainer, on_chunk_opened=on_chunk_opened
    )
    total, log = config.max_train_steps, EvaluationLog(folder.path, events, accelerator)
    every = steps_between_validations(config)
    validation = Validation(validated, encoded, trainer, log, total=total, every=every, seed=config.seed)
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
        _log.warning("%s: results are no longer bit-identical to those of the first machine", moved)
    begin(folder, config, identity(run.chunks), written=WRITTEN)
    write_ledger(folder.path, config, run.chunks, folder.step)
    write_training_preview(run)
    print_summary(run)
    resumed = folder.step > 0
    project = config.tracker_project_name
    trackers.start_trackers(run.accelerator, folder.path, project, as_settings(config), resumed=resumed)
