"""Which version of diffusers reads which of our files, how it was measured, and the table of it in the documentation.

    python -m tests.clients.matrix FOLDER            # print what differs from what is recorded
    python -m tests.clients.matrix FOLDER --record   # record it in results.json, and write the documentation's table

FOLDER is where the versions are installed, see `tests/clients/environments.py`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.clients.environments import CLIENTS, make
from tests.clients.files import CASES, Case, write_cases

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
PAGE = HERE.parent.parent / "docs/reference/programs.md"
BEGIN, END = "<!-- measured by tests/clients/matrix.py -->\n", "<!-- end -->"
EXACT = 1e-3
"""Of what training has changed: a difference of this is rounding."""


def read_with(version: str, clients: Path, cases: Path) -> list[dict[str, Any]]:
    """What a version of diffusers makes of every case in a folder."""
    process = subprocess.run(
        [sys.executable, HERE / "reader.py", cases / CASES],
        env=os.environ | {"PYTHONPATH": str(clients / version), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in process.stdout.splitlines()]


def verdict(case: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """What a version makes of a file, in a word or two."""
    if "error" in result:
        return "refused"
    if result["layers"] < case["layers"]:
        return f"{result['layers']} of {case['layers']} layers"
    whole = case["form"] in ("pipeline", "single-file")
    if whole and result["prediction_type"] != case["prediction_type"]:
        return f"as {result['prediction_type']}"
    return "yes" if result["difference"] < EXACT else "wrong"


def rows(cases: Sequence[Case], results: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """For each case what it is, and each version's verdict, as results.json has them."""
    described = [{name: asdict(case)[name] for name in ("model", "what", "form", "layers")} for case in cases]
    return [
        row | {"read by": {version: verdict(asdict(case), found[place]) for version, found in results.items()}}
        for place, (row, case) in enumerate(zip(described, cases, strict=True))
    ]


def table(recorded: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: models that are read alike share a row."""
    versions = list(CLIENTS)
    lines = [
        f"| what | file | model | {' | '.join(versions)} |",
        f"|---|---|---|{'---|' * len(versions)}",
    ]
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in recorded:
        read = row["read by"]
        groups.setdefault((row["what"], row["form"], *(read[version] for version in versions)), []).append(row["model"])
    every = {row["model"] for row in recorded}
    order = list(dict.fromkeys((row["what"], row["form"]) for row in recorded))
    for (what, form, *verdicts), models in sorted(groups.items(), key=lambda group: order.index(group[0][:2])):  # pyright: ignore[reportArgumentType]
        which = "all" if set(models) == every else ", ".join(models)
        lines.append(f"| {what} | {form} | {which} | {' | '.join(verdicts)} |")
    return "\n".join(lines) + "\n"


def page_with(text: str, recorded: Sequence[Mapping[str, Any]]) -> str:
    """A page of the documentation with the table of these results."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(recorded)}\n{END}{after}"


def main() -> None:
    """Measure, and print what differs from what is recorded, or record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    make(options.folder)
    with tempfile.TemporaryDirectory() as scratch:
        cases = write_cases(Path(scratch))
        found = rows(cases, {version: read_with(version, options.folder, Path(scratch)) for version in CLIENTS})
    recorded = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    if options.record:
        RESULTS.write_text("[\n" + ",\n".join(json.dumps(row) for row in found) + "\n]\n")
        PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    else:
        print(*(json.dumps(row) for row in found if row not in recorded), sep="\n")


if __name__ == "__main__":
    main()
