"""finetune-unet check: name the images of a folder that are worth a look before training."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import UsageError
from finetune.option_info import AT_LEAST_ONE, option


@dataclass(frozen=True, kw_only=True)
class Options:
    """Name the images of a folder that cannot be read, are small, look blurred, or show what another one shows."""

    data: str
    """Folder of images."""
    resolution: int = option(512, AT_LEAST_ONE)
    """Pixels per side that training uses."""
    follow_links: bool = True
    """Follow links that lead out of the folder."""
    output: str | None = None
    """JSON file to write, besides the lines that are printed."""


def run(options: Options) -> None:
    """Print a line for each problem, and how many there are of each kind.

    Raises:
        UsageError: `data` is no folder, or `output` cannot be written.
        DataError: a folder cannot be listed, or a metadata file is malformed.
    """
    from finetune.data.image_problems import find_problems

    folder = Path(options.data).expanduser()
    if not folder.is_dir():
        raise UsageError(f"--data {folder}: no such folder")
    problems = find_problems(folder, options.resolution, follow_links=options.follow_links)
    for problem in problems:
        print(f"{problem.image}: {problem.text}")
    counts = Counter(problem.kind for problem in problems)
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()) or "nothing was found")
    if options.output:
        try:
            Path(options.output).expanduser().write_text(json.dumps([problem._asdict() for problem in problems]))
        except OSError as error:
            raise UsageError(f"--output {options.output} cannot be written: {error.strerror}") from error
