"""Judge pictures without the model that drew them: what a world picture shows, and how near pictures are to others.

World pictures (examples/draw_world.py) are read by their pixels alone: ground and thing by nearest colour, shape by
overlap with drawn outlines. Butterflies are compared as sets, by an energy distance on fixed features. Those features
see where which colours and edges are, but not shapes: a coloured blob is as near as a butterfly. Shapes are read by a
small network, `ButterflyReader`, that learns from true butterflies what a caption says of view, wings and marks.
"""

import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from draw_butterflies import BACKDROPS, BORDERS, COLOURS, PATTERNS, Butterfly
from draw_butterflies import SHAPES as WINGS
from draw_butterflies import draw as draw_butterfly
from draw_butterflies import invent as invent_butterfly
from draw_world import GROUNDS, INKS, SHAPES, lighter, outline

from finetune.models.encoders import VaeEncoder
from finetune.results.memorization import distances

Array = NDArray[np.floating]

SIDE = 32
"""Pixels of a shape's outline when shapes are compared."""
TURNS = range(-20, 21, 4)
SHADES = (-0.09, -0.06, -0.03, 0.0, 0.03, 0.06, 0.09)


class TrainDataLoader(NamedTuple):
    """What a world picture shows."""

    shape: str
    colour: str
    ground: str


def read(picture: Image.Image) -> TrainDataLoader:
    """Shape, colour and ground of a picture, (H, W) of any size from 32 pixels.

    The ground is the median of a frame of 3 pixels. The thing is what differs from it by more than half as much as
    the most different 3 % do; its colour is the median of what is 2 pixels inside of it, where anything is.
    """
    pixels = np.asarray(picture.convert("RGB"), dtype=float)
    frame = np.ones(pixels.shape[:2], dtype=bool)
    frame[3:-3, 3:-3] = False
    ground = np.median(pixels[frame], axis=0)
    away = np.sqrt(np.square(pixels - ground).sum(-1))
    mask = Image.fromarray((away > max(24.0, np.percentile(away, 97) / 2)).astype(np.uint8) * 255)
    mask = mask.filter(ImageFilter.MedianFilter(3))
    smaller = (np.asarray(mask.filter(ImageFilter.MinFilter(width))) > 0 for width in (5, 3))
    inside = next((area for area in smaller if area.sum() >= 12), np.asarray(mask) > 0)
    colour = np.median(pixels[inside], axis=0) if inside.any() else ground
    inks = {name: COLOURS[name] for name in INKS}
    return TrainDataLoader(_shape(mask), _nearest(colour, inks), _nearest(ground, GROUNDS))


def _nearest(colour: Array, table: Mapping[str, Array]) -> str:
    """The name whose colour, or a lighter or darker shade of it as the world draws them, is nearest."""
    shades = [(lighter(table[name], amount), name) for name in table for amount in SHADES]
    return min(shades, key=lambda shade: float(np.square(colour - shade[0]).sum()))[1]


def _shape(mask: Image.Image) -> str:
    """The shape whose outline, at its best turn, overlaps most with the mask: intersection over union."""
    if mask.getbbox() is None:
        return "nothing"
    seen = _framed(mask)
    names, templates = _templates()
    both = np.minimum(seen, templates).sum((1, 2))
    return names[int(np.argmax(both / np.maximum(seen, templates).sum((1, 2))))]


def _framed(mask: Image.Image) -> Array:
    """The mask's content, centred, its longer side filling SIDE x SIDE, in [0, 1]."""
    left, top, right, bottom = mask.getbbox() or (0, 0, *mask.size)
    half = max(right - left, bottom - top) / 2
    x, y = (left + right) / 2, (top + bottom) / 2
    box = (x - half, y - half, x + half, y + half)
    return np.asarray(mask.transform((SIDE, SIDE), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR)) / 255.0


@lru_cache(maxsize=1)
def _templates() -> tuple[list[str], Array]:
    names, drawn = [], []
    for shape in SHAPES:
        for turn in TURNS:
            mask = Image.new("L", (128, 128))
            for number, polygon in enumerate(outline(shape)):
                points = 64 + 64j + 40 * np.conj(polygon * np.exp(1j * np.pi * turn / 180))
                corners = list(zip(points.real.tolist(), points.imag.tolist(), strict=True))
                ImageDraw.Draw(mask).polygon(corners, fill=0 if number else 255)
            names.append(shape)
            drawn.append(_framed(mask))
    return names, np.stack(drawn)


def energy_distance(a: Array, b: Array) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| over features of two sets (Szekely & Rizzo 2013, eq. 1.1); unbiased.

    0 in expectation for two samples of one distribution; it may then be slightly negative.
    """
    within = [distances(s, s).sum() / (len(s) * (len(s) - 1)) for s in (a, b)]
    return float(2 * distances(a, b).mean() - sum(within))


def copies(generated: Array, training: Array, held_out: Array) -> float:
    """Share of generated pictures nearer to a training picture than 99 % of held-out ones are.

    `held_out` should have gone through the VAE as `generated` did, or the threshold is another picture quality's.
    """
    near = float(np.percentile(distances(held_out, training).min(1), 1))
    return float((distances(generated, training).min(1) < near).mean())


def colour_pair(picture: Image.Image) -> tuple[str, str]:
    """Nearest names of a butterfly's colour (the half of the middle that differs most from the frame) and backdrop."""
    pixels = np.asarray(picture.convert("RGB").resize((64, 64)), dtype=float)
    frame = np.ones((64, 64), dtype=bool)
    frame[4:-4, 4:-4] = False
    ground, middle = np.median(pixels[frame], axis=0), pixels[20:44, 20:44].reshape(-1, 3)
    away = np.sqrt(np.square(middle - ground).sum(-1))
    insect = np.median(middle[away >= np.median(away)], axis=0)
    return _nearest(insect, COLOURS), _nearest(ground, BACKDROPS)


@torch.no_grad()
def through_vae(encoder: VaeEncoder, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """The pictures (sides multiples of 4 pixels) encoded, sampled and decoded: the best that a UNet could draw."""
    decoded = []
    for number, picture in enumerate(pictures):
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
        back = encoder.decode(encoder.sample(encoder.encode(pixels), torch.tensor([number])))[0].clamp(-1, 1)
        decoded.append(Image.fromarray(((back + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()))
    return decoded


def invented(seed: int, count: int, first: int = 0) -> list[Butterfly]:
    """Butterflies `first` to `first + count` of a seed; examples/butterflies is drawn with seed 0."""
    return [invent_butterfly(np.random.default_rng([seed, first + number])) for number in range(count)]


def drawn(butterflies: Sequence[Butterfly]) -> list[Image.Image]:
    """The butterflies as pictures of 64 x 64 pixels, drawn on all cores."""
    with ProcessPoolExecutor() as pool:
        return list(pool.map(partial(draw_butterfly, size=64), butterflies, chunksize=16))


TRAITS: dict[str, tuple[str, ...]] = {
    "view": ("open", "folded"),
    "shape": tuple(WINGS),
    "pattern": tuple(PATTERNS),
    "border": tuple(BORDERS),
}
"""What a caption says of a butterfly beside its colours -> the values that it can have."""


class ButterflyReader(nn.Module):
    """Reads the traits of a butterfly from a grey picture of 64 x 64 pixels; colours it cannot see.

    Args:
        seed: of its initial weights, and of everything random while it learns.
    """

    def __init__(self, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            widths = (1, 32, 64, 96, 128)
            stages = [self._stage(*pair) for pair in pairwise(widths)]
            self.body = nn.Sequential(*stages, nn.Flatten(), nn.Linear(widths[-1] * 16, 128), nn.ReLU())
            self.heads = nn.ModuleDict({trait: nn.Linear(128, len(values)) for trait, values in TRAITS.items()})
        self.source = torch.Generator().manual_seed(seed)

    @staticmethod
    def _stage(before: int, after: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.ReLU())

    def forward(self, grey: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Grey pictures (N, 1, 64, 64) of mean 0 and deviation 1 -> features (N, 128), logits of each trait (N, K)."""
        features = self.body(grey)
        return features, {trait: head(features) for trait, head in self.heads.items()}

    def learn(self, pictures: Sequence[Image.Image], butterflies: Sequence[Butterfly], *, epochs: int = 30) -> None:
        """Learn to read pictures that are true to `butterflies`, mirrored, shifted and noised anew each time."""
        grey = _grey(pictures)
        truth = {trait: torch.tensor([v.index(getattr(b, trait)) for b in butterflies]) for trait, v in TRAITS.items()}
        steps = -(-len(grey) // 64) * epochs
        optimizer = torch.optim.AdamW(self.parameters(), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(grey), generator=self.source).split(64):
                _, logits = self(self._varied(grey[rows]))
                losses = [F.cross_entropy(logits[trait], truth[trait][rows]) for trait in TRAITS]
                torch.stack(losses).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()

    def _varied(self, grey: Tensor) -> Tensor:
        """Half of them mirrored, each shifted by up to 3 pixels and noised by up to a third of its deviation."""
        count = len(grey)
        mirrored = torch.rand(count, generator=self.source) < 0.5
        grey = torch.where(mirrored[:, None, None, None], grey.flip(3), grey)
        down, across = torch.randint(0, 7, (2, count), generator=self.source).tolist()
        padded = F.pad(grey, (3, 3, 3, 3), mode="replicate")
        shifted = [padded[i, :, y : y + 64, x : x + 64] for i, (y, x) in enumerate(zip(down, across, strict=True))]
        strength = torch.rand(count, 1, 1, 1, generator=self.source) / 3
        return torch.stack(shifted) + strength * torch.randn(grey.shape, generator=self.source)

    @torch.no_grad()
    def features(self, pictures: Sequence[Image.Image]) -> Array:
        """(N, 128): what the reader sees in pictures, for an energy distance that knows shapes."""
        return self(_grey(pictures))[0].double().numpy()

    @torch.no_grad()
    def obeyed(self, pictures: Sequence[Image.Image], butterflies: Sequence[Butterfly]) -> dict[str, float]:
        """Trait -> the share of pictures that show it as it is in the butterfly that they were drawn after."""
        logits = self(_grey(pictures))[1]
        seen = {trait: [TRAITS[trait][i] for i in rows.argmax(1).tolist()] for trait, rows in logits.items()}
        pairs = {trait: zip(seen[trait], butterflies, strict=True) for trait in TRAITS}
        return {trait: float(np.mean([s == getattr(b, trait) for s, b in pairs[trait]])) for trait in TRAITS}


def _grey(pictures: Sequence[Image.Image]) -> Tensor:
    """(N, 1, 64, 64), each of mean 0 and standard deviation 1."""
    small = [picture.convert("L").resize((64, 64), Image.Resampling.LANCZOS) for picture in pictures]
    pixels = torch.from_numpy(np.stack([np.asarray(picture, dtype=np.float32) for picture in small]))[:, None]
    deviation, mean = torch.std_mean(pixels, dim=(1, 2, 3), keepdim=True)
    return (pixels - mean) / deviation.clamp(min=1.0)
