"""The Hugging Face tutorial "Train a diffusion model" with this package: butterflies out of nothing but noise.

    python examples/ddpm_butterflies.py                                                # the tutorial's, on one GPU
    python examples/ddpm_butterflies.py --data examples/butterflies --resolution 32    # a trial, on a laptop, offline

The pictures come the tutorial's own way, a `datasets` transform and a plain `DataLoader`, to show that any loader can
feed `ft.Trainer`. `finetune-unet --model ddpm --data huggan/smithsonian_butterflies_subset --resolution 128
--resize_mode squash --random_flip` is the same recipe as one command, which also resumes.

https://huggingface.co/docs/diffusers/tutorials/basic_training
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from datasets import load_dataset
from torch.utils.data import DataLoader
from torchvision import transforms
from tqdm.auto import tqdm

import finetune as ft
from finetune.training.learning_rate import learning_rate

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", default="huggan/smithsonian_butterflies_subset", help="a dataset id or a local folder")
parser.add_argument("--resolution", type=int, default=128)
parser.add_argument("--batch_size", type=int, default=16)
parser.add_argument("--epochs", type=int, default=50)
parser.add_argument("--save_image_epochs", type=int, default=10)
parser.add_argument("--num_inference_steps", type=int, default=50)
parser.add_argument("--output", default="ddpm-butterflies")
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)  # this loader shuffles and flips with torch's global generator; all else is drawn by key

preprocess = transforms.Compose(
    [
        transforms.Resize((args.resolution, args.resolution)),  # both sides at once: it squashes, and crops nothing
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize([0.5], [0.5]),  # [0, 1] -> [-1, 1], where the noise is at home
    ]
)
dataset = load_dataset(args.data, split="train")
dataset.set_transform(lambda rows: {"images": [preprocess(image.convert("RGB")) for image in rows["image"]]})
loader = DataLoader(dataset, batch_size=args.batch_size, shuffle=True)  # pyright: ignore[reportArgumentType] # map-style

model = ft.load_model("ddpm", resolution=args.resolution).to(device)  # above 64 px the tutorial's own UNet
total = args.epochs * len(loader)
warmup = min(500, total // 6)  # 500 for the tutorial's 1000 pictures; a small folder would else end on its way up
trainer = ft.Trainer(
    model.unet,
    model.encoder,
    ft.NoisePrediction(model.scheduler),
    torch.optim.AdamW(model.unet.parameters(), lr=1e-4),
    learning_rate=partial(learning_rate, peak=1e-4, schedule="cosine", warmup=warmup, total=total),
    precision=torch.float16 if device == "cuda" else None,
)

for epoch in range(1, args.epochs + 1):
    steps = []
    for batch in tqdm(loader, f"epoch {epoch} of {args.epochs}", leave=False):
        steps.append(trainer.step(ft.as_batch(model, batch["images"], seed=0, step=trainer.steps_done)))
    loss = sum(step.loss for step in steps) / len(steps)
    print(f"epoch {epoch} of {args.epochs}: loss {loss:.4f}, learning rate {steps[-1].lr:.1e}")
    if epoch % args.save_image_epochs == 0 or epoch == args.epochs:
        pictures = ft.draw_pictures(
            model, [""], range(16), resolution=args.resolution, num_inference_steps=args.num_inference_steps
        )
        samples = Path(args.output) / "samples"
        samples.mkdir(parents=True, exist_ok=True)
        ft.grid(pictures, [""], title=f"epoch {epoch}").save(samples / f"{epoch:04}.png")

with trainer.export_weights():
    ft.export(model, args.output)
print(f'DDPMPipeline.from_pretrained("{args.output}")')
