"""Measure the embedded model: what it knows, how well it learns butterflies, and what it forgets over them.

    python benchmarks/tiny.py                     # everything
    python benchmarks/tiny.py obedience demo      # some of it

Prints every figure with its aim; runs and pictures to look at are left in --work.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from judge import (
    SHAPES,
    ButterflyReader,
    colour_pair,
    copies,
    drawn,
    energy_distance,
    invented,
    read,
    through_vae,
)
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))
from draw_butterflies import Butterfly
from draw_butterflies import describe as describe_butterfly
from draw_world import GROUNDS, INKS, describe, draw, held_out, invent, near, with_articles

import finetune as ft
from finetune import seeding
from finetune.models.encoders import VaeEncoder
from finetune.models.tiny import tiny_folder
from finetune.results.memorization import features
from finetune.results.sampling import grid

DRAWN = 240  # pictures of each butterfly set that is drawn by a model
HELD_OUT = 480  # held-out butterflies that they are compared with, and as many again for the floor
READ = 1500  # butterflies that the reader learns from
HELD_OUT_SEED, READ_SEED = 1, 2  # examples/butterflies is drawn with seed 0
STEPS, GUIDANCE = 20, 3.0  # as the demo draws its grids
DEMO = ROOT / "configs/tiny-butterflies.toml"


def say(what: str, figure: str, aim: str = "") -> None:
    print(f"{what:<58} {figure:<28} {f'aim: {aim}' if aim else ''}", flush=True)


def load_pipeline(run: Path | None = None) -> StableDiffusionPipeline:
    """The embedded model, or what a run made of it."""
    full = run is not None and (run / "model_index.json").exists()
    pipeline: Any = StableDiffusionPipeline.from_pretrained(run if run and full else tiny_folder())
    if run is not None and not full:
        pipeline.load_lora_weights(str(run))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def paint(pipeline: Any, prompts: Sequence[str], steps: int = STEPS) -> list[Image.Image]:
    """A picture for each prompt, 32 at a time, seeds 0, 1, ..., with GUIDANCE."""
    pictures = []
    for start in range(0, len(prompts), 32):
        some = list(prompts[start : start + 32])
        sources = [torch.Generator().manual_seed(start + row) for row in range(len(some))]
        pictures += pipeline(some, generator=sources, num_inference_steps=steps, guidance_scale=GUIDANCE).images
    return pictures


def draw_scenes(folder: Path, count: int, *, seed: int, digits: int) -> Path:
    """Pictures of the world that tiny knows, with captions, in files numbered with that many digits."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        scene = invent(rng)
        draw(scene, 64).save(folder / f"{number:0{digits}}.png")
        (folder / f"{number:0{digits}}.txt").write_text(describe(scene, rng))
    return folder


@lru_cache(maxsize=2)
def butterflies(count: int, first: int = 0) -> tuple[list[Image.Image], list[Butterfly]]:
    """Held-out butterflies, and pictures of them, 64 px."""
    held_out = invented(HELD_OUT_SEED, count, first)
    return drawn(held_out), held_out


def vae_of_tiny() -> VaeEncoder:
    encoder = ft.load_model("tiny").encoder
    assert isinstance(encoder, VaeEncoder)
    return encoder


def psnr(a: Image.Image, b: Image.Image) -> float:
    error = np.square(np.asarray(a, float) - np.asarray(b, float)).mean()
    return float(10 * np.log10(255**2 / error))


def measure_vae(work: Path) -> None:
    vae = vae_of_tiny()
    scenes = [invent(np.random.default_rng([11, i])) for i in range(200)]
    world_size = [draw(scene, 64) for scene in scenes]
    for name, pictures in (("200 unseen world pictures", world_size), ("100 butterflies", butterflies(100)[0])):
        ratios = [psnr(*pair) for pair in zip(pictures, through_vae(vae, pictures), strict=True)]
        say(f"VAE, {name}: PSNR", f"{np.mean(ratios):.1f} dB ({min(ratios):.1f} at worst)", "24 dB")
    plain = [invent(np.random.default_rng([12, i]), unseen=True) for i in range(400)]
    readings = [read(picture) for picture in through_vae(vae, [draw(scene, 64) for scene in plain])]
    right = [r == (s.thing, s.colour, s.ground) for r, s in zip(readings, plain, strict=True)]
    say("judge, 400 true pictures that went through the VAE", f"{np.mean(right):.1%} wholly right", "99 %")


def obedience(pipeline: Any, steps: int = STEPS) -> dict[str, float]:
    """Shares of held-out combinations drawn right, over every pair of shape and colour and every ground, twice."""
    pairs = [(s, c, g) for s, c, g in product(SHAPES, INKS, GROUNDS) if held_out(s, c) and not near(c, g)] * 2
    prompts = [with_articles(f"a {colour} {shape} on a {ground} background") for shape, colour, ground in pairs]
    readings = [read(picture) for picture in paint(pipeline, prompts, steps)]
    names = ("shape", "colour", "ground")
    shares = [np.mean([r[i] == p[i] for r, p in zip(readings, pairs, strict=True)]) for i in range(3)]
    return {"prompts": len(pairs)} | {name: float(share) for name, share in zip(names, shares, strict=True)}


def tell_obedience(who: str, shares: dict[str, float], aims: Sequence[str]) -> None:
    for name, aim in zip(("colour", "ground", "shape"), aims, strict=True):
        say(f"obedience of {who}, {shares['prompts']:.0f} held-out prompts: {name}", f"{shares[name]:.1%}", aim)


def measure_obedience(work: Path) -> None:
    tell_obedience("tiny", obedience(load_pipeline()), ("90 %", "90 %", "80 %"))


def command(*options: str | Path) -> float:
    """Run finetune-unet as a person would; answers its seconds."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    line = [sys.executable, "-m", "finetune", *map(str, options)]
    clock = time.perf_counter()
    subprocess.run(line, cwd=ROOT, check=True, env=environment, stdout=sys.stderr)
    return time.perf_counter() - clock


class Exam:
    """What drawn butterflies are judged by: held-out ones, the training pictures, and a reader of shapes."""

    def __init__(self) -> None:
        vae = vae_of_tiny()
        self.held, self.butterflies = butterflies(HELD_OUT)
        other, _ = butterflies(HELD_OUT, HELD_OUT)
        blurred = through_vae(vae, other[:DRAWN])
        paths = sorted((ROOT / "examples/butterflies").glob("*.jpg"))
        self.training = [Image.open(path).convert("RGB") for path in paths]
        small = [picture.resize((64, 64), Image.Resampling.LANCZOS) for picture in self.training]
        self.known = {colour_pair(picture) for picture in self.training}
        self.threshold = features(blurred)
        self.reader = ButterflyReader()
        lessons = invented(READ_SEED, READ)
        self.reader.learn(through_vae(vae, drawn(lessons)), lessons)
        true = through_vae(vae, self.held)
        self.seen = self.reader.features(true)
        self.say_traits("reader, held-out butterflies through the VAE", true)
        seen = energy_distance(self.reader.features(blurred), self.seen)
        say(f"shape distance, floor: {DRAWN} real to {HELD_OUT} real, VAE", f"{seen:.2f}")
        floor = energy_distance(features(other), features(self.held))
        say(f"colour distance, floor: {HELD_OUT} real to {HELD_OUT} real", f"{floor:.4f}")
        floor = energy_distance(self.threshold, features(self.held))
        say(f"the same through the VAE, {DRAWN} to {HELD_OUT}", f"{floor:.4f}")
        found = copies(features(through_vae(vae, small)), features(self.training), self.threshold)
        say("copies found among the training pictures through the VAE", f"{found:.0%}", "near 100 %")
        self.say_colours(f"{DRAWN} real ones", other[:DRAWN])

    @property
    def prompts(self) -> list[str]:
        """Captions of held-out butterflies."""
        return [describe_butterfly(butterfly) for butterfly in self.butterflies[:DRAWN]]

    def say_traits(self, who: str, pictures: Sequence[Image.Image], aims: Mapping[str, str] | None = None) -> None:
        for trait, share in self.reader.obeyed(pictures, self.butterflies[: len(pictures)]).items():
            say(f"{who}: {trait}", f"{share:.1%}", (aims or {}).get(trait, ""))

    def say_colours(self, who: str, pictures: Sequence[Image.Image]) -> None:
        pairs = {colour_pair(picture) for picture in pictures}
        say(f"{who}: colour combinations", f"{len(pairs)}, of them {len(pairs - self.known)} not in training")

    def judge(self, who: str, pictures: Sequence[Image.Image]) -> None:
        """Say how true the pictures drawn after `prompts` are, how near to real ones, and whether they are copies."""
        self.say_traits(who, pictures, {"view": "95 %", "shape": "60 %"})
        distance = energy_distance(self.reader.features(pictures), self.seen)
        say(f"{who}: shape distance", f"{distance:.2f}", "0.6, a twelfth of tiny's")
        seen = features(pictures)
        say(f"{who}: colour distance", f"{energy_distance(seen, features(self.held)):.4f}")
        say(f"{who}: near copies", f"{copies(seen, features(self.training), self.threshold):.1%}")
        self.say_colours(who, pictures)


def measure_demo(work: Path) -> None:
    """What tiny and the demo's runs know of butterflies, then what the runs have forgotten."""
    exam = Exam()
    exam.judge("tiny", paint(load_pipeline(), exam.prompts))
    before = obedience(load_pipeline())
    for method in ("lora", "full"):
        run = work.resolve() / f"demo-{method}"
        seconds = command("--config", DEMO, "--method", method, "--output_dir", run, "--overwrite_output_dir")
        say(f"demo, {method}: seconds from command to grid", f"{seconds:.0f} s", "240 s")
        pipeline = load_pipeline(run)
        pictures = paint(pipeline, exam.prompts)
        grid([pictures[i : i + 8] for i in range(0, 32, 8)], [""] * 4).save(work / f"butterflies-{method}.png")
        exam.judge(f"demo, {method}", pictures)
        kept = [f"{2 / 3 * before[name]:.1%}" if method == "lora" else "" for name in ("colour", "ground", "shape")]
        tell_obedience(f"demo, {method}", obedience(pipeline), kept)


def measure_sample(work: Path) -> None:
    prompt = "a red circle on a blue background"
    seconds = command("sample", "--model", "tiny", "--prompt", prompt, "--output", work.resolve())
    say("finetune-unet sample, from command to PNG", f"{seconds:.1f} s", "15 s")
    clock = time.perf_counter()
    ft.load_model("tiny")
    say("load_model('tiny') after imports", f"{time.perf_counter() - clock:.2f} s", "2 s")


class Held(torch.utils.data.Dataset):
    """Butterflies as a dataset."""

    def __init__(self, count: int, first: int) -> None:
        self.pictures, held_out = butterflies(count, first)
        self.captions = [describe_butterfly(butterfly) for butterfly in held_out]
        self.ids = [f"butterfly {first + i}" for i in range(count)]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Image.Image, str, str]:
        return self.pictures[index], self.captions[index], self.ids[index]


def held_out_losses(seed: int, *, steps: int, every: int) -> Iterator[float]:
    """Loss on 64 held-out butterflies, always the same noise, while 12 others are learned, every weight of the UNet."""
    model = ft.load_model("tiny")
    objective = ft.NoisePrediction(model.scheduler)
    source, unseen = ft.encode(Held(12, 2000 + 12 * seed), model), ft.encode(Held(64, 5000), model)
    fixed = next(ft.batches(unseen, batch_size=64, steps=1))
    x0 = model.encoder.sample(fixed.latent_params, fixed.keys)
    noise = seeding.normal(fixed.keys, "held-out noise", x0.shape[1:])
    noised = objective.add_noise(x0, noise, torch.arange(64) * 1000 // 64 + 7)
    optimizer = torch.optim.AdamW(ft.trainable(model.unet), lr=2e-4)
    trainer = ft.Trainer(model.unet, model.encoder, objective, optimizer, seed=seed)
    for batch in ft.batches(source, batch_size=4, steps=steps + 1, seed=seed):
        if trainer.steps_done % every == 0:
            model.unet.eval()
            with torch.no_grad():
                loss = objective.loss(model.unet, noised, fixed.cond).mean().item()
            yield loss
        trainer.step(batch)


def measure_overfitting(work: Path) -> None:
    """Whether held-out loss falls and then rises when 12 pictures are learned for long."""
    shown = 0
    for seed in range(5):
        losses = list(held_out_losses(seed, steps=600, every=40))
        least = int(np.argmin(losses))
        shown += losses[0] > 1.01 * losses[least] and losses[-1] > 1.01 * losses[least]
        curve = " ".join(f"{loss:.4f}" for loss in losses[::3])
        say(f"held-out loss, seed {seed}: least at step {40 * least}", curve)
    say("held-out loss falls, then rises by 1 % or more", f"{shown} of 5 seeds", "5 of 5")


def measure_pixel(work: Path) -> None:
    run = work.resolve() / "pixel"
    options = ("--model", "ddpm", "--resolution", "32", "--data", ROOT / "examples/butterflies")
    seconds = command(*options, "--output_dir", run, "--overwrite_output_dir")
    say(f"pixel mode at 32 px (look at {run / 'samples'})", f"{seconds / 60:.1f} minutes", "10 minutes")


STAGES = {
    "vae": measure_vae,
    "obedience": measure_obedience,
    "demo": measure_demo,
    "sample": measure_sample,
    "overfitting": measure_overfitting,
    "pixel": measure_pixel,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the embedded model.")
    parser.add_argument("stages", nargs="*", help=f"some of {', '.join(STAGES)}; default: all")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-tiny"), help="folder for runs and pictures")
    options = parser.parse_args()
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"no such stage: {', '.join(unknown)}; allowed are {', '.join(STAGES)}")
    options.work.mkdir(parents=True, exist_ok=True)
    files = [path for path in tiny_folder().rglob("*") if path.is_file()]
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} threads, {platform.machine()}")
    say("assets, all files", f"{sum(path.stat().st_size for path in files) / 1e6:.2f} MB", "12 MB")
    for stage in options.stages or STAGES:
        STAGES[stage](options.work)


if __name__ == "__main__":
    main()
