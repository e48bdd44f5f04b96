"""Images per second on a GPU over models, methods, batch sizes and compilation, beside the bare loop.

    python benchmarks/sweep.py                                       # all: about half an hour on an H100
    python benchmarks/sweep.py sd15:lora:16 sd15:full:32:blocks      # some, as MODEL:METHOD:BATCH[:blocks|:whole]
    python benchmarks/sweep.py sdxl:bf16:1:checkpointed              # --full_bf16 with Adafactor, for small GPUs
    python benchmarks/sweep.py --no_bare sdxl:fused:1:checkpointed   # and --fused_backward_pass
    python benchmarks/sweep.py --json result.json

SD 1.5 is trained at 512 px, SDXL at 1024, both with random weights, in bf16, rank 16. `bare` is the loop of
`loops.py` at its best; `ours` is the Trainer, fed by our loader from latents in memory. Ratios are of the two in turn.
"""

# diffusers annotates its own methods narrower than what they take and give.
# pyright: reportArgumentType=false

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from loops import RandomLatents, Step, bare_loop, conditions, latent_sampler, our_loop, our_trainer, schedule, unet_of
from torch.utils.flop_counter import FlopCounterMode

import finetune as ft
from finetune.batch import as_input, moved
from finetune.training.backend import compile_blocks, gpu_algorithms
from finetune.training.gradient_checkpointing import recompute

RANK, ROUNDS, STEPS = 16, 3, 4
WIDTHS = (9, 9, 10, 9, 10, 7, 11)
SIDES = {"sd15": 512, "sdxl": 1024}
ALL = [
    f"{model}:{method}:{batch}{compiled}"
    for model, batches in {"sd15": (4, 16, 32, 64), "sdxl": (1, 4, 8)}.items()
    for method in ("lora", "full")
    for batch in batches
    for compiled in ("", ":blocks")
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=ALL)
    parser.add_argument("--no_bare", action="store_true", help="ours alone")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda")
    best = matmul_rate(device)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: a large bf16 matmul {best / 1e12:.0f} TFLOP/s")
    heads = ("images/s", "ms/step", "of matmul", "bare", "ours/bare", "GB", "first step")
    print(f"{'case':<24}" + "".join(f"{head:>{width}}" for head, width in zip(heads, WIDTHS, strict=True)))
    rows = []
    with gpu_algorithms(deterministic=False, tuned=True):
        for case in options.cases:
            try:
                row = measure(case, device, best, bare=not options.no_bare)
            except torch.OutOfMemoryError:
                row = {"case": case, "out_of_memory": True}
            rows.append(row)
            print(line_of(row), flush=True)
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch._dynamo.reset()
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def line_of(row: dict[str, Any]) -> str:
    """A row for people."""
    if "out_of_memory" in row:
        return f"{row['case']:<24}out of memory"
    inpainting_channels = f"{row['bare_images_per_second']:9.1f}{row['ratio']:10.3f}" if "ratio" in row else " " * 19
    ours = f"{row['images_per_second']:9.1f}{row['milliseconds']:9.1f}{row['share_of_matmul']:10.2f}"
    return f"{row['case']:<24}{ours}{inpainting_channels}{row['peak_gb']:7.1f}{row['first_step_seconds']:10.1f}s"


def measure(case: str, device: torch.device, best: float, *, bare: bool) -> dict[str, Any]:
    """One row: rates are medians over the rounds."""
    model, method, size, *how = case.split(":")
    batch, rank = int(size), RANK if method == "lora" else None
    trainer = trainer_of(model, method, how, device)
    source = RandomLatents(model, SIDES[model], batch)
    with our_loop(trainer, ft.batches(source, batch_size=batch, steps=10**6)) as step:
        first = time_of(step, 1)
        time_of(step, 3)
        seconds = {"ours": [time_of(step) for _ in range(ROUNDS)]}
        peak = torch.cuda.max_memory_allocated()
        if bare:
            other = bare_of(model, batch, rank, how, device)
            time_of(other, 2)
            seconds = {"ours": [], "bare": []}
            for _ in range(ROUNDS):
                seconds["ours"].append(time_of(step))
                seconds["bare"].append(time_of(other))
    median = statistics.median(seconds["ours"])
    row: dict[str, Any] = {
        "case": case,
        "images_per_second": batch / median,
        "milliseconds": 1000 * median,
        "share_of_matmul": batch * operations_of(model, rank) / median / best,
        "peak_gb": peak / 1e9,
        "first_step_seconds": first,
    }
    if bare:
        row["bare_images_per_second"] = batch / statistics.median(seconds["bare"])
        row["ratio"] = statistics.median(b / o for b, o in zip(seconds["bare"], seconds["ours"], strict=True))
    return row


def trainer_of(model: str, method: str, how: list[str], device: torch.device) -> ft.Trainer:
    """Our trainer, as `fine_tune` makes it."""
    unet = unet_of(model, device, torch.float32 if method == "full" else torch.bfloat16)
    if method == "lora":
        ft.add_lora(unet, rank=RANK)
    make_ready(unet, how)
    objective = ft.NoisePrediction(schedule())
    return our_trainer(unet, latent_sampler(), objective, torch.bfloat16, method)


def bare_of(model: str, batch: int, rank: int | None, how: list[str], device: torch.device) -> Step:
    """The bare loop on a UNet of its own."""
    unet = unet_of(model, device, torch.bfloat16)
    side = SIDES[model] // 8
    x = torch.randn(2, batch, 4, side, side, device=device)
    cond = moved(as_input(conditions(model, batch), torch.bfloat16), device)
    t = torch.randint(1000, (batch,), device=device)
    step = bare_loop(unet, x[0].bfloat16(), t, x[1], cond, rank)
    make_ready(unet, how)
    return step


def make_ready(unet: Any, how: list[str]) -> None:
    """Compiled our way, or as one piece; with gradient checkpointing; or as it is."""
    if how == ["blocks"] and (why_not := compile_blocks(unet)):
        raise SystemExit(why_not)
    if how == ["whole"]:
        unet.compile()
    if how[:1] == ["checkpointed"]:
        recompute(unet, float(how[1]) if how[1:] else 1.0)


def time_of(step: Step, times: int = STEPS) -> float:
    """Mean seconds of a step."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def matmul_rate(device: torch.device) -> float:
    """Operations per second of a large square matmul."""
    square = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    torch.mm(square, square)
    return 2 * 8192**3 / time_of(lambda: torch.mm(square, square))


def operations_of(model: str, rank: int | None) -> int:
    """Floating-point operations of the bare step on one picture, counted without computing."""
    device = torch.device("meta")
    unet, side = unet_of(model, device, torch.bfloat16), SIDES[model] // 8
    x = torch.randn(2, 1, 4, side, side, device=device)
    cond = as_input(moved(conditions(model, 1), device), torch.bfloat16)
    t = torch.zeros(1, dtype=torch.int64, device=device)
    step = bare_loop(unet, x[0].bfloat16(), t, x[1], cond, rank)
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
