"""fine_tune(config): puts the parts together and owns the loop, in plain sight."""

import logging
import shlex
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

from accelerate import Accelerator, InitProcessGroupKwargs
from safetensors import SafetensorError

from finetune.config import ResolvedConfig, TrainConfig, as_settings, config_text, decided_otherwise
from finetune.data.user_dataset import MapDataset, refuse_unindexed
from finetune.errors import Interrupted, RunError, UsageError
from finetune.evaluators.evaluator import Evaluator
from finetune.log_handlers import labelled, logging_to
from finetune.models.families import Family
from finetune.models.image_condition import image_condition_of
from finetune.out_of_memory import means_out_of_memory
from finetune.results import hub, tracking
from finetune.results.events import EventHandler, Events
from finetune.results.export import discard_steps_after, export
from finetune.run.build_dataset import identity
from finetune.run.checkpointer import checkpointing
from finetune.run.context import Run
from finetune.run.html_report import how_to_load, lora_facts, report
from finetune.run.ledger import write_ledger
from finetune.run.load_trained import discard_exports, write_exports
from finetune.run.provenance import recorded_threads, threads
from finetune.run.resource_estimate import check_memory, disk_line, disk_use, out_of_memory
from finetune.run.resume import choose
from finetune.run.run_dir import RunDir, finish, occupied
from finetune.run.setup import build_run, resolve_run
from finetune.run.signals import TIME_UP, LoopAction, StopConditions, catch_signals
from finetune.run.step_logger import step_logger
from finetune.run.train_loader import prepared_ahead
from finetune.training import checkpoint
from finetune.training.backend import gpu_algorithms, tuning_pays
from finetune.training.distributed import PATIENCE, Parallel, from_environment

_log = logging.getLogger(__name__)


def fine_tune(
    config: TrainConfig,
    dataset: MapDataset | None = None,
    *,
    evaluators: Sequence[Callable[[Run], Evaluator]] = (),
    repeats: Path | None = None,
) -> Path:
    """Train as `config` says, and export the result to the run folder.

    Args:
        config: options; those left None take the model family's defaults.
        dataset: pictures to train on instead of `config.data`: a map-style dataset of (image, caption, id), or a
            `datasets.Dataset` or `IterableDataset` (whose rows are kept on the disk while the program runs) with the
            columns `config.image_column` and `config.caption_column`.
        evaluators: more of what is measured while training pauses: each is called with the `Run` and returns an
            `Evaluator`, as its class does (see `finetune/evaluators/evaluator.py`).
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
        return _fine_tune(config, dataset, evaluators, repeats)
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


def _fine_tune(
    config: TrainConfig,
    dataset: MapDataset | None,
    evaluators: Sequence[Callable[[Run], Evaluator]],
    repeats: Path | None,
) -> Path:
    tracking.check_trackers(config.report_to)
    accelerator = Accelerator(
        log_with=list(config.report_to) or None,
        project_dir="runs",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    parallel, conditions, events = from_environment(), StopConditions(), Events()
    with conditions.catch_sigusr1(), logging_to(EventHandler(events), silent=not parallel.is_main_process):
        return _run(
            config=config,
            dataset=dataset,
            evaluators=evaluators,
            repeats=repeats,
            accelerator=accelerator,
            parallel=parallel,
            conditions=conditions,
            events=events,
        )


def _run(
    config: TrainConfig,
    dataset: MapDataset | None,
    evaluators: Sequence[Callable[[Run], Evaluator]],
    repeats: Path | None,
    accelerator: Accelerator,
    parallel: Parallel,
    conditions: StopConditions,
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
        _log.info(folder.note)
    if repeats is not None and not folder.finished and (changed := decided_otherwise(repeats, config)):
        _log.warning(changed)
    if folder.finished:
        if parallel.is_main_process:
            write_exports(config, folder.path)
            _push(config, folder.path, model_info.family)
        return folder.path
    _log.info(check_memory(config, model_info, accelerator.device), extra=labelled("Memory"))
    _log.info(disk_line(config, disk_use(config, model_info, chunks), folder.path), extra=labelled("Disk"))
    conditions.save_minutes, conditions.stop_minutes = config.checkpointing_minutes, config.max_train_minutes
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
                evaluators=evaluators,
            )
            _begin(run, folder.checkpoint)
            _train(run, conditions)
            if parallel.is_main_process:
                _finish(run)
                del run  # what it holds is loaded again
                write_exports(config, folder.path)
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
    """Measure the untrained model, then load what the run has learned before, without anything that came after."""
    for evaluator in run.evaluators:
        evaluator.run(0)
    if resumed:
        run.trainer.load_state_dict(checkpoint.load(resumed))
    if run.trainer.parallel.is_main_process:
        if resumed:
            checkpoint.discard_others(run.folder, run.trainer.steps_done, run.config.checkpoints_total_limit)
            discard_steps_after(run.folder, run.trainer.steps_done)
        run.grids.delete_stale(run.trainer.steps_done)


def _train(run: Run, conditions: StopConditions) -> None:
    """The loop of every process: from the trainer's step to the last."""
    trainer, parallel, total = run.trainer, run.trainer.parallel, run.config.max_train_steps
    with (
        catch_signals() as conditions.stop_request,
        step_logger(run) as logger,
        checkpointing(run) as checkpointer,
        closing(run.train_loader) as loader,
        prepared_ahead(trainer, loader) as steps,
    ):
        step = trainer.steps_done
        ended = _evaluate(run, run.due(step) if step else ())  # the last part may have stopped before
        logger.resume()
        for prepared_step in () if ended else steps:
            logger.log(trainer.run_prepared(prepared_step))
            checkpointer.check()
            step, due = trainer.steps_done, run.due(trainer.steps_done)
            wanted = max(
                checkpointer.poll(step), conditions.poll(), LoopAction.EVALUATE if due else LoopAction.CONTINUE
            )
            action = LoopAction(parallel.all_reduce_max(wanted))
            if action is LoopAction.CONTINUE:
                continue
            logger.flush()
            if action >= LoopAction.CHECKPOINT:
                saved = checkpointer.save(wait=step == total or action is LoopAction.STOP)
                conditions.checkpoint_saved()
                if action is LoopAction.STOP and step < total:
                    raise _interrupted(run, saved, parallel.all_reduce_max(conditions.exit_code))
            if _evaluate(run, due):
                if action < LoopAction.CHECKPOINT:
                    checkpointer.save(wait=True)
                break
            if due:
                report(run)
            logger.resume()


def _evaluate(run: Run, due: Sequence[Evaluator]) -> bool:
    """Run what is due, and return whether early stopping ends the run: the rest then measures the best weights."""
    step = run.trainer.steps_done
    if run.validation in due:
        run.validation.run(step)
    if run.early_stopping.should_stop(step):
        return True
    for evaluator in due:
        evaluator.run(step)
    return False


def _interrupted(run: Run, saved: Path, exit_code: int) -> Interrupted:
    why = f" after max_train_minutes = {run.config.max_train_minutes}" if exit_code == TIME_UP else ""
    stopped = f"stopped at step {run.trainer.steps_done} of {run.config.max_train_steps}{why}"
    return Interrupted(f"{stopped}; {saved} is kept, and the same command goes on from there", exit_code)


def _finish(run: Run) -> None:
    """Export, prove the export, and say where everything is."""
    config, folder, trained, family = run.config, run.folder, run.trainer.steps_done, run.model.family
    if config.early_stop:
        run.early_stopping.restore_best()
        for evaluator in run.evaluators:
            evaluator.run(run.trainer.steps_done)
    run.events.set_phase("exporting", run.trainer.steps_done)
    with run.trainer.export_weights():
        difference = export(run.model, folder, lora_facts(run, final=True))
    run.grids.write_before_after(run.trainer.steps_done)
    write_ledger(folder, config, run.chunks, trained)
    page = report(run, ended=True)
    run.accelerator.end_training()
    result = {"steps": run.trainer.steps_done, "trained": trained, "reloaded_output_difference": difference}
    discard_exports(config, folder)
    finish(folder, result)
    exact = "exactly" if difference == 0 else f"within {difference:.0e}"
    _log.info("%s (verified: reloads %s)", folder, exact, extra=labelled("Exported"))
    for program, how in how_to_load(run).items():
        _log.info(how.replace("\n", "; "), extra=labelled(program))
    prompts = run.grids.plan.prompts
    prompt = f" --prompt {shlex.quote(prompts[0].text)}" if prompts and family.latent else ""
    _log.info("finetune-unet sample --model %s%s", shlex.quote(str(folder)), prompt, extra=labelled("Generate"))
    if (least := run.validation.best_step(trained=False)) is not None:
        untrained = ", before training" if least == 0 else ""
        _log.info("lowest loss at step %s of %s%s", least, trained, untrained, extra=labelled("Validation"))
    if prompts:
        _log.info("%s", folder / "samples", extra=labelled("Samples"))
    if config.lr_scheduler == "constant" and config.data:  # any other schedule has ended
        more = f"--resume_from_checkpoint latest --max_train_steps {2 * config.max_train_steps}"
        command = f"finetune-unet --output_dir {shlex.quote(str(folder))} {more}"
        _log.info(command, extra=labelled("Train longer"))
    _log.info("%s", page, extra=labelled("Report"))
    _push(config, folder, family)


def _push(config: ResolvedConfig, folder: Path, family: Family) -> None:
    if config.push_to_hub:
        condition = image_condition_of(family.image_condition)
        address = hub.push(
            folder,
            config.hub_model_id,
            private=config.hub_private_repo,
            settings=as_settings(config),
            image_inputs=condition.pipeline_example if condition else {},
        )
        _log.info("pushed: %s", address)
