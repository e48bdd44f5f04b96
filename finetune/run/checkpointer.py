"""Checkpointer: writes the checkpoints of a run, and the export that goes with each, at its own period."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.data.sampler import steps_per_epoch
from finetune.evaluators.evaluator import is_multiple
from finetune.results.export import discard_steps_after, step_export
from finetune.run.context import Run
from finetune.run.html_report import lora_facts
from finetune.run.signals import LoopAction
from finetune.training import checkpoint
from finetune.training.async_writer import AsyncWriter, copied


class Checkpointer:
    """Saves what a resume needs, in a thread where memory suffices for a copy of it. Only the main process writes.

    Args:
        run: what is saved.
        writer: holds the thread.
    """

    def __init__(self, run: Run, writer: AsyncWriter):
        self._run, self._writer = run, writer
        config = run.config
        epoch = steps_per_epoch(run.chunks.epoch_visits, config.global_batch)
        self._every = (config.checkpointing_steps, config.save_model_epochs and config.save_model_epochs * epoch)

    def poll(self, step: int) -> LoopAction:
        """Return CHECKPOINT where one is saved after this step (at its periods, and at the end), else CONTINUE."""
        due = step == self._run.config.max_train_steps or any(is_multiple(step, every) for every in self._every)
        return LoopAction.CHECKPOINT if due else LoopAction.CONTINUE

    def check(self) -> None:
        """Raise what has gone wrong while the last checkpoint was written, without waiting for it."""
        self._writer.check()

    def save(self, *, wait: bool) -> Path:
        """Save the trainer's state, and return the folder of the checkpoint.

        It is written last: what a resume from it would not make again is there by then.

        Args:
            wait: until it is written.
        """
        trainer, folder, step = self._run.trainer, self._run.folder, self._run.trainer.steps_done
        if trainer.parallel.is_main_process:
            self._begin()
            if wait:
                self._writer.wait()
        return checkpoint.folder_of(folder, step)

    def _begin(self) -> None:
        run, trainer, step = self._run, self._run.trainer, self._run.trainer.steps_done
        export_adapter = None  # at the end the run's own export follows
        if step < run.config.max_train_steps:
            with trainer.export_weights():
                export_adapter = step_export(run.model, run.folder, step, lora_facts(run))
        copy = copied(trainer.state_dict())

        def write() -> None:
            if export_adapter is not None:
                export_adapter()
            state, keep = copy or trainer.state_dict(), run.config.checkpoints_total_limit
            checkpoint.save(run.folder, state, keep=keep, provenance=run.provenance)

        if copy is None:
            self._writer.wait()
            write()
        else:
            self._writer.begin(write)


@contextmanager
def checkpointing(run: Run) -> Iterator[Checkpointer]:
    """The checkpointer of a run. What is being written is finished at the end of the block."""
    with AsyncWriter() as writer:
        yield Checkpointer(run, writer)


def load_checkpoint(run: Run, folder: Path) -> None:
    """Load a checkpoint of the run, and delete what it wrote after that step, which it will write again."""
    run.trainer.load_state_dict(checkpoint.load(folder))
    if run.trainer.parallel.is_main_process:
        checkpoint.discard_others(run.folder, run.trainer.steps_done, run.config.checkpoints_total_limit)
        discard_steps_after(run.folder, run.trainer.steps_done)
