"""Train `tiny`, the Stable Diffusion inside the package, from nothing, on the drawn world of draw_world.py.

    python examples/train_tiny.py --work runs/tiny --assets runs/tiny/trained

Three stages, each written to the work folder when it is done, so that the same command goes on after an interruption:

1. `untrained/`: a tokenizer made from the words of the drawing programs, and every network with seeded weights.
2. The VAE learns to carry drawn pictures. Its scaling factor is computed from what it encodes.
3. UNet and text encoder learn together to draw the world from captions. This is the one place where a text encoder
   learns: the toolkit itself never trains it.

Both trainings are the toolkit's own parts with another objective or another network put in: `encode`, `batches`,
`Trainer`, `Ema`, checkpoints.
"""

# diffusers and transformers annotate narrower than what they take.
# pyright: reportArgumentType=false

import argparse
import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from draw_butterflies import describe as describe_butterfly
from draw_butterflies import invent as invent_butterfly
from draw_world import UNTOLD, describe, draw, invent, scribble
from PIL import Image
from safetensors.torch import load_file, save
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import finetune as ft
from finetune import seeding
from finetune.atomic_io import flush_tree, write_whole
from finetune.models.conditioners import ClipConditioner, NoCondition
from finetune.models.encoders import Encoder, PixelEncoder, VaeEncoder
from finetune.models.tiny import DIGESTS
from finetune.run.signals import catch_signals
from finetune.training import checkpoint
from finetune.training.backend import DTYPES, resolve_precision
from finetune.training.learning_rate import learning_rate
from finetune.training.optimizers import make_optimizer

SIZE = 64
WIDTH = 96  # of the text encoder and of what the UNet's cross attention reads
KL_WEIGHT = 5e-7  # Stable Diffusion's own VAE: 1e-6


class World(Dataset):
    """Scenes of the drawn world with their captions, all pairs of shape and colour but the held-out ones."""

    def __init__(self, count: int, seed: int) -> None:
        self.scenes = [invent(np.random.default_rng([seed, index])) for index in range(count)]
        self.captions = [describe(s, np.random.default_rng([seed, i, 1])) for i, s in enumerate(self.scenes)]
        self.ids = [f"scene {index}" for index in range(count)]

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Image.Image, str, str]:
        return draw(self.scenes[index], SIZE), self.captions[index], self.ids[index]


class Drawings(Dataset):
    """What the VAE sees, without captions: half scenes of the world, half scribbles."""

    def __init__(self, count: int, seed: int) -> None:
        self.world, self.seed = World(count // 2, seed), seed
        self.ids = [*self.world.ids, *(f"scribble {index}" for index in range(count - count // 2))]
        self.captions = [""] * count

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Image.Image, str, str]:
        if index < len(self.world):
            return self.world[index][0], "", self.ids[index]
        return scribble(np.random.default_rng([self.seed, index, 2]), SIZE), "", self.ids[index]


class Reconstruction:
    """The VAE's objective: give back the picture, from a posterior near N(0, 1) (Kingma & Welling 2013, eq. 10)."""

    def sample(self, x0: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, H, W), mirrored and with their colour channels exchanged at random, and noise for latents."""
        turned = []
        for picture, key in zip(x0, keys.tolist(), strict=True):
            source = seeding.generator(key, "turn")
            axes = [axis for axis in (1, 2) if torch.rand((), generator=source) < 0.5]
            turned.append(picture.flip(axes)[torch.randperm(3, generator=source)])
        shape = (4, x0.shape[2] // 4, x0.shape[3] // 4)
        return torch.stack(turned), seeding.normal(keys, "latent sample", shape).to(x0.device)

    def loss(self, vae: AutoencoderKL, drawn: tuple[Tensor, Tensor], cond: Any, unet_channels: Any) -> Tensor:
        """Mean squared and absolute error and the weighted divergence of each picture, (B,) fp32."""
        pixels, noise = drawn
        posterior: Any = vae.encode(pixels).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
        decoded: Any = vae.decode(posterior.mean + posterior.std * noise)
        error = decoded.sample.float() - pixels
        return (error.square() + 0.05 * error.abs()).mean((1, 2, 3)) + KL_WEIGHT * posterior.kl().float()


class Tokens(ClipConditioner):
    """Keeps a prompt's token ids instead of its embedding, for a text encoder that still learns."""

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Prompts -> {"input_ids": (B, 77)}."""
        return {"input_ids": self.tokenize(prompts)[:, 0]}


class Painter(nn.Module):
    """UNet and text encoder as one network, from token ids to predicted noise."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, x_t: Tensor, t: Tensor, input_ids: Tensor) -> Any:
        return self.unet(x_t, t, encoder_hidden_states=self.text_encoder(input_ids).last_hidden_state)


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer over a vocabulary of bytes and of every word that the drawing programs use, each one token."""
    captions = [describe(invent(np.random.default_rng([9, i])), np.random.default_rng(i)) for i in range(4000)]
    captions += [describe_butterfly(invent_butterfly(np.random.default_rng([9, i]))) for i in range(2000)]
    learned = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learned.pre_tokenizer = pre_tokenizers.Whitespace()
    words = sorted({word for text in [*captions, *UNTOLD] for word in text.replace(",", " ").replace("-", " ").split()})
    learned.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=10_000, end_of_word_suffix="</w>", show_progress=False)
    )
    merges = json.loads(learned.to_str())["model"]["merges"]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    marks = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), *marks]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77, pad_token="<|endoftext|>"
    )


def build(folder: Path, seed: int) -> None:
    """Write the whole pipeline with seeded, untrained weights."""
    tokenizer = make_tokenizer(folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=SIZE // 4,
            block_out_channels=(96, 128),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
            norm_num_groups=16,
        )
        vae = AutoencoderKL(
            block_out_channels=(24, 48, 64),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=SIZE,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=4 * WIDTH,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=77,
                projection_dim=WIDTH,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline(vae, text_encoder, tokenizer, unet, scheduler).save_pretrained(folder)


def pipeline(vae: Any, text_encoder: Any, tokenizer: Any, unet: Any, scheduler: Any) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def train(
    run: Path, network: nn.Module, encoder: Encoder, objective: Any, source: ft.EncodedDataset, *, steps: int,
    batch: int, peak: float, seed: int,
) -> ft.Ema:  # fmt: skip
    """Train `network` for `steps` optimizer steps, from the last checkpoint in `run` if there is one.

    Returns:
        The averaged weights.

    Raises:
        SystemExit: a signal asked for a stop; a checkpoint is kept.
    """
    run.mkdir(parents=True, exist_ok=True)
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    ema = ft.Ema(parameters, max_decay=0.999)
    trainer = ft.Trainer(
        network,
        encoder,
        objective,
        make_optimizer("adamw", parameters.values(), learning_rate=peak, betas=(0.9, 0.99)),
        learning_rate=partial(learning_rate, peak=peak, schedule="cosine", warmup=min(300, steps // 10), total=steps),
        ema=ema,
        seed=seed,
    )
    if last := checkpoint.latest(run):
        trainer.load_state_dict(checkpoint.load(last))
    losses: list[float] = []
    clock = time.perf_counter()
    half = DTYPES[resolve_precision("auto", torch.device("cpu"), small=False)]
    autocast = torch.autocast("cpu", half, enabled=half is not None)  # what it trains stays in fp32
    with catch_signals() as stop, (run / "log.txt").open("a", encoding="utf-8") as log:
        for examples in ft.batches(source, batch_size=batch, steps=steps, seed=seed, start=trainer.steps_done):
            with autocast:  # anew for each step: until it is left, it keeps the rounded weights of its first use
                metrics = trainer.step(examples)
            losses.append(metrics.loss)
            if metrics.step % 200 == 0 or metrics.step == steps or stop.number:
                seconds = time.perf_counter() - clock
                checkpoint.save(run, trainer.state_dict(), keep=1)
                line = f"{run.name} step {metrics.step} of {steps}: loss {np.mean(losses):.4f}, {seconds:.0f} s"
                print(line, file=log, flush=True)
                print(line, flush=True)
                losses, clock = [], time.perf_counter()
            if stop.number:
                raise SystemExit(f"stopped at step {metrics.step} of {steps}; the same command goes on")
    return ema


def save_whole(folder: Path, save: Callable[[Path], Any]) -> None:
    """What `save` writes appears in `folder` whole or not at all."""
    scratch = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    save(scratch)
    flush_tree(scratch)
    scratch.rename(folder)


def write_digests(folder: Path) -> None:
    """Write the SHA-256 of every file, as `sha256sum` does; loading compares them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}" for path in files]
    (folder / DIGESTS).write_text("\n".join(lines) + "\n", encoding="ascii")


def train_vae(work: Path, *, pictures: int, steps: int, seed: int) -> None:
    """Train the VAE of `untrained/`; write the pipeline with it, in fp16, with its scaling factor, to `with-vae/`."""
    model = ft.load_model(work / "untrained")
    assert isinstance(model.encoder, VaeEncoder)
    vae = model.encoder.vae.requires_grad_(True)
    pixels = dataclasses.replace(model, encoder=PixelEncoder(), conditioner=NoCondition())
    source = ft.encode(Drawings(pictures, seed), pixels)
    ema = train(
        work / "vae-run", vae, pixels.encoder, Reconstruction(), source, steps=steps, batch=16, peak=1.5e-3, seed=seed
    )
    with ema.swapped_in():
        vae.half().float()  # measured as it will be shipped
        encoder = VaeEncoder(vae)
        some = next(ft.batches(source, batch_size=512, steps=1, seed=seed))
        x0 = encoder.sample(encoder.encode(pixels.encoder.sample(some.latent_params, some.keys)), some.keys)
        vae.register_to_config(scaling_factor=round(encoder.scaling_factor / x0.std().item(), 4))
        vae.half()
        save_whole(work / "with-vae", model.pipeline().save_pretrained)


def train_unet(work: Path, assets: Path, *, pictures: int, steps: int, seed: int) -> None:
    """Train UNet and text encoder over the VAE of `with-vae/` and write the pipeline, in fp16, to `assets`."""
    model = ft.load_model(work / "with-vae")
    assert isinstance(model.conditioner, ClipConditioner)
    tokenizer, text_encoder = model.conditioner.tokenizer, model.conditioner.text_encoder
    source = ft.encode(
        World(pictures, seed + 1),
        dataclasses.replace(model, conditioner=Tokens(tokenizer, text_encoder)),
        captioning=ft.CaptionAugmentation(dropout=0.1),
        seed=seed,
    )
    painter = Painter(model.unet, text_encoder.requires_grad_(True))
    objective = ft.NoisePrediction(model.scheduler, snr_gamma=5.0)
    ema = train(
        work / "unet-run", painter, model.encoder, objective, source, steps=steps, batch=32, peak=8e-4, seed=seed
    )

    def save(folder: Path) -> None:
        model.pipeline().to(dtype=torch.float16).save_pretrained(folder)
        config = folder / "text_encoder/config.json"  # or transformers computes in fp16 beside a UNet in fp32
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2))
        for name in ("vocab.json", "merges.txt"):  # which older programs read
            shutil.copy(work / "untrained/tokenizer" / name, folder / "tokenizer" / name)
        name_classically(folder / "text_encoder/model.safetensors")
        write_digests(folder)

    with ema.swapped_in():
        save_whole(assets, save)


def name_classically(path: Path) -> None:
    """Name a text encoder's tensors as transformers 4 does (5 reads those too); its own names 4 would read as noise."""
    tensors = {
        name if name.startswith("text_model.") else f"text_model.{name}": t for name, t in load_file(path).items()
    }
    path.write_bytes(save(tensors, {"format": "pt"}))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded model from nothing. The same command goes on.")
    parser.add_argument("--work", type=Path, default=Path("runs/tiny"), help="folder for checkpoints and stages")
    parser.add_argument("--assets", type=Path, default=Path("runs/tiny/trained"), help="folder to write the model to")
    parser.add_argument("--vae_pictures", type=int, default=12_000, help="pictures to draw for the VAE")
    parser.add_argument("--vae_steps", type=int, default=7_000, help="steps of 16 pictures")
    parser.add_argument("--pictures", type=int, default=20_000, help="pictures to draw for the UNet")
    parser.add_argument("--steps", type=int, default=5_500, help="steps of 32 pictures")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    work, seed = options.work, options.seed
    if options.assets.exists():
        parser.error(f"--assets {options.assets} exists: name another folder, or delete it")
    settings = {name: value for name, value in vars(options).items() if name not in ("work", "assets")}
    record = work / "options.json"
    if record.exists() and json.loads(record.read_text()) != settings:
        parser.error(f"--work {work} was begun with other options: {record.read_text()}")
    work.mkdir(parents=True, exist_ok=True)
    write_whole(record, json.dumps(settings))
    if not (work / "untrained").exists():
        save_whole(work / "untrained", partial(build, seed=seed))
    if not (work / "with-vae").exists():
        train_vae(work, pictures=options.vae_pictures, steps=options.vae_steps, seed=seed)
    train_unet(work, options.assets, pictures=options.pictures, steps=options.steps, seed=seed)


if __name__ == "__main__":
    main()
