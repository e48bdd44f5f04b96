"""Measure the way from files to batches: decoding, encoding, the cache, the order, the loader.

    python benchmarks/data.py                          # all but `million`, on pictures that are drawn for it
    python benchmarks/data.py decode loader            # some of it
    python benchmarks/data.py precision --data ./photos

The VAE and text encoder of `encode` have Stable Diffusion 1.5's shape and random weights; `precision` uses `tiny`, on
photographs if they are named. Prints every figure with its aim.
"""

# diffusers annotates its own methods narrower than what they take and give.
# pyright: reportArgumentType=false

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as finetune-unet does: spinning threads stall a shared machine

import argparse
import platform
import random
import resource
import statistics
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import ceil
from pathlib import Path

import numpy as np
import torch
import torchvision
from diffusers import AutoencoderKL
from PIL import Image
from torchvision.transforms.v2 import functional

import finetune as ft
from finetune.cache.disk import DiskStore
from finetune.data.image_index import ImageIndex
from finetune.data.sampler import Sampler
from finetune.models.conditioners import NoCondition
from finetune.models.encoders import VaeEncoder
from finetune.models.fixed_batch import FixedBatches
from finetune.models.loading import Frozen
from finetune.models.model_info import locate
from finetune.run.build_dataset import open_pictures


def say(what: str, figure: str, aim: str = "") -> None:
    print(f"{what:<58} {figure:<34} {f'aim: {aim}' if aim else ''}", flush=True)


def seconds(do: Callable[[], object]) -> float:
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


def draw_pictures(folder: Path, count: int, side: tuple[int, int], ending: str = "jpg") -> Path:
    """Soft noise, which JPEG takes about as long for as for a photograph."""
    folder.mkdir(parents=True)
    source = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(source.integers(0, 256, (side[1] // 8, side[0] // 8, 3), dtype=np.uint8))
        coarse.resize(side, Image.Resampling.BICUBIC).save(folder / f"{number:05d}.{ending}")
    return folder


def decode(work: Path) -> None:
    """Our decoding and preprocessing beside torchvision's own, on all cores."""
    folder = draw_pictures(work / "decode", 200, (1024, 768))
    files = sorted(folder.iterdir())
    images = ft.ImageFolder(folder, "x", resolution=512, memory=ImageIndex(work / "memory"))
    transform = images.transform
    assert transform is not None

    def ours(index: int) -> None:
        transform(images[index].image, key=0)

    def theirs(index: int) -> None:
        pixels = torchvision.io.decode_jpeg(torchvision.io.read_file(str(files[index])))
        functional.center_crop(functional.resize(pixels, [512], antialias=True), [512, 512])

    def rate(one: Callable[[int], None]) -> float:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return len(files) / seconds(lambda: list(pool.map(one, range(len(files)))))

    rounds = [(rate(ours), rate(theirs)) for _ in range(3)]
    mine, other = (statistics.median(column) for column in zip(*rounds, strict=True))
    say(
        "decode, resize, crop: 1024 x 768 JPEG -> 512 px",
        f"{mine:.0f}/s beside {other:.0f}/s",
        "at least torchvision's",
    )


def encode(work: Path, device: str = "cpu") -> None:
    """`ft.encode` beside the bare VAE encoder on tensors that lie ready."""
    count, side = (24, 256) if device == "cpu" else (192, 512)
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
    vae = vae.to_empty(device=device)
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    encoder = VaeEncoder(vae)
    folder = draw_pictures(work / "encode", count, (512, 384))
    images = ft.ImageFolder(folder, "x", resolution=side, memory=ImageIndex(work / "memory"))
    pixels = torch.rand(encoder.batch_size(side, side), 3, side, side)
    encoder.encode(pixels)
    bare = count / seconds(lambda: [encoder.encode(pixels).cpu() for _ in range(count // len(pixels))])
    whole = count / seconds(lambda: ft.encode(images, Frozen(encoder, NoCondition()), cache_dir=work / "cache"))
    say(f"encode, SD 1.5's VAE at {side} px", f"{whole:.2f}/s, bare {bare:.2f}/s: {whole / bare:.2f}", "at least 0.95")


def second(work: Path) -> None:
    """From the options to the first batch, on a folder that an earlier run has encoded."""
    count = 10_000
    folder = draw_pictures(work / "many", count, (80, 64), "png")
    model = ft.load_model("tiny")

    def first_batch() -> None:
        images = ft.ImageFolder(folder, "a thing", resolution=64, memory=ImageIndex(work / "memory"))
        next(ft.batches(ft.encode(images, model, cache_dir=work / "cache"), batch_size=4, steps=1))

    say(f"{count} small pictures, first run: to the first batch", f"{seconds(first_batch):.1f} s")
    say(f"{count} small pictures, again: to the first batch", f"{seconds(first_batch):.1f} s", "within 5 s")


def opening(work: Path) -> None:
    """A folder of many pictures, each with a caption beside it, as new and again."""
    count = 100_000
    folder = draw_pictures(work / "pictures", count, (80, 64))
    for picture in list(folder.iterdir()):
        picture.with_suffix(".txt").write_text(f"picture {picture.stem}")
    for when in ("as new", "again"):
        took = seconds(lambda: ft.ImageFolder(folder, resolution=64, memory=ImageIndex(work / "memory")))
        say(f"{count} small pictures with captions, opened {when}", f"{took:.1f} s")


def million(work: Path) -> None:
    """A million small pictures with captions: what comes before the first step, and between volumes. Takes 9 GB."""
    picture = draw_pictures(work / "one", 1, (80, 64)) / "00000.jpg"
    content = picture.read_bytes()
    for number in range(1_000_000):
        place = work / "pictures" / f"{number // 5000:04d}" / f"{number:07d}"
        if number % 5000 == 0:
            place.parent.mkdir(parents=True)
        place.with_suffix(".jpg").write_bytes(content + b"%d" % number)  # each of bytes of its own
        place.with_suffix(".txt").write_text(f"picture {number}")
    config = ft.TrainConfig(data=str(work / "pictures"), cache_dir=str(work / "cache"))
    found, before = locate("tiny"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for when in ("as new", "again"):
        took = seconds(lambda: open_pictures(config, found, None))
        say(f"a million pictures with captions, the first volume opened {when}", f"{took:.1f} s", "under 60 s")
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    say("memory of it, beside the libraries", f"{more / 1e6:.0f} MB", "under 500 MB")
    chunks = open_pictures(config, found, None)
    for when in ("as new", "again"):
        say(f"the next volume opened {when}, by a thread beside the steps", f"{seconds(lambda: chunks.at(1)):.1f} s")


def index(work: Path) -> None:
    """A store and an order of a million items."""
    for count in (1_000, 1_000_000):
        store = DiskStore(work / f"store-{count}")
        for start in range(0, count, 20_000):
            numbers = range(start, min(count, start + 20_000))
            store.put("picture", {f"{number:032x}": {"stored": torch.zeros(8, 8, 8)} for number in numbers})
        store.close()
        opened = seconds(lambda place=store.folder: DiskStore(place).missing([f"{0:032x}"]))
        reader, source = DiskStore(store.folder), random.Random(0)
        times = []
        for _ in range(200):
            keys = [f"{source.randrange(count):032x}" for _ in range(16)]
            times.append(seconds(partial(reader.load, keys)))
        say(f"store of {count} items: open", f"{1000 * opened:.1f} ms", "under 3 s")
        say(f"store of {count} items: a random batch of 16", f"{1000 * statistics.median(times):.2f} ms", "under 5 ms")
        shapes = [source.randrange(20) for _ in range(count)]
        sampler = Sampler(shapes, batch_size=16, seed=0)
        say(f"order of {count} examples: first step", f"{1000 * seconds(lambda s=sampler: s.visits(0)):.1f} ms")
        each = seconds(lambda s=sampler: [s.visits(step) for step in range(1, 61)]) / 60
        say(f"order of {count} examples: a step", f"{1000 * each:.3f} ms", "flat")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    say("memory of all this, libraries included", f"{peak / 1e6:.0f} MB", "under 500 MB beside the libraries")


def loader(work: Path) -> None:
    """Batches of 16 kept latents of 512 px, on one thread."""
    torch.set_num_threads(1)
    folder = draw_pictures(work / "loader", 64, (80, 64), "png")

    class Latents:
        """Encodings as large as those of 512 px, of which nothing is computed."""

        fingerprint = "none"
        parts = FixedBatches()

        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(pixels), 8, 64, 64)

        def batch_size(self, height: int, width: int) -> int:
            return 1

        def sample(self, latent_params: torch.Tensor, keys: torch.Tensor, purpose: str = "") -> torch.Tensor:
            return latent_params

        def decode(self, x0: torch.Tensor) -> torch.Tensor:
            return x0

        def to(self, device: object) -> "Latents":
            return self

    images = ft.ImageFolder(folder, "x", resolution=64, memory=ImageIndex(work / "memory"))
    for precision in ("fp32", "fp16"):
        frozen = Frozen(Latents(), NoCondition())
        encoded = ft.encode(images, frozen, cache_dir=work / "latents", precision=precision)
        batches = ft.batches(encoded, batch_size=16, steps=500)
        next(batches)
        rate = 499 / seconds(lambda batches=batches: deque(batches, maxlen=0))  # none is kept, as in training
        say(f"loader, 16 x 512 px latents kept in {precision}", f"{rate:.0f} batches/s", "400")


def precision(work: Path, data: Path | None) -> None:
    """What the number format of kept encodings does to the loss of `tiny`, on the same visits."""
    folder = data or draw_pictures(work / "precision", 32, (80, 64))
    images = ft.ImageFolder(folder, "x", resolution=64)
    model = ft.load_model("tiny")
    objective = ft.NoisePrediction(model.scheduler)
    losses = {}
    for name in ("fp32", "fp16", "bf16"):
        encoded = ft.encode(images, model, cache_dir="none", precision=name)
        batches = ft.batches(encoded, batch_size=16, steps=16)
        with torch.no_grad():
            losses[name] = torch.cat(
                [
                    objective.loss(
                        model.unet, objective.sample(model.encoder.sample(b.latent_params, b.keys), b.keys), b.cond
                    )
                    for b in batches
                ]
            )
    for name in ("fp16", "bf16"):
        change = ((losses[name] - losses["fp32"]).abs() / losses["fp32"]).tolist()
        mean = abs(losses[name].mean() / losses["fp32"].mean() - 1)
        figure = f"mean {mean:.1e}, each at most {max(change):.1e}"
        say(f"loss with encodings kept in {name}, {len(images)} pictures", figure, "under 1e-3")


def pooling(work: Path) -> None:
    """Forward passes of mixed steps beside those of pure buckets."""
    source = random.Random(0)
    for kinds in (5, 10, 20):
        shapes = [min(int(source.expovariate(4 / kinds)), kinds - 1) for _ in range(200)]
        for batch_size in (4, 16):
            pure = sum(ceil(count / batch_size) for count in Counter(shapes).values())
            sampler, epochs = Sampler(shapes, batch_size=batch_size, seed=0), 16
            steps = [sampler.visits(step) for step in range(epochs * 200 // batch_size)]
            passes = sum(len({shapes[visit.example] for visit in step}) for step in steps)
            what = f"passes, 200 pictures in {len(set(shapes))} sizes, batch {batch_size}"
            say(
                what,
                f"{passes / epochs:.1f} beside {pure} an epoch: {passes / epochs / pure - 1:+.1%}",
                "under 10 % more",
            )


PARTS = {
    "decode": decode,
    "encode": encode,
    "second": second,
    "opening": opening,
    "index": index,
    "loader": loader,
    "pooling": pooling,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = [*PARTS, "precision", "million", []]
    parser.add_argument("parts", nargs="*", choices=choices, help="what to measure; default: all but million")
    parser.add_argument("--data", type=Path, help="photographs for `precision`")
    parser.add_argument("--device", default="cpu", help="of the VAE in `encode`")
    options = parser.parse_args()
    measures = PARTS | {
        "encode": partial(encode, device=options.device),
        "precision": lambda work: precision(work, options.data),
        "million": million,
    }
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    for part in options.parts or [*PARTS, "precision"]:
        with tempfile.TemporaryDirectory() as place:
            measures[part](Path(place))


if __name__ == "__main__":
    main()
