"""A training loop of your own, in under 25 lines: a LoRA on a folder of pictures.

    python examples/custom_loop.py --model sd15 --data ./images --prompt "a butterfly" --resolution 512

With no options it trains the embedded model on the drawn butterflies beside this file, in a minute on a laptop.
"""

import argparse
from pathlib import Path

import torch

import finetune as ft

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="tiny")
parser.add_argument("--data", default=str(Path(__file__).parent / "butterflies"))
parser.add_argument("--prompt", default="a butterfly")
parser.add_argument("--resolution", type=int, default=64)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--output", default="output")
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"

model = ft.load_model(args.model).to(device)  # frozen VAE and text encoder
ft.add_lora(model.unet, rank=16)  # leave out to train every weight
images = ft.ImageFolder(args.data, prompt=args.prompt, resolution=args.resolution)
encoded = ft.encode(images, model)  # each picture and caption once
objective = ft.NoisePrediction(model.scheduler, snr_gamma=5.0)
optimizer = torch.optim.AdamW(ft.trainable(model.unet), lr=1e-4)

steps = ft.batches(encoded, batch_size=4, steps=args.steps, seed=0, device=device)
for step, batch in enumerate(steps, start=1):
    x0 = model.encoder.sample(batch.latent_params, batch.keys)  # (B, 4, H/8, W/8)
    noised = objective.sample(x0, batch.keys)  # x_t, t, target
    loss = objective.loss(model.unet, noised, batch.cond)  # (B,)
    ((batch.weight * loss).sum() / batch.weight.sum()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if step % 10 == 0:
        print(f"step {step} of {args.steps}: loss {loss.mean().item():.4f}")

ft.export(model, args.output)  # any diffusers pipeline loads it
print(f'pipeline.load_lora_weights("{args.output}")')
