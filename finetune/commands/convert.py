"""finetune-unet convert: convert a pickled checkpoint (.ckpt, .pt, .bin) to .safetensors."""

import os
from dataclasses import dataclass
from pathlib import Path

from finetune.atomic_io import as_readable_as, flush_to_disk, new_file
from finetune.errors import ModelError, RunError, UsageError
from finetune.text import join_limited, pluralize


@dataclass(frozen=True, kw_only=True)
class Options:
    """Copy the tensors of a pickled checkpoint to .safetensors, without running any code in it."""

    file: str
    """A .ckpt, .pt, .pth or .bin file."""
    to: str
    """The .safetensors file to write; it must not exist."""


def run(options: Options) -> None:
    """Write the file.

    Raises:
        UsageError: a place that cannot be used.
        ModelError: what cannot be read, or written in such a file.
        RunError: a full disk.
    """
    path, to = Path(options.file).expanduser(), new_file("--to", options.to)
    if not path.is_file():
        raise UsageError(f"--file {path}: no such file")
    if path.suffix == ".safetensors":
        raise UsageError(f"--file {path}: is not a pickle; to convert a LoRA see lora convert")
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from finetune.models.ckpt_file import read_pickled
    from finetune.models.single_file import inspect

    tensors, others = read_pickled(path)
    scratch = to.with_name(f".{to.name}.part")
    try:
        save_file(tensors, scratch, {"format": "pt"})
        as_readable_as(scratch, path)
        flush_to_disk(scratch)
        os.replace(scratch, to)
    except SafetensorError as error:  # a full disk, say
        raise RunError(f"{to} cannot be written: {error}") from error
    finally:
        scratch.unlink(missing_ok=True)
    left = f"; left out: {join_limited(others)}" if others else ""
    print(f"{to}: {pluralize(len(tensors), 'tensor')}{left}")
    try:
        print(f"a checkpoint of {inspect(to, '--to').family}: --model {to}")
    except ModelError as error:
        print(str(error).removeprefix(f"--to {to}: "))
