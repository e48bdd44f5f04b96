"""metrics.jsonl and timings.jsonl of a run, and the other files of JSON lines in a run folder."""

import json
import os
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any, TextIO

import torch

from finetune.atomic_io import json_lines, write_whole
from finetune.training.metrics import Fault, StepMetrics

METRICS, TIMINGS, FAULTS = "metrics.jsonl", "timings.jsonl", "faults.jsonl"
VALIDATION, FORGETTING, COPIES = "validation.jsonl", "forgetting.jsonl", "copies.jsonl"
EVALUATIONS = "evaluations.jsonl"
"""What evaluators record that have no file of their own."""
LINES_OF_STEPS = (METRICS, TIMINGS, FAULTS, VALIDATION, FORGETTING, COPIES, EVALUATIONS)
"""Files of lines that a run which goes on from an earlier step cuts off after that."""
FILES = LINES_OF_STEPS
"""Patterns of what is written into a run folder here."""


class MetricsLog:
    """Appends a line per step to two files.

    `metrics.jsonl` holds only what the run determines, so that two equal runs write equal files; `timings.jsonl`
    what the machine determines.
    """

    def __init__(self, metrics: TextIO, timings: TextIO):
        self._metrics, self._timings = metrics, timings

    def write(self, metrics: StepMetrics, seconds: float) -> dict[str, Any]:
        """Write a step, and return its metrics, seconds since the last, images per second and peak memory in GB."""
        timing = {
            "step": metrics.step,
            "seconds": round(seconds, 4),
            "images_per_second": round(metrics.examples / seconds, 3),
            "peak_memory_gb": round(peak_memory_gb(), 3),
        }
        for file, record in ((self._metrics, metrics.as_dict()), (self._timings, timing)):
            file.write(json.dumps(record) + "\n")
        return metrics.as_dict() | timing


@contextmanager
def metrics_log(folder: Path, step: int) -> Iterator[MetricsLog]:
    """Open the log of a run folder, whose files hold each line as soon as it is written.

    Args:
        folder: the run folder.
        step: steps already done; later lines of an interrupted run are cut off.
    """
    for name in LINES_OF_STEPS:
        _cut(folder / name, step)
    with _appended(folder / METRICS) as metrics, _appended(folder / TIMINGS) as timings:
        yield MetricsLog(metrics, timings)


def _appended(path: Path) -> TextIO:
    return path.open("a", encoding="utf-8", buffering=1)


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line to a file of JSON lines. One that a killed process has cut off is taken out before."""
    if path.exists() and path.stat().st_size:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            cut_off = file.read() != b"\n"
        if cut_off:
            _cut(path, sys.maxsize)
    with _appended(path) as file:
        file.write(json.dumps(record) + "\n")


def append_seconds(folder: Path, step: int, what: str, seconds: float) -> None:
    """Record in timings.jsonl how long something else than a step has taken: a "grid", a "validation"."""
    with _appended(folder / TIMINGS) as file:
        file.write(json.dumps({"step": step, f"{what}_seconds": round(seconds, 4)}) + "\n")


def append_fault(folder: Path, fault: Fault, facts: Sequence[Mapping[str, Any]]) -> None:
    """Record in faults.jsonl a step that was not finite.

    Args:
        folder: of the run.
        fault: what was wrong.
        facts: what is known of each of its examples.
    """
    plain = {"step": fault.step, "loss": _number(fault.loss), "grad_norm": _number(fault.grad_norm)}
    examples = [{**fact, "loss": _number(loss)} for fact, loss in zip(facts, fault.losses, strict=True)]
    with _appended(folder / FAULTS) as file:
        file.write(json.dumps(plain | {"examples": examples}, ensure_ascii=False) + "\n")


def _number(value: float) -> float | str:
    """As JSON can say it: "nan", "inf" and "-inf" as text."""
    return value if isfinite(value) else str(value)


def timings(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of timings.jsonl."""
    return json_lines(folder / TIMINGS)


def _cut(path: Path, step: int) -> None:
    """Keep the lines of steps 1 to `step`."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:  # `splitlines` would also part them at U+2028, which a name may hold
        complete = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    write_whole(path, "".join(complete))


def peak_memory_gb() -> float:
    """Peak memory of this process in GB (1e9 bytes): reserved on the GPU where there is one, else resident.

    What CUDA graphs work in counts as reserved only. Recording one starts the peak again.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
