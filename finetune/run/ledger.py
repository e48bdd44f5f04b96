"""What became of every file that was found: ledger.json and quarantine.jsonl of a run folder."""

import json
from collections import Counter
from pathlib import Path

from finetune.data.pictures import Pictures
from finetune.data.sampler import Sampler
from finetune.errors import RunError
from finetune.files import write_whole

LEDGER, QUARANTINE = "ledger.json", "quarantine.jsonl"


def write_ledger(folder: Path, pictures: Pictures, sampler: Sampler, steps: int) -> None:
    """Write what was found, and how often the steps that are done have visited it.

    Args:
        folder: of the run.
        pictures: those that are trained on.
        sampler: of the run.
        steps: that are done.

    Raises:
        RunError: a file is unaccounted for.
    """
    found = pictures.ledger()
    if not found.adds_up():
        raise RunError(f"{LEDGER}: {found} does not add up")
    visits = Counter(visit.example for step in range(steps) for visit in sampler.visits(step))
    seen = {"visited": len(visits), "visits": visits.total()}
    if len(visits) < found.trained:
        seen["never_visited"] = found.trained - len(visits)
    record = found._asdict() | {"skipped": dict(found.skipped), "steps": steps} | seen
    write_whole(folder / LEDGER, json.dumps(record, indent=1) + "\n")
    lines = [json.dumps({"path": bad.path, "reason": bad.reason}) + "\n" for bad in pictures.quarantined]
    write_whole(folder / QUARANTINE, "".join(lines))
