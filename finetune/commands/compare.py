"""finetune-unet compare: several runs on one page."""

from dataclasses import dataclass
from pathlib import Path

from finetune.config import as_dict, load_resolved
from finetune.errors import UsageError
from finetune.options import option_info


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write one page that compares runs: differing options, figures, images and curves."""

    runs: tuple[str, ...]
    """Two or more run folders."""
    output: str = "comparison.html"
    """Page to write."""


def run(options: Options) -> None:
    """Write the page and print its path.

    Raises:
        UsageError: fewer than two folders, one that holds no run, or a page that cannot be written.
    """
    from finetune.results.comparison import write_comparison

    folders = [Path(folder).expanduser() for folder in options.runs]
    if len(folders) < 2:
        raise UsageError(f"--runs {' '.join(options.runs)}: expected two or more")
    for folder in folders:
        if not (folder / "config.toml").is_file():
            raise UsageError(f"--runs {folder}: no run there")
    free = {name for name, info in option_info().items() if info.affects == "free"}
    settings = [
        {name: value for name, value in as_dict(load_resolved(folder / "config.toml")).items() if name not in free}
        for folder in folders
    ]
    path = Path(options.output).expanduser()
    try:
        write_comparison(path, folders, settings)
    except OSError as error:
        raise UsageError(f"--output {path} cannot be written: {error.strerror}") from error
    print(path)
