"""The ledger: what became of every file, in ledger.json and quarantine.jsonl of a run folder."""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.atomic_io import json_lines, write_whole
from finetune.config import ResolvedConfig
from finetune.data.chunks import Chunks, ChunkSteps
from finetune.data.image_dataset import ImageDataset, Ledger
from finetune.errors import RunError
from finetune.run.build import sampler
from finetune.run.build_dataset import digest
from finetune.text import join_limited, pluralize

FILES = ("ledger.json", "quarantine.jsonl", "volumes.jsonl")
"""Patterns of what is written into a run folder here."""

_log = logging.getLogger(__name__)

LEDGER, QUARANTINE, VOLUMES = "ledger.json", "quarantine.jsonl", "volumes.jsonl"
"""The last has a line for each chunk that the run has come to, where there are several."""


def write_ledger(folder: Path, config: ResolvedConfig, chunks: Chunks, steps: int) -> None:
    """Write what was found, and how often the steps that are done have visited it.

    Args:
        folder: of the run.
        config: of the run.
        chunks: all that is trained on.
        steps: that are done.

    Raises:
        RunError: a file is unaccounted for.
    """
    done = chunks.steps_per_chunk(steps, config.global_batch)
    noted = {line["volume"]: line for line in json_lines(folder / VOLUMES)} if len(chunks) > 1 else {}
    chunk_ledgers = {0: _Seen.from_chunk(chunks.first, config, done[0])}
    for number, steps_there in enumerate(done):
        if number and (number in noted or steps_there):
            line = noted.get(number)
            same = line is not None and line["steps"] == steps_there
            chunk_ledgers[number] = (
                _Seen.noted(line) if same and line else _Seen.from_chunk(chunks.at(number), config, steps_there)
            )
    total = _sum([chunk.ledger for chunk in chunk_ledgers.values()])
    unseen = sum(total for number, total in enumerate(chunks.found) if number not in chunk_ledgers)
    if unseen:
        later = {**total.skipped, "not looked at: the run did not come to their volumes": unseen}
        total = total._replace(found=total.found + unseen, skipped=later)
    if not total.adds_up():
        raise RunError(f"{LEDGER}: {total} does not add up")
    visited = sum(chunk.visited for chunk in chunk_ledgers.values())
    visits = {"visited": visited, "visits": steps * config.global_batch}
    if visited < total.trained:
        visits["never_visited"] = total.trained - visited
    record = total._asdict() | {"skipped": dict(total.skipped), "steps": steps} | visits
    write_whole(folder / LEDGER, json.dumps(record, indent=1) + "\n")
    _write_lines(folder / QUARANTINE, [bad for chunk in chunk_ledgers.values() for bad in chunk.quarantined])


def note_chunk(folder: Path, config: ResolvedConfig, steps_of_chunk: ChunkSteps, pictures: ImageDataset) -> None:
    """Write to volumes.jsonl what is in a chunk, as the run comes to it, and tell what is wrong with it.

    Args:
        folder: of the run.
        config: of the run.
        steps_of_chunk: which chunk it is, and the steps that are going to visit it.
        pictures: it, opened.
    """
    lines = {line["volume"]: line for line in json_lines(folder / VOLUMES)}
    now, before = digest(pictures), lines.get(steps_of_chunk.chunk)
    lines[steps_of_chunk.chunk] = {"volume": steps_of_chunk.chunk, "data": now, "steps": steps_of_chunk.own.stop}
    lines[steps_of_chunk.chunk] |= _Seen.from_chunk(pictures, config, steps_of_chunk.own.stop).as_dict()
    _write_lines(folder / VOLUMES, [lines[number] for number in sorted(lines)])
    bad = [f"{image.path} ({image.reason})" for image in pictures.quarantined]
    notes = [f"{pluralize(len(bad), 'image')} quarantined: {join_limited(bad)}"] if bad else []
    notes += [f"{pluralize(number, 'image')} excluded: {why}" for why, number in pictures.excluded.items()]
    if before is not None:  # all that was told then
        other = "its images or captions have changed since this run read them: results are no longer bit-identical"
        notes = [other] if before["data"] != now else []
    for line in notes:
        _log.warning("volume %s: %s", steps_of_chunk.chunk + 1, line)


def _write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(record) + "\n" for record in records))


@dataclass(frozen=True)
class _Seen:
    """What is known of a chunk."""

    ledger: Ledger
    quarantined: list[dict[str, str]]
    visited: int
    """Pictures."""

    @classmethod
    def from_chunk(cls, pictures: ImageDataset, config: ResolvedConfig, steps: int) -> "_Seen":
        """After so many steps of its own."""
        bad = [{"path": bad.path, "reason": bad.reason} for bad in pictures.quarantined]
        return cls(pictures.ledger(), bad, len(sampler(config, pictures).visited(range(steps))))

    @classmethod
    def noted(cls, line: Mapping[str, Any]) -> "_Seen":
        return cls(Ledger(**line["ledger"]), line["quarantined"], line["visited"])

    def as_dict(self) -> dict[str, Any]:
        ledger = self.ledger._asdict() | {"skipped": dict(self.ledger.skipped)}
        return {"ledger": ledger, "quarantined": self.quarantined, "visited": self.visited}


def _sum(ledgers: Iterable[Ledger]) -> Ledger:
    """Return the sums of the ledgers of several chunks."""
    ledgers = list(ledgers)
    numbers = [name for name in Ledger._fields if name != "skipped"]
    skipped = sum((Counter(ledger.skipped) for ledger in ledgers), Counter[str]())
    return Ledger(**{name: sum(getattr(ledger, name) for ledger in ledgers) for name in numbers}, skipped=skipped)
