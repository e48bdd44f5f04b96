"""Memory that the export of a checkpoint in one file takes in addition to the model, and its time. Linux only.

    python benchmarks/export.py MODEL                    # a diffusers folder or a checkpoint in one file
    python benchmarks/export.py MODEL --precision fp16

What is written is loaded back and compared, as every export is; both are measured.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from finetune.models.loading import load_model
from finetune.models.tensor_file import DTYPES
from finetune.results.export_formats import write_format


def additional_peak(work: Callable[[], object]) -> int:
    """Bytes of memory that `work` takes at most, in addition to what the process has before."""
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    work()
    return _status("VmHWM") - before


def _status(entry: str) -> int:
    """Bytes, from an entry of the process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{entry}:"))


def main() -> None:
    """Measure, and print a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--precision", choices=[*DTYPES], default="fp32")
    parser.add_argument("--tokenizer", help="of a checkpoint in one file")
    parser.add_argument("--folder", help="where to write; default: the system's folder for scratch files")
    options = parser.parse_args()
    model = load_model(options.model, tokenizer=options.tokenizer)
    pipeline: Any = model.pipeline()
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    weights = [tensor for module in modules for tensor in module.state_dict().values()]
    sizes = [tensor.nbytes for tensor in weights]
    for tensor in weights:  # those that are mapped from files are the model's memory once they are read
        tensor.sum()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        to = Path(scratch) / "model.safetensors"
        begin = time.perf_counter()
        peak = additional_peak(lambda: write_format(model, to, "single-file", options.precision, {}))
        result = {
            "model_gb": sum(sizes) / 1e9,
            "file_gb": to.stat().st_size / 1e9,
            "largest_tensor_mb": max(sizes) / 1e6,
            "additional_mb": peak / 1e6,
            "of_the_largest_tensor": peak / max(sizes),
            "seconds": time.perf_counter() - begin,
        }
    print(json.dumps({name: float(f"{value:.3g}") for name, value in result.items()}))


if __name__ == "__main__":
    main()
