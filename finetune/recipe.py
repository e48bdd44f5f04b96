"""fine_tune(config): puts the parts together and owns the loop, in plain sight."""

import shlex
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, redirect_stdout
from pathlib import Path

from accelerate import Accelerator, InitProcessGroupKwargs
from safetensors import SafetensorError

from finetune.config import ResolvedConfig, TrainConfig, as_settings, config_text, decided_otherwise
from finetune.data.prefetch import ahead
from finetune.data.sampler import steps_per_epoch
from finetune.data.user_dataset import MapDataset, refuse_unindexed
from finetune.errors import Interrupted, RunError, UsageError
from finetune.models.families import Family
from finetune.out_of_memory import means_out_of_memory
from finetune.results import hub, tracking
from finetune.results.events import Events, StdoutTee
from finetune.results.export import discard_steps_after, export, step_export
from finetune.run.backend import gpu_algorithms, tuning_pays
from finetune.run.build_dataset import identity
from finetune.run.context import Run
from finetune.run.disk_use import disk_line, disk_use
from finetune.run.early_stopping import restore_best, save_best, should_stop
from finetune.run.evaluation import should_run
from finetune.run.forgetting import measure_forgetting
from finetune.run.html_report import how_to_load, lora_facts, report
from finetune.run.ledger import write_ledger
from finetune.run.load_trained import discard_exports, write_exports
from finetune.run.memory_estimate import check_memory, out_of_memory
from finetune.run.provenance import recorded_threads, threads
from finetune.run.resume import choose
from finetune.run.run_dir import RunDir, finish, occupied
from finetune.run.sample_grids import delete_stale_grids, draw_grid, write_before_after
from finetune.run.setup import build_run, resolve_run
from finetune.run.signals import PAUSE, SAVE, TIME_UP, StopConditions, StopRequest, catch_signals
from finetune.run.step_logger import reports
from finetune.run.validation import least_step, validate
from finetune.training import checkpoint
from finetune.training.async_writer import AsyncWriter, copied
from finetune.training.distributed import PATIENCE, Parallel, from_environment
from finetune.training.micro_batch import PreparedStep


def fine_tune(config: TrainConfig, dataset: MapDataset | None = None, *, repeats: Path | None = None) -> Path:
    """Train as `config` says, and export the result to the run folder.

    Args:
        config: options; those left None take the model family's defaults.
        dataset: pictures to train on instead of `config.data`: a map-style dataset of (image, caption, id), or a
            `datasets.Dataset` or `IterableDataset` (whose rows are kept on the disk while the program runs) with the
            columns `config.image_column` and `config.caption_column`.
        repeats: the config.toml that `config` was read from: what is decided otherwise than then is printed.

    Returns:
        The run folder: the export, `samples/`, `metrics.jsonl`, `config.toml` and checkpoints.

    Raises:
        FinetuneError: of the kinds in `finetune.errors`, each with one line that says what to do.
    """
    _check_arguments(config, dataset)
    if not _running.acquire(blocking=False):
        raise UsageError(
            "fine_tune runs in another thread already, and both would learn other weights; use a process each"
        )
    try:
        return _fine_tune(config, dataset, repeats)
    finally:
        _running.release()


_running = threading.Lock()
"""Held while a run goes on: torch's threads, algorithms and standard output are the process's own."""


def _check_arguments(config: object, dataset: MapDataset | None) -> None:
    """Raise UsageError, in a line, for what is easily given instead of a config or a dataset."""
    if not isinstance(config, TrainConfig):
        raise UsageError(f"config is a {type(config).__name__}: give a finetune.TrainConfig, as TrainConfig(**options)")
    if dataset is not None:
        refuse_unindexed(dataset)
        if config.data:
            raise UsageError("data and a dataset are given: give one of them")


def _fine_tune(config: TrainConfig, dataset: MapDataset | None, repeats: Path | None) -> Path:
    tracking.check_trackers(config.report_to)
    accelerator = Accelerator(
        log_with=list(config.report_to) or None,
        project_dir="runs",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    parallel, requests, events = from_environment(), StopConditions(), Events()
    tee = StdoutTee(sys.stdout, events) if parallel.is_main_process and sys.stdout else None  # one process tells
    with requests.hearing_usr1(), redirect_stdout(tee):
        return _run(
            config=config,
            dataset=dataset,
            repeats=repeats,
            accelerator=accelerator,
            parallel=parallel,
            requests=requests,
            events=events,
        )


def _run(
    config: TrainConfig,
    dataset: MapDataset | None,
    repeats: Path | None,
    accelerator: Accelerator,
    parallel: Parallel,
    requests: StopConditions,
    events: Events,
) -> Path:
    with parallel.main_process_first():
        if config.push_to_hub:
            hub.check_login(config.hub_model_id)
        config, model_info, chunks = resolve_run(config, dataset, accelerator.device, parallel)
        folder = choose(config, identity(chunks))
    if not parallel.all_equal((config_text(config), identity(chunks), str(folder.checkpoint))):
        raise UsageError("the processes see different pictures, options or checkpoints: they need one file system")
    if folder.note:
        print(folder.note)
    if repeats is not None and not folder.finished and (changed := decided_otherwise(repeats, config)):
        print(f"{'note':>10}  {changed}")
    if folder.finished:
        if parallel.is_main_process:
            write_exports(config, folder.path)
            _push(config, folder.path, model_info.family)
        return folder.path
    print(f"{'memory':>10}  {check_memory(config, model_info, accelerator.device)}")
    print(f"{'disk':>10}  {disk_line(config, disk_use(config, model_info, chunks), folder.path)}")
    held = _held(folder, config, events) if parallel.is_main_process else nullcontext()
    computing = threads(recorded_threads(folder.provenance, accelerator.device, parallel.world_size))
    tuned = accelerator.device.type == "cuda" and tuning_pays(
        config.max_train_steps, sizes=len(set(chunks.first.shapes())), batch_size=config.global_batch
    )
    with held, gpu_algorithms(deterministic=config.deterministic, tuned=tuned), computing:
        try:
            run = build_run(
                config=config,
                model_info=model_info,
                chunks=chunks,
                folder=folder,
                accelerator=accelerator,
                parallel=parallel,
                events=events,
            )
            _begin(run, folder.checkpoint)
            if parallel.is_main_process:
                _train(run, requests)
                _finish(run)
                del run  # what it holds is loaded again
                write_exports(config, folder.path)
            else:
                _follow(run, requests)
        except (RuntimeError, MemoryError) as error:
            if means_out_of_memory(error):
                raise RunError(out_of_memory(config, model_info, accelerator.device)) from error
            if "DataLoader worker" not in str(error):  # as torch says, wherever we are, when one of them has died
                raise
            why = f"a process that prepares pictures has died ({str(error).strip()})"
            raise RunError(f"{why}; fewer --dataloader_num_workers take less memory") from error
        except (OSError, SafetensorError) as error:
            raise RunError(f"{folder.path}: {error}; what was saved before is whole") from error
    return folder.path


@contextmanager
def _held(folder: RunDir, config: ResolvedConfig, events: Events) -> Iterator[None]:
    """Lock the run folder, and write events to it."""
    steps = {"step": folder.step, "total": config.max_train_steps}
    with (
        occupied(folder.path, folder.mark, lock=config.lock_output_dir),
        events.written_to(folder.path, **steps, anew=folder.overwrite),
    ):
        yield


def _begin(run: Run, resumed: Path | None) -> None:
    """The grid of the untrained model, then what the run has learned before, without anything that came after."""
    first = run.trainer.parallel.is_main_process
    if first:
        validate(run)
        measure_forgetting(run)
        draw_grid(run)
    if resumed:
        run.trainer.load_state_dict(checkpoint.load(resumed))
    if resumed and first:
        checkpoint.discard_after(run.folder, run.trainer.steps_done)
        discard_steps_after(run.folder, run.trainer.steps_done)
    if first:
        delete_stale_grids(run)


def _train(run: Run, requests: StopConditions) -> None:
    """The loop: from the trainer's step to the last."""
    config, trainer = run.config, run.trainer
    total = config.max_train_steps
    epoch = steps_per_epoch(run.chunks.epoch_visits, config.global_batch)
    every_epochs = config.save_model_epochs and config.save_model_epochs * epoch
    with (
        catch_signals() as stop,
        reports(run) as logger,
        AsyncWriter() as saving,
        closing(run.train_loader),
        _ahead(run) as steps,
    ):
        due = logger.should_run(trainer.steps_done)  # the last part may have stopped before
        if "validation" in due:
            validate(run)
        _evaluate(run, due)
        logger.resume()
        for prepared_step in () if _is_over(run) else steps:
            logger.add(trainer.run_prepared(prepared_step))
            saving.check()
            step = trainer.steps_done
            last = step == total
            saves = last or should_run(step, config.checkpointing_steps) or should_run(step, every_epochs)
            due = logger.should_run(step)
            action = trainer.parallel.all_reduce_max(
                max(SAVE * saves, PAUSE * bool(due), _poll(requests, stop, config))
            )
            if not action:
                continue
            logger.finish()
            if action >= SAVE:
                saved = _save(run, saving)
                requests.saved()
                if last or action > SAVE:
                    saving.wait()
                if action > SAVE and not last:
                    why = f" after max_train_minutes = {config.max_train_minutes}" if action == TIME_UP else ""
                    saved_as = f"{saved} is kept, and the same command goes on from there"
                    trainer.parallel.all_reduce_max(0)  # the others wait, see `_follow`
                    raise Interrupted(f"stopped at step {step} of {total}{why}; {saved_as}", action)
            if "validation" in due:
                validate(run)
            if _is_over(run):
                if action < SAVE:
                    _save(run, saving)
                saving.wait()
                break
            _evaluate(run, due)
            if due:
                report(run)
            logger.resume()


def _evaluate(run: Run, due: frozenset[str]) -> None:
    """What has become of the model, apart from the loss."""
    if "forgetting" in due:
        measure_forgetting(run)
    if "grid" in due:
        draw_grid(run)


def _is_over(run: Run) -> bool:
    """Whether to stop early: asked by all processes, and answered by the first, which has validated."""
    if not run.config.early_stop:
        return False
    risen = False
    if run.trainer.parallel.is_main_process:
        save_best(run)
        risen = should_stop(run)
    return bool(run.trainer.parallel.all_reduce_max(int(risen)))


def _save(run: Run, saving: AsyncWriter) -> Path:
    """Begin to write a checkpoint, in a thread where memory suffices for a copy of what it holds; answers its folder.

    It is written last: what a resume from it would not make again is there by then.
    """
    trainer, folder, step = run.trainer, run.folder, run.trainer.steps_done
    export_adapter = None  # at the end the run's own export follows
    if step < run.config.max_train_steps:
        with trainer.export_weights():
            export_adapter = step_export(run.model, folder, step, lora_facts(run))
    copy = copied(trainer.state_dict())

    def write() -> None:
        if export_adapter is not None:
            export_adapter()
        state, keep = copy or trainer.state_dict(), run.config.checkpoints_total_limit
        checkpoint.save(folder, state, keep=keep, provenance=run.provenance)

    if copy is None:
        saving.wait()
        write()
    else:
        saving.begin(write)
    return checkpoint.folder_of(folder, step)


def _poll(requests: StopConditions, stop: StopRequest, config: ResolvedConfig) -> int:
    return requests.poll(stop.number, config.checkpointing_minutes, config.max_train_minutes)


def _follow(run: Run, requests: StopConditions) -> None:
    """The loop of the processes that are not the first: to compute their parts."""
    trainer, total = run.trainer, run.config.max_train_steps
    with catch_signals() as stop, closing(run.train_loader), _ahead(run) as steps:
        for prepared_step in () if _is_over(run) else steps:
            trainer.run_prepared(prepared_step)
            action = trainer.parallel.all_reduce_max(_poll(requests, stop, run.config))
            if action:
                trainer.raise_if_diverged()  # what is wrong with the step is told by all, or by none
            if action >= SAVE:
                requests.saved()
            if action > SAVE and trainer.steps_done < total:
                # A launcher takes the first process that ends for a failure, and kills the one that still writes.
                trainer.parallel.all_reduce_max(0)
                raise Interrupted(f"stopped at step {trainer.steps_done} of {total}", action)
            if action and _is_over(run):
                break
    trainer.raise_if_diverged()


def _ahead(run: Run) -> AbstractContextManager[Iterator[PreparedStep]]:
    """What the trainer takes, step by step, prepared by a thread as soon as visits need no encoder."""
    planned = run.train_loader.steps(run.trainer.steps_done)
    return ahead((run.trainer.prepare(*batches) for batches in planned), allowed=lambda: not run.train_loader.live)


def _finish(run: Run) -> None:
    """Export, prove the export, and say where everything is."""
    config, folder, trained, family = run.config, run.folder, run.trainer.steps_done, run.model.family
    if config.early_stop:
        restore_best(run)
        _evaluate(run, frozenset({"forgetting", "grid"}))
    run.events.set_phase("exporting", run.trainer.steps_done)
    with run.trainer.export_weights():
        difference = export(run.model, folder, lora_facts(run, final=True))
    write_before_after(run)
    write_ledger(folder, config, run.chunks, trained)
    page = report(run, ended=True)
    run.accelerator.end_training()
    result = {"steps": run.trainer.steps_done, "trained": trained, "reloaded_output_difference": difference}
    discard_exports(config, folder)
    finish(folder, result)
    print(f"done: the export was loaded back and compared (largest difference {difference:.0e})")
    for program, how in how_to_load(run).items():
        print(f"{program}: {how.replace(chr(10), '; ')}")
    prompt = f" --prompt {shlex.quote(run.samples.prompts[0].text)}" if run.samples.prompts and family.latent else ""
    print(f"draw with it: finetune-unet sample --model {shlex.quote(str(folder))}{prompt}")
    if (least := least_step(run)) is not None:
        untrained = ", before anything was learned" if least == 0 else ""
        print(f"validation: the loss was least at step {least} of {trained}{untrained}")
    if run.samples.prompts:
        print(f"pictures: {folder / 'samples'}")
    if config.lr_scheduler == "constant" and config.data:  # any other schedule has ended
        more = f"--resume_from_checkpoint latest --max_train_steps {2 * config.max_train_steps}"
        print(f"to go on for longer: finetune-unet --output_dir {shlex.quote(str(folder))} {more}")
    print(f"report: {page}")
    _push(config, folder, family)


def _push(config: ResolvedConfig, folder: Path, family: Family) -> None:
    if config.push_to_hub:
        how = {"private": config.hub_private_repo, "inpainting": family.inpainting}
        print("pushed:", hub.push(folder, config.hub_model_id, settings=as_settings(config), **how))
