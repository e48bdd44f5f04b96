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
from finetune.data.user_dataset import Rows, refuse_unindexed
from finetune.errors import Interrupted, RunError, UsageError
from finetune.models.families import Family
from finetune.out_of_memory import means_out_of_memory
from finetune.results import hub, tracking
from finetune.results.events import Events, Said
from finetune.results.export import discard_steps_after, export, step_export
from finetune.run.backend import gpu_algorithms, tuning_pays
from finetune.run.build_dataset import identity
from finetune.run.context import Run
from finetune.run.disk_use import disk_line, disk_use
from finetune.run.early_stopping import has_risen, keep_if_best, take_best
from finetune.run.evaluation import due
from finetune.run.forgetting import measure_forgetting
from finetune.run.html_report import how_to_load, lora_facts, report
from finetune.run.ledger import write_ledger
from finetune.run.load_trained import discard_exports, write_exports
from finetune.run.memory_estimate import check_memory, out_of_memory
from finetune.run.provenance import threads, threads_then
from finetune.run.resume import choose
from finetune.run.run_dir import RunFolder, finish, occupied
from finetune.run.sample_grids import discard_strangers, draw_grid, lay_side_by_side
from finetune.run.setup import build_run, resolve_run
from finetune.run.signals import PAUSE, SAVE, TIME_UP, Requests, StopRequest, catch_signals
from finetune.run.step_logger import reports
from finetune.run.validation import least_step, validate
from finetune.training import checkpoint
from finetune.training.async_writer import Saving, copied
from finetune.training.distributed import PATIENCE, Parallel, launched
from finetune.training.micro_batch import Prepared


def fine_tune(config: TrainConfig, dataset: Rows | None = None, *, repeats: Path | None = None) -> Path:
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


def _check_arguments(config: object, dataset: Rows | None) -> None:
    """Raise UsageError, in a line, for what is easily given instead of a config or a dataset."""
    if not isinstance(config, TrainConfig):
        raise UsageError(f"config is a {type(config).__name__}: give a finetune.TrainConfig, as TrainConfig(**options)")
    if dataset is not None:
        refuse_unindexed(dataset)
        if config.data:
            raise UsageError("data and a dataset are given: give one of them")


def _fine_tune(config: TrainConfig, dataset: Rows | None, repeats: Path | None) -> Path:
    tracking.check_trackers(config.report_to)
    accelerator = Accelerator(
        log_with=list(config.report_to) or None,
        project_dir="runs",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    parallel, requests, events = launched(), Requests(), Events()
    said = Said(sys.stdout, events) if parallel.first and sys.stdout else None  # one process tells
    with requests.hearing_usr1(), redirect_stdout(said):
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
    dataset: Rows | None,
    repeats: Path | None,
    accelerator: Accelerator,
    parallel: Parallel,
    requests: Requests,
    events: Events,
) -> Path:
    with parallel.in_turn():
        if config.push_to_hub:
            hub.check_login(config.hub_model_id)
        config, model_info, volumes = resolve_run(config, dataset, accelerator.device, parallel)
        folder = choose(config, identity(volumes))
    if not parallel.same((config_text(config), identity(volumes), str(folder.checkpoint))):
        raise UsageError("the processes see different pictures, options or checkpoints: they need one file system")
    if folder.note:
        print(folder.note)
    if repeats is not None and not folder.finished and (changed := decided_otherwise(repeats, config)):
        print(f"{'note':>10}  {changed}")
    if folder.finished:
        if parallel.first:
            write_exports(config, folder.path)
            _push(config, folder.path, model_info.family)
        return folder.path
    print(f"{'memory':>10}  {check_memory(config, model_info, accelerator.device)}")
    print(f"{'disk':>10}  {disk_line(config, disk_use(config, model_info, volumes), folder.path)}")
    held = _held(folder, config, events) if parallel.first else nullcontext()
    computing = threads(threads_then(folder.about, accelerator.device, parallel.world))
    tuned = accelerator.device.type == "cuda" and tuning_pays(
        config.max_train_steps, sizes=len(set(volumes.first.shapes())), batch_size=config.global_batch
    )
    with held, gpu_algorithms(deterministic=config.deterministic, tuned=tuned), computing:
        try:
            run = build_run(
                config=config,
                model_info=model_info,
                volumes=volumes,
                folder=folder,
                accelerator=accelerator,
                parallel=parallel,
                events=events,
            )
            _begin(run, folder.checkpoint)
            if parallel.first:
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
def _held(folder: RunFolder, config: ResolvedConfig, events: Events) -> Iterator[None]:
    """Inside, no other process can run in the folder, and what happens is written to it."""
    steps = {"step": folder.step, "total": config.max_train_steps}
    with (
        occupied(folder.path, folder.mark, lock=config.lock_output_dir),
        events.written_to(folder.path, **steps, anew=folder.overwrite),
    ):
        yield


def _begin(run: Run, resumed: Path | None) -> None:
    """The grid of the untrained model, then what the run has learned before, without anything that came after."""
    first = run.trainer.parallel.first
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
        discard_strangers(run)


def _train(run: Run, requests: Requests) -> None:
    """The loop: from the trainer's step to the last."""
    config, trainer = run.config, run.trainer
    total = config.max_train_steps
    epoch = steps_per_epoch(run.volumes.epoch_visits, config.global_batch)
    every_epochs = config.save_model_epochs and config.save_model_epochs * epoch
    with catch_signals() as stop, reports(run) as told, Saving() as saving, closing(run.reading), _ahead(run) as steps:
        wanted = told.due(trainer.steps_done)  # the last part may have stopped before
        if "validation" in wanted:
            validate(run)
        _look(run, wanted)
        told.resume()
        for prepared_step in () if _is_over(run) else steps:
            told.add(trainer.take(prepared_step))
            saving.check()
            step = trainer.steps_done
            last = step == total
            saves = last or due(step, config.checkpointing_steps) or due(step, every_epochs)
            wanted = told.due(step)
            asked = trainer.parallel.largest(max(SAVE * saves, PAUSE * bool(wanted), _asks(requests, stop, config)))
            if not asked:
                continue
            told.finish()
            if asked >= SAVE:
                saved = _save(run, saving)
                requests.saved()
                if last or asked > SAVE:
                    saving.wait()
                if asked > SAVE and not last:
                    why = f" after max_train_minutes = {config.max_train_minutes}" if asked == TIME_UP else ""
                    kept = f"{saved} is kept, and the same command goes on from there"
                    trainer.parallel.largest(0)  # the others wait, see `_follow`
                    raise Interrupted(f"stopped at step {step} of {total}{why}; {kept}", asked)
            if "validation" in wanted:
                validate(run)
            if _is_over(run):
                if asked < SAVE:
                    _save(run, saving)
                saving.wait()
                break
            _look(run, wanted)
            if wanted:
                report(run)
            told.resume()


def _look(run: Run, wanted: frozenset[str]) -> None:
    """What has become of the model, apart from the loss."""
    if "forgetting" in wanted:
        measure_forgetting(run)
    if "grid" in wanted:
        draw_grid(run)


def _is_over(run: Run) -> bool:
    """Whether to stop early: asked by all processes, and answered by the first, which has validated."""
    if not run.config.early_stop:
        return False
    risen = False
    if run.trainer.parallel.first:
        keep_if_best(run)
        risen = has_risen(run)
    return bool(run.trainer.parallel.largest(int(risen)))


def _save(run: Run, saving: Saving) -> Path:
    """Begin to write a checkpoint, in a thread where memory suffices for a copy of what it holds; answers its folder.

    It is written last: what a resume from it would not make again is there by then.
    """
    trainer, folder, step = run.trainer, run.folder, run.trainer.steps_done
    export_adapter = None  # at the end the run's own export follows
    if step < run.config.max_train_steps:
        with trainer.in_full():
            export_adapter = step_export(run.model, folder, step, lora_facts(run))
    copy = copied(trainer.state_dict())

    def write() -> None:
        if export_adapter is not None:
            export_adapter()
        state, keep = copy or trainer.state_dict(), run.config.checkpoints_total_limit
        checkpoint.save(folder, state, keep=keep, about=run.about)

    if copy is None:
        saving.wait()
        write()
    else:
        saving.begin(write)
    return checkpoint.folder_of(folder, step)


def _asks(requests: Requests, stop: StopRequest, config: ResolvedConfig) -> int:
    return requests.asks(stop.number, config.checkpointing_minutes, config.max_train_minutes)


def _follow(run: Run, requests: Requests) -> None:
    """The loop of the processes that are not the first: to compute their parts."""
    trainer, total = run.trainer, run.config.max_train_steps
    with catch_signals() as stop, closing(run.reading), _ahead(run) as steps:
        for prepared_step in () if _is_over(run) else steps:
            trainer.take(prepared_step)
            asked = trainer.parallel.largest(_asks(requests, stop, run.config))
            if asked:
                trainer.settle()  # what is wrong with the step is told by all, or by none
            if asked >= SAVE:
                requests.saved()
            if asked > SAVE and trainer.steps_done < total:
                # A launcher takes the first process that ends for a failure, and kills the one that still writes.
                trainer.parallel.largest(0)
                raise Interrupted(f"stopped at step {trainer.steps_done} of {total}", asked)
            if asked and _is_over(run):
                break
    trainer.settle()


def _ahead(run: Run) -> AbstractContextManager[Iterator[Prepared]]:
    """What the trainer takes, step by step, prepared by a thread as soon as visits need no encoder."""
    planned = run.reading.steps(run.trainer.steps_done)
    return ahead((run.trainer.prepare(*batches) for batches in planned), wanted=lambda: not run.reading.live)


def _finish(run: Run) -> None:
    """Export, prove the export, and say where everything is."""
    config, folder, trained, family = run.config, run.folder, run.trainer.steps_done, run.model.family
    if config.early_stop:
        take_best(run)
        _look(run, frozenset({"forgetting", "grid"}))
    run.events.phase("exporting", run.trainer.steps_done)
    with run.trainer.in_full():
        difference = export(run.model, folder, lora_facts(run, final=True))
    lay_side_by_side(run)
    write_ledger(folder, config, run.volumes, trained)
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
