"""How fast training runs, beside a plain diffusers loop and beside the bare UNet.

    python benchmarks/throughput.py                         # LoRA, 256 px, batch 2, a UNet of SD 1.5's 860 M parameters
    python benchmarks/throughput.py --method full --width 64 --batch_size 4 --json result.json

The model has Stable Diffusion 1.5's shape and random weights; it is built once, without download. Three loops train:

  a  the plain loop of diffusers' text-to-image example scripts: VAE and text encoder at every step, all in fp32;
  b  a bare loop at its best: weights in half precision, hand-written low-rank layers, inputs that lie ready, fused
     AdamW on these weights, no masters, no metrics;
  c  finetune's Trainer, fed by its loader.

They take turns in rounds, so that what else the machine does falls on all alike, and ratios are taken within a round.
Not timed is what comes before the first step, such as encoding. On a CPU it also says where the time of our step goes.
"""

# diffusers annotates its own methods narrower than what they take and give.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as finetune-unet does: spinning threads stall a shared machine

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import psutil
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from loops import LEARNING_RATE, Step, bare_loop, our_loop, our_trainer, schedule, unet_config
from peft import LoraConfig
from PIL import Image
from step_profile import profile_step
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2 import functional as vision
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import finetune as ft
from finetune.models.loading import without_library_bars
from finetune.models.tiny import tiny_folder
from finetune.training.backend import DTYPES, compile_blocks, resolve_precision

LABELS = {"a": "plain diffusers loop, fp32", "b": "bare loop at its best", "c": "finetune: loader and Trainer"}
CAPTION = "a picture of noise"


@without_library_bars()
def main() -> None:
    options = parse_options()
    folder = build_model(options.model_dir, options.width)
    if options.only:
        print(peak_bytes_alone(options, folder))
        return
    names, left_out = what_fits(options, folder)
    peaks = {name: peak_bytes_in_child(name) for name in names if name != "b"}  # first, while memory is free
    report = {
        "machine": describe_machine(options.device),
        "options": {name: value for name, value in vars(options).items() if name not in ("only", "json", "against")},
        "left_out": left_out,
        "peak_bytes": peaks,
        **summarize(measure(options, folder, names), options.batch_size),
    }
    print_table(report, options)
    if options.against:
        print_changes(json.loads(options.against.read_text(encoding="utf-8")), report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")


def parse_options() -> argparse.Namespace:
    """The command line, with device and precision decided."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank")
    parser.add_argument("--resolution", type=int, default=256, help="pixels per side, a multiple of 64")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--precision", choices=("auto", "no", "bf16", "fp16"), default="auto", help="of b and c")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--rounds", type=int, default=5, help="counted after one round of warm-up")
    parser.add_argument("--steps", type=int, default=3, help="per loop and round")
    parser.add_argument("--width", type=int, default=320, help="of the UNet's first level; 64: 38 M parameters")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="in all three")
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet's blocks in b and c")
    parser.add_argument("--model_dir", type=Path, default=Path(tempfile.gettempdir()) / "finetune-benchmarks")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--against", type=Path, help="an earlier --json: print how the figures have changed")
    parser.add_argument("--only", choices=("a", "c"), help="only print the peak memory of this loop alone, in bytes")
    options = parser.parse_args()
    if options.width % 32 or options.resolution % 64:
        parser.error("--width takes multiples of 32, --resolution multiples of 64")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    options.device = torch.device(found if options.device == "auto" else options.device)
    options.precision = resolve_precision(options.precision, options.device, small=False)
    return options


def build_model(model_dir: Path, width: int) -> Path:
    """The diffusers folder of a Stable Diffusion 1.5 with random weights and a UNet `width` wide, built on first use.

    All is as in the original but the text encoder's vocabulary: the tokenizer is that of `tiny`, of few words.
    """
    folder = model_dir / f"sd15-width-{width}"
    if folder.is_dir():
        return folder
    print(f"building a Stable Diffusion 1.5 with random weights in {folder}")
    model_dir.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=model_dir))
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(tiny_folder() / "tokenizer")
    StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=512,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                projection_dim=768,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        ),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**unet_config("sd15", width)),
        scheduler=schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(scratch, max_shard_size="500MB")  # a shard is copied as it is written: small ones spare memory
    scratch.rename(folder)
    return folder


class RandomPictures:
    """Coloured noise as a dataset: four batches of it, so that no epoch ends with a short batch."""

    def __init__(self, options: argparse.Namespace):
        self.size = options.resolution
        self.ids = [f"picture {number}" for number in range(4 * options.batch_size)]
        self.captions = [CAPTION] * len(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Image.Image, str, str]:
        noise = np.random.default_rng(index).integers(0, 256, (self.size, self.size, 3), dtype=np.uint8)
        return Image.fromarray(noise), CAPTION, self.ids[index]


def plain_loop(options: argparse.Namespace, folder: Path) -> Step:
    """a: one step of diffusers' `train_text_to_image_lora.py` (or `train_text_to_image.py`), with its defaults.

    The scripts decode and crop pictures and tokenize captions as they go. Here both lie ready, in the loop's favour.
    """
    device = options.device
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").to(device)
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").to(device).requires_grad_(False)
    text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").to(device).requires_grad_(False)
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    if options.method == "lora":
        unet.requires_grad_(False)
        rank, targets = options.rank, ["to_k", "to_q", "to_v", "to_out.0"]
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets))
    if options.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    images = [vision.pil_to_tensor(RandomPictures(options)[i][0]) for i in range(options.batch_size)]
    pixels = (torch.stack(images) / 127.5 - 1).to(device)
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    tokens = tokenizer([CAPTION] * options.batch_size, padding="max_length", return_tensors="pt").input_ids.to(device)

    def step() -> None:
        latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), device=device)
        noisy_latents = scheduler.add_noise(latents, noise, timesteps)
        hidden_states = text_encoder(tokens, return_dict=False)[0]
        prediction = unet(noisy_latents, timesteps, hidden_states, return_dict=False)[0]
        loss = F.mse_loss(prediction.float(), noise.float(), reduction="mean")
        loss.item()  # the scripts log it
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_parts(options: argparse.Namespace, folder: Path) -> tuple[ft.Trainer, Iterator[ft.Batch]]:
    """Trainer and batches as `fine_tune` makes them: frozen weights in half precision, pictures encoded once."""
    lora, precision = options.method == "lora", DTYPES[options.precision]
    model = ft.load_model(folder, dtype=(precision if lora else None) or torch.float32).to(options.device)
    if options.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    if lora:
        ft.add_lora(model.unet, rank=options.rank)
    encoded = ft.encode(RandomPictures(options), model)
    trainer = our_trainer(model.unet, model.encoder, ft.NoisePrediction(model.scheduler), precision)
    if options.compile and (why_not := compile_blocks(model.unet)):
        sys.exit(f"--compile: {why_not}")
    steps = (options.rounds + 1) * options.steps + 10  # a few are for b, and to count
    return trainer, ft.batches(encoded, batch_size=options.batch_size, steps=steps)


def bare_parts(options: argparse.Namespace, folder: Path, trainer: ft.Trainer, batch: ft.Batch) -> Step:
    """The bare loop on a UNet of its own, and one of our batches."""
    dtype = DTYPES[options.precision] or torch.float32
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype).to(options.device)
    if options.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    (part,) = trainer.prepare(batch).parts
    rank = options.rank if options.method == "lora" else None
    step = bare_loop(unet, part.drawn.x_t.to(dtype), part.drawn.t, part.drawn.target, dict(part.cond), rank)
    if options.compile:
        compile_blocks(unet)
    return step


def measure(options: argparse.Namespace, folder: Path, names: str) -> dict[str, Any]:
    """Sizes of the UNet, operations of its step, and seconds per step of each loop in each round."""
    loops: dict[str, Step] = {"a": plain_loop(options, folder)} if "a" in names else {}
    trainer, batches = our_parts(options, folder)
    loops["b"] = bare_parts(options, folder, trainer, next(batches))
    operations = None if options.compile else count_operations(loops["b"])  # it cannot look into compiled code
    with our_loop(trainer, batches) as loops["c"]:
        seconds, matmul_rate = take_turns(loops, options)
        ours = {} if options.device.type == "cuda" else profile_step(loops["c"], trainer.unet, trainer.optimizer)
    return {
        "parameters": sum(parameter.numel() for parameter in trainer.unet.parameters()),
        "trained_parameters": sum(parameter.numel() for parameter in trainer.parameters.values()),
        "operations_per_step": operations,
        "matmul_operations_per_second": matmul_rate,
        "seconds_per_step": seconds,
        "our_step": ours,
    }


def take_turns(loops: dict[str, Step], options: argparse.Namespace) -> tuple[dict[str, list[float]], float]:
    """Seconds per step, loop -> one figure per round; and the best rate of a plain matmul between the rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    rates: list[float] = []
    for _ in range(options.rounds + 1):
        for name, step in loops.items():
            seconds[name].append(seconds_of(step, options.steps, options.device))
        rates.append(matmul_rate(options))
    return {name: pluralize for name, (_warm_up, *pluralize) in seconds.items()}, max(rates)


def seconds_of(step: Step, times: int, device: torch.device) -> float:
    """Mean wall-clock seconds of a call, with the work it left to the device."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(times):
        step()
    wait()
    return (time.perf_counter() - start) / times


def matmul_rate(options: argparse.Namespace) -> float:
    """Floating-point operations per second of a large square matmul at the precision of b and c."""
    size = 8192 if options.device.type == "cuda" else 2048
    square = torch.randn(size, size, device=options.device, dtype=DTYPES[options.precision] or torch.float32)
    torch.mm(square, square)
    return 2 * size**3 / seconds_of(lambda: torch.mm(square, square), 5, options.device)


def count_operations(step: Step) -> int:
    """Floating-point operations of the matmuls, convolutions and attention of one call."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def what_fits(options: argparse.Namespace, folder: Path) -> tuple[str, str]:
    """Which loops to run, and why some are left out: a needs a UNet of its own beside that of b and c."""
    unet = sum(file.stat().st_size for file in (folder / "unet").glob("*.safetensors"))  # in fp32
    needed = unet * 2 * (4 if options.method == "full" else 1)  # each trained weight has a gradient and two moments
    free = torch.cuda.mem_get_info()[0] if options.device.type == "cuda" else psutil.virtual_memory().available
    if 1.2 * needed <= free:  # a fifth for activations and the frozen parts
        return "abc", ""
    return "bc", f"a is left out: with b and c it needs over {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"


def peak_bytes_in_child(name: str) -> int:
    """Peak memory of one loop in a process of its own."""
    command = [sys.executable, *sys.argv, "--only", name]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def peak_bytes_alone(options: argparse.Namespace, folder: Path) -> int:
    """Peak memory of this process after it has loaded the model, encoded (c) and made a few steps."""
    plain = options.only == "a"
    with nullcontext(plain_loop(options, folder)) if plain else our_loop(*our_parts(options, folder)) as step:
        for _ in range(options.steps):
            step()
    return peak_bytes(options.device)


def peak_bytes(device: torch.device) -> int:
    """The most memory this process has held: on the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count what the parent process held before this one was started
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on beside the options."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def summarize(figures: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """The figures with what follows from them: medians over the rounds; a ratio is taken in each round first."""
    seconds: dict[str, list[float]] = figures["seconds_per_step"]
    medians = {name: statistics.median(rounds) for name, rounds in seconds.items()}
    return figures | {
        "median_seconds_per_step": medians,
        "images_per_second": {name: batch_size / median for name, median in medians.items()},
        "ratios": {
            f"c/{name}": [theirs / ours for theirs, ours in zip(seconds[name], seconds["c"], strict=True)]
            for name in seconds
            if name != "c"
        },
        "operations_per_second": (figures["operations_per_step"] or 0) / medians["c"],
    }


def print_changes(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Each loop's median seconds a step, then and now."""
    for name, seconds in now["median_seconds_per_step"].items():
        if (earlier := before["median_seconds_per_step"].get(name)) is not None:
            print(f"{name}    {earlier:.3g} s a step before, {seconds:.3g} now: {earlier / seconds:.3f} times as fast")


def print_table(report: dict[str, Any], options: argparse.Namespace) -> None:
    """The report for people."""
    machine = report["machine"]
    print(f"{machine['device']} ({machine['cpu']}, {machine['threads']} threads), torch {machine['torch']}")
    method = f"LoRA of rank {options.rank}" if options.method == "lora" else "full"
    millions = f"{report['trained_parameters'] / 1e6:.1f} M of {report['parameters'] / 1e6:.0f} M parameters trained"
    print(f"{method}, {millions}, {options.resolution} px, batch {options.batch_size}, precision {options.precision}\n")
    print(f"{'':34}{'images/s':>10}{'s/step':>10}{'peak GiB':>10}")
    for name, median in report["median_seconds_per_step"].items():
        peak = f"{report['peak_bytes'][name] / 2**30:.2f}" if name in report["peak_bytes"] else ""
        print(f"{name}  {LABELS[name]:31}{report['images_per_second'][name]:10.3g}{median:10.3g}{peak:>10}")
    print()
    for name, ratios in report["ratios"].items():
        print(f"{name}  {statistics.median(ratios):.3f}  ({min(ratios):.3f} to {max(ratios):.3f} over the rounds)")
    reached, best = report["operations_per_second"] / 1e12, report["matmul_operations_per_second"] / 1e12
    if reached:
        print(f"c    {reached:.3g} TFLOP/s, {reached / best:.0%} of the {best:.3g} of a large matmul")
    if step := report["our_step"]:
        parts = ", ".join(f"{name} {step[name]:.3g} s" for name in ("forward", "backward", "optimizer"))
        print(f"c    {parts}; {step['share_outside']:.1%} of the step outside of these")
        print(f"c    {step['casts']} casts a step, which write {step['cast_bytes'] / 1e6:.3g} MB")
    print(report["left_out"])


if __name__ == "__main__":
    main()
