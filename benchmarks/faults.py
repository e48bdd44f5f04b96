"""What it costs that nothing is lost, and whether it is so.

python benchmarks/faults.py kills --count 100         # runs of `tiny`, killed at random moments and begun again
python benchmarks/faults.py checkpoints --method lora # how long a save holds training up; SD 1.5's shape
python benchmarks/faults.py checks                    # what it takes to see that a step is finite
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as finetune-unet does: spinning threads stall a shared machine

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loops import conditions, our_trainer, schedule, unet_of
from PIL import Image
from torch import Tensor

import finetune as ft
from finetune.models.encoders import PixelEncoder
from finetune.models.lora import Adapter
from finetune.training import checkpoint
from finetune.training.async_writer import AsyncWriter, copied
from finetune.training.metrics import DeviceScalars
from finetune.training.nonfinite import FiniteGate

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.faults.harness import digests, run, start, typed


def say(what: str, figure: str) -> None:
    print(f"{what:<58}{figure}", flush=True)


def seconds(do: Callable[[], object]) -> float:
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


def kills(work: Path, options: argparse.Namespace) -> None:
    """Kill a small run at a random moment, begin it again, and compare every file with those of a whole one."""
    pictures = work / "pictures"
    pictures.mkdir()
    source = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(source.integers(0, 256, (64, 64, 3), np.uint8)).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"noise, number {number}")
    length = {"max_train_steps": 8, "train_batch_size": 1, "gradient_accumulation_steps": 2, "checkpointing_steps": 2}
    learned = {"rank": 2, "lora_target_modules": "attn2.to_q", "lora_dropout": 0.1, "use_ema": True}
    seen = {"caption_dropout": 0.3, "random_flip": True, "num_inference_steps": 0, "cache_dir": work / "cache"}
    words = typed({"data": pictures, "output_dir": "out", **length, **learned, **seen})
    run(words, work / "first")  # encodes
    whole = seconds(lambda: run(words, work / "whole"))
    expected = digests(work / "whole/out")
    moments, equal, killed = random.Random(options.seed), 0, 0
    for number in range(options.count):
        place = work / str(number)
        started = start(words, place)
        time.sleep(moments.uniform(0.1 * whole, whole))
        if started.process.is_alive():
            started.kill()
        killed += started.ended().code == -9
        ended = run(words, place)
        equal += ended.code == 0 and digests(place / "out") == expected
        shutil.rmtree(place)
    say(f"runs of {whole:.1f} s, killed of {options.count} at a random moment", str(killed))
    say("whose files are equal to the byte after a second start", f"{equal} of {options.count}")


def filled_trainer(method: str, width: int, device: str = "cpu") -> ft.Trainer:
    """A trainer of Stable Diffusion 1.5's shape whose optimizer has made a step."""
    unet = unet_of("sd15", torch.device(device), torch.float32, width)
    unet.requires_grad_(method == "full")
    if method == "lora":
        ft.add_lora(unet, rank=16)
    trainer = our_trainer(unet, PixelEncoder(), ft.NoisePrediction(schedule()), None)
    for parameter in trainer.parameters.values():
        parameter.grad = torch.full_like(parameter, 1e-3)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    return trainer


def checkpoints(work: Path, options: argparse.Namespace) -> None:
    """How long a save takes, and how much of it training waits."""
    trainer = filled_trainer(options.method, options.width, options.device)
    content = np.random.default_rng(0).integers(0, 256, 2**28, np.uint8).tobytes()

    def write_plainly() -> None:
        with (work / "plain").open("wb") as file:
            for _ in range(4):
                file.write(content)
            file.flush()
            os.fsync(file.fileno())

    rate = 4 * len(content) / statistics.median(seconds(write_plainly) for _ in range(3))
    (work / "plain").unlink()
    say("writing 1 GiB to this disk, median of 3", f"{rate / 1e9:.2f} GB/s")
    saves = [seconds(lambda: checkpoint.save(work, trainer.state_dict(), keep=1)) for _ in range(options.times)]
    (folder,) = (path for _, path in checkpoint.checkpoints(work))
    size = sum(path.stat().st_size for path in folder.iterdir())
    say(f"a checkpoint, {options.method}", f"{size / 1e9:.2f} GB")
    say("  written in place: training waits", f"{statistics.median(saves):.2f} s")
    say("  the same bytes at the disk's rate", f"{size / rate:.2f} s")
    say("  proved again by a resume", f"{seconds(lambda: checkpoint.verify(folder)):.2f} s")
    if copied(trainer.state_dict()) is None:
        say("  in a thread", "not here: no memory for a copy")
        return
    held, gaps, whole = [], [], []
    for _ in range(options.times):
        with AsyncWriter() as saving:
            began = time.perf_counter()
            saving.begin(partial(write_all, work, trainer, *copies_of(trainer)))
            held.append(time.perf_counter() - began)
            gaps.append(longest_gap(saving))
            saving.wait()
            whole.append(time.perf_counter() - began)
    say("  in a thread: training waits", f"{statistics.median(held):.3f} s")
    say("  in a thread: longest that Python then stands still", f"{statistics.median(gaps):.3f} s")
    say("  in a thread: on the disk after", f"{statistics.median(whole):.2f} s")


def longest_gap(saving: AsyncWriter) -> float:
    """The longest time for which the saving thread lets no other run."""
    longest, before = 0.0, time.perf_counter()
    while saving.under_way:
        time.sleep(0.001)
        now = time.perf_counter()
        longest, before = max(longest, now - before), now
    return longest


def copies_of(trainer: ft.Trainer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a save takes over from the trainer before training goes on: the adapter's tensors, and its state."""
    adapter, state = Adapter.attached_to(trainer.unet), copied(trainer.state_dict())
    assert state is not None
    return {name: t.to("cpu", copy=True) for name, t in adapter.state().items()} if adapter else {}, state


def write_all(folder: Path, trainer: ft.Trainer, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """The adapter's file for viewers, and the checkpoint."""
    if adapter := Adapter.attached_to(trainer.unet):
        adapter.save_kohya(folder / "viewers.safetensors", {}, tensors)
    checkpoint.save(folder, state, keep=1)


def checks(work: Path, options: argparse.Namespace) -> None:
    """What of a step is spent on seeing that loss and gradient are finite."""
    trainer = filled_trainer("lora", options.width)
    cond = conditions("sd15", 1)
    latent_params = torch.zeros(1, 4, 32, 32, dtype=torch.uint8)
    batch = ft.Batch(
        latent_params=latent_params,
        cond=cond,
        keys=torch.zeros(1, dtype=torch.int64),
        time_ids=torch.zeros(1, 6),
        ids=("a",),
        weight=torch.ones(1),
    )
    steps = [seconds(lambda: trainer.step(batch).as_dict()) for _ in range(4)][1:]
    gate, loss, norm = FiniteGate(1, trainer.device), torch.ones(()), torch.ones(())

    def check() -> None:
        gate.shut(loss, norm)
        DeviceScalars(loss, norm).wait()

    once = statistics.median(seconds(check) for _ in range(1000))
    step = statistics.median(steps)
    say("a LoRA step of SD 1.5's shape, 256 px, batch 1", f"{step:.2f} s")
    say("the checks", f"{1e6 * once:.0f} us, {100 * once / step:.4f} % of it")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"kills": kills, "checkpoints": checkpoints, "checks": checks}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", choices=["lora", "full"], default="lora")
    parser.add_argument("--device", default="cpu", help="where the trainer of checkpoints is")
    parser.add_argument("--times", type=int, default=5, help="saves to take the median of")
    parser.add_argument("--width", type=int, default=320, help="of the UNet's first level")
    parser.add_argument("--work", type=Path, help="a folder on the disk to measure; default: the temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        parts[options.part](Path(work), options)


if __name__ == "__main__":
    main()
