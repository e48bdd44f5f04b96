"""The forgetting meter in the course of a run: when it is read, and what is recorded of it in forgetting.jsonl."""

import time

from finetune.files import json_lines, write_json_lines
from finetune.results import tracking
from finetune.run.pace import measured_interval
from finetune.run.parts import Run
from finetune.run.questions import SHARE
from finetune.training.forgetting import Questions, drift

MOST = 10
"""Readings of a run."""


def measure_forgetting(run: Run) -> None:
    """Read the meter, and record and tell what it says; unless that was done already."""
    step, path = run.trainer.steps_done, run.folder / tracking.FORGETTING
    lines = json_lines(path)
    if run.meter is None or any(line["step"] == step for line in lines):
        return
    run.events.phase("forgetting", step)
    clock = time.perf_counter()
    if step:
        with run.trainer.averaged():
            record = {"step": step, "forgetting": _read(run, run.meter.plain)}
            if run.meter.triggered:
                record["with_trigger"] = _read(run, run.meter.triggered)
        seconds = time.perf_counter() - clock
    else:
        record = {"step": 0, "forgetting": 0.0} | ({"with_trigger": 0.0} if run.meter.triggered else {})
        seconds = run.meter.seconds
    tracking.note_seconds(run.folder, step, "forgetting", seconds)
    write_json_lines(path, [*lines, record])
    run.events.note("forgetting", **record)
    tracking.track_forgetting(run.accelerator, record)
    if step:
        trigger = f" ({record['with_trigger']:.1%} with the trigger)" if "with_trigger" in record else ""
        print(f"forgetting at step {step}: {record['forgetting']:.1%}{trigger}", flush=True)


def steps_between_readings(run: Run) -> int | None:
    """What the first reading and the first steps leave room for, None while that is not known."""
    if run.meter is None:
        return None
    return measured_interval(run.folder, "forgetting", run.config.max_train_steps, share=SHARE, most=MOST)


def _read(run: Run, questions: Questions) -> float:
    batch_size = run.trainer.micro_batch_size or run.config.train_batch_size
    return drift(run.model.unet, questions, batch_size=batch_size)
