"""What became of every file that was found: ledger.json and quarantine.jsonl of a run folder."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.atomic_io import json_lines, write_whole
from finetune.config import ResolvedConfig
from finetune.data.chunks import Stretch, Volumes
from finetune.data.image_dataset import Ledger, Pictures
from finetune.errors import RunError
from finetune.run.build import sampler
from finetune.run.build_dataset import digest
from finetune.text import counted, listed

LEDGER, QUARANTINE, VOLUMES = "ledger.json", "quarantine.jsonl", "volumes.jsonl"
"""The last has a line for each volume that the run has come to, where there are several."""


def write_ledger(folder: Path, config: ResolvedConfig, volumes: Volumes, steps: int) -> None:
    """Write what was found, and how often the steps that are done have visited it.

    Args:
        folder: of the run.
        config: of the run.
        volumes: all that is trained on.
        steps: that are done.

    Raises:
        RunError: a file is unaccounted for.
    """
    done = volumes.steps_of_each(steps, config.global_batch)
    noted = {line["volume"]: line for line in json_lines(folder / VOLUMES)} if len(volumes) > 1 else {}
    seen = {0: _Seen.of(volumes.first, config, done[0])}
    for number, own in enumerate(done):
        if number and (number in noted or own):
            line = noted.get(number)
            same = line is not None and line["steps"] == own
            seen[number] = _Seen.noted(line) if same and line else _Seen.of(volumes.at(number), config, own)
    total = _sum([volume.ledger for volume in seen.values()])
    unseen = sum(total for number, total in enumerate(volumes.found) if number not in seen)
    if unseen:
        later = {**total.skipped, "not looked at: the run did not come to their volumes": unseen}
        total = total._replace(found=total.found + unseen, skipped=later)
    if not total.adds_up():
        raise RunError(f"{LEDGER}: {total} does not add up")
    visited = sum(volume.visited for volume in seen.values())
    told = {"visited": visited, "visits": steps * config.global_batch}
    if visited < total.trained:
        told["never_visited"] = total.trained - visited
    record = total._asdict() | {"skipped": dict(total.skipped), "steps": steps} | told
    write_whole(folder / LEDGER, json.dumps(record, indent=1) + "\n")
    _write_lines(folder / QUARANTINE, [bad for volume in seen.values() for bad in volume.quarantined])


def note_volume(folder: Path, config: ResolvedConfig, stretch: Stretch, pictures: Pictures) -> None:
    """Write to volumes.jsonl what is in a volume, as the run comes to it, and tell what is wrong with it.

    Args:
        folder: of the run.
        config: of the run.
        stretch: which volume it is, and the steps that are going to visit it.
        pictures: it, opened.
    """
    lines = {line["volume"]: line for line in json_lines(folder / VOLUMES)}
    now, before = digest(pictures), lines.get(stretch.volume)
    lines[stretch.volume] = {"volume": stretch.volume, "data": now, "steps": stretch.own.stop}
    lines[stretch.volume] |= _Seen.of(pictures, config, stretch.own.stop).as_dict()
    _write_lines(folder / VOLUMES, [lines[number] for number in sorted(lines)])
    bad = [f"{image.path} ({image.reason})" for image in pictures.quarantined]
    told = [f"{counted(len(bad), 'picture')} quarantined: {listed(bad)}"] if bad else []
    told += [f"{counted(number, 'picture')} left aside: {why}" for why, number in pictures.aside.items()]
    if before is not None:  # all that was told then
        other = "other pictures or captions than when the run came to it before: from here on the bits are others"
        told = [other] if before["data"] != now else []
    for line in told:
        print(f"{'note':>10}  volume {stretch.volume + 1}: {line}", flush=True)


def _write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(record) + "\n" for record in records))


@dataclass(frozen=True)
class _Seen:
    """What is known of a volume."""

    ledger: Ledger
    quarantined: list[dict[str, str]]
    visited: int
    """Pictures."""

    @classmethod
    def of(cls, pictures: Pictures, config: ResolvedConfig, own: int) -> "_Seen":
        """After so many steps of its own."""
        bad = [{"path": bad.path, "reason": bad.reason} for bad in pictures.quarantined]
        return cls(pictures.ledger(), bad, len(sampler(config, pictures).visited(range(own))))

    @classmethod
    def noted(cls, line: Mapping[str, Any]) -> "_Seen":
        return cls(Ledger(**line["ledger"]), line["quarantined"], line["visited"])

    def as_dict(self) -> dict[str, Any]:
        ledger = self.ledger._asdict() | {"skipped": dict(self.ledger.skipped)}
        return {"ledger": ledger, "quarantined": self.quarantined, "visited": self.visited}


def _sum(ledgers: Iterable[Ledger]) -> Ledger:
    """Of several volumes."""
    ledgers = list(ledgers)
    numbers = [name for name in Ledger._fields if name != "skipped"]
    skipped = sum((Counter(ledger.skipped) for ledger in ledgers), Counter[str]())
    return Ledger(**{name: sum(getattr(ledger, name) for ledger in ledgers) for name in numbers}, skipped=skipped)
