"""fine_tune(config): puts the parts together and owns the training loop."""

import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from accelerate import Accelerator, InitProcessGroupKwargs

from finetune.config import TrainConfig
from finetune.data.user_dataset import MapDataset, refuse_unindexed
from finetune.errors import UsageError
from finetune.evaluators.evaluator import Evaluator
from finetune.log_handlers import logging_to
from finetune.results.events import EventHandler, Events
from finetune.results.trackers import check_trackers
from finetune.run.checkpointer import checkpointing, load_checkpoint
from finetune.run.context import Run
from finetune.run.exports import finish_run, push, write_exports
from finetune.run.html_report import report
from finetune.run.setup import build_run, plan_run, run_environment
from finetune.run.signals import LoopAction, StopConditions, catch_signals
from finetune.run.step_logger import step_logger
from finetune.run.train_loader import prepared_ahead
from finetune.training.distributed import PATIENCE, from_environment


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
    check_trackers(config.report_to)
    accelerator = Accelerator(
        log_with=list(config.report_to) or None,
        project_dir="runs",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    parallel, conditions, events = from_environment(), StopConditions(), Events()
    with conditions.catch_sigusr1(), logging_to(EventHandler(events), silent=not parallel.is_main_process):
        plan = plan_run(config, dataset, accelerator.device, parallel, repeats=repeats)
        folder = plan.folder
        if folder.finished:
            if parallel.is_main_process:
                write_exports(plan.config, folder.path)
                push(plan.config, folder.path, plan.model_info.family)
            return folder.path
        conditions.save_minutes = plan.config.checkpointing_minutes
        conditions.stop_minutes = plan.config.max_train_minutes
        with run_environment(plan, accelerator.device, parallel, events):
            run = build_run(plan, accelerator=accelerator, parallel=parallel, events=events, evaluators=evaluators)
            _begin(run, folder.checkpoint)
            _train(run, conditions)
            if parallel.is_main_process:
                finish_run(run)
                del run  # what it holds is loaded again
                write_exports(plan.config, folder.path)
        return folder.path


def _begin(run: Run, resumed: Path | None) -> None:
    """Measure the untrained model, then load what the run has learned before, without anything that came after."""
    for evaluator in run.evaluators:
        evaluator.run(0)
    if resumed:
        load_checkpoint(run, resumed)
    if run.trainer.parallel.is_main_process:
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
                    raise conditions.interrupted(saved, step, total, parallel.all_reduce_max(conditions.exit_code))
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
