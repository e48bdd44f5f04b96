"""draw_pictures: prompts -> images through the diffusers pipeline, and grids of them."""

# diffusers annotates its own methods narrower than what they take and give.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from diffusers import AutoPipelineForImage2Image, DDPMPipeline
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn
from tqdm import tqdm

from finetune.atomic_io import write_whole
from finetune.batch import as_input
from finetune.deprecation import renamed_arguments
from finetune.models.image_condition import ConditionImages
from finetune.models.loading import DiffusionModel
from finetune.results.text_drawing import fitting, write

MARGIN = 8
"""Pixels between the pictures of a grid."""
READABLE = 160
"""Pixels that a picture in a grid is wide at least: smaller ones are enlarged."""
_SHOWS = "finetune"
_FIRST = "first"
"""Entries of a PNG: what it shows; and left, top, right and bottom of a grid's first picture."""


class Start(NamedTuple):
    """A picture from which an ordinary model begins, instead of from noise alone."""

    picture: Image.Image
    """RGB, of a size that the model takes."""
    strength: float
    """How much of the picture's noise schedule is gone through, from 0 (none: the picture itself) to 1 (all)."""


@renamed_arguments(hole="condition", at_once="batch_size")
@torch.no_grad()
def draw_pictures(
    model: DiffusionModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    resolution: int | tuple[int, int],
    num_inference_steps: int,
    guidance_scale: float = 7.5,
    negative_prompt: str = "",
    batch_size: int = 1,
    condition: ConditionImages | None = None,
    begin_with: Start | None = None,
) -> list[list[Image.Image]]:
    """Pictures for each prompt (outer) and seed (inner), the UNet in eval mode.

    A seed starts `torch.Generator().manual_seed(seed)` on the CPU, so the same seed gives the same starting noise on
    every device, and in a plain pipeline call.

    Args:
        model: on the device where it should run.
        prompts: ignored in pixel mode but for their number, which is then 1.
        seeds: one picture each.
        resolution: pixels per side, or width and height; a pixel-space model has its own, and takes no notice.
        num_inference_steps: steps of the model's own sampler; in pixel mode as a rule DDPM's (Ho et al. 2020, algorithm
            2), which shows far earlier than a deterministic one what a model has learned.
        guidance_scale: classifier-free guidance, 1 is none; latent mode only.
        negative_prompt: what guidance leads away from.
        at_once: pictures of a prompt that are drawn as one batch: quicker, but rounded otherwise than one by one.
        condition: what a model with an image condition is shown, such as the hole that it paints; None: nothing.
        begin_with: for other latent models: a picture to draw over (Meng et al. 2021, algorithm 1).
    """
    model.to(model.unet.device)  # `encode` has sent the frozen parts to the CPU
    model.unet.eval()
    pipeline = model.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    if isinstance(pipeline, DDPMPipeline):
        with _spoken_to_in_full(model.unet), _progress(model.unet, num_inference_steps):
            sources = [torch.Generator().manual_seed(seed) for seed in seeds]
            drawn = pipeline(batch_size=len(seeds), generator=sources, num_inference_steps=num_inference_steps)
            return [drawn.images]
    width, height = (resolution, resolution) if isinstance(resolution, int) else resolution
    draw, size = cast(Any, pipeline), {"height": height, "width": width}
    if model.image_condition is not None:
        size = model.image_condition.pipeline_arguments(condition, width=width, height=height)
    elif begin_with:
        draw = cast(Any, AutoPipelineForImage2Image.from_pipe(pipeline))
        draw.set_progress_bar_config(disable=True)
        size = {"image": begin_with.picture, "strength": begin_with.strength}
    batches = [seeds[start : start + batch_size] for start in range(0, len(seeds), batch_size)]
    rows = []
    with _progress(model.unet, num_inference_steps * len(batches) * len(prompts)):
        for prompt in prompts:
            encoded = model.conditioner.pipeline_arguments(prompt, negative_prompt)
            row: list[Image.Image] = []
            for some in batches:
                with _spoken_to_in_full(model.unet):
                    row += draw(
                        **encoded,
                        num_images_per_prompt=len(some),
                        generator=[torch.Generator().manual_seed(seed) for seed in some],
                        num_inference_steps=num_inference_steps,
                        guidance_scale=guidance_scale,
                        **size,
                    ).images
            rows.append(row)
    return rows


@contextmanager
def _progress(unet: nn.Module, steps: int) -> Iterator[None]:
    """A bar that counts the UNet's answers, for drawing that takes long; none without a terminal."""
    with tqdm(total=steps, desc="drawing", unit="step", delay=3, leave=False, disable=None) as bar:
        counting = unet.register_forward_hook(lambda *_: bar.update() and None)
        try:
            yield
        finally:
            counting.remove()


@contextmanager
def _spoken_to_in_full(unet: Any) -> Iterator[None]:
    """Make the UNet take and return fp32 whatever its dtype: guidance magnifies rounding errors."""
    dtype = next(unet.parameters()).dtype  # of its first layer, where `unet.dtype` would see an adapter's
    if dtype == torch.float32:
        yield
        return
    plain = unet.forward

    def forward(sample: Tensor, timestep: Tensor, return_dict: bool = True, **options: Any) -> Any:
        answer = plain(sample.to(dtype), timestep, return_dict=True, **as_input(options, dtype))
        answer.sample = answer.sample.float()
        return answer if return_dict else (answer.sample,)

    unet.forward = forward
    try:
        yield
    finally:
        del unet.forward


def grid(rows: Sequence[Sequence[Image.Image]], labels: Sequence[str], title: str = "") -> Image.Image:
    """One picture of all: a row of pictures for each label, the label above it.

    A single unlabelled row is folded into a square. Small pictures are enlarged, so that labels fit above them.
    """
    if len(rows) == 1 and not any(labels):
        side = max(1, round(len(rows[0]) ** 0.5))
        rows = [rows[0][start : start + side] for start in range(0, len(rows[0]), side)]
        labels = [""] * len(rows)
    larger = -(-READABLE // min(READABLE, rows[0][0].width))
    cell_width, cell_height = (side * larger for side in rows[0][0].size)
    letters = min(20, cell_width // 12)
    columns = max(len(row) for row in rows)
    width = MARGIN + columns * (cell_width + MARGIN)
    line = letters + 2 * MARGIN
    strip = line if any(labels) else MARGIN
    top = line if title else 0
    sheet = Image.new("RGB", (width, top + len(rows) * (cell_height + strip) + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    if title:
        write(draw, (MARGIN, MARGIN), title, letters, "black")
    for number, (row, label) in enumerate(zip(rows, labels, strict=True)):
        y = top + number * (cell_height + strip)
        write(draw, (MARGIN, y + MARGIN // 2), fitting(label, letters, width - 2 * MARGIN), letters, "black")
        for column, picture in enumerate(row):
            enlarged = picture.resize((cell_width, cell_height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (MARGIN + column * (cell_width + MARGIN), y + strip))
    y = top + strip
    sheet.info[_FIRST] = f"{MARGIN} {y} {MARGIN + cell_width} {y + cell_height}"
    return sheet


def first_picture(path: Path) -> Image.Image | None:
    """The first picture of a saved grid; None where there is no grid."""
    if not path.exists():
        return None
    with Image.open(path) as sheet:
        box = sheet.info.get(_FIRST)
        return None if box is None else sheet.crop([int(side) for side in box.split()])


def grid_pictures(path: Path, number: int, side: int) -> list[Image.Image]:
    """Return the pictures of a saved grid, row by row, as they were before `grid` enlarged them.

    Args:
        path: of the grid; where there is none, there are no pictures.
        number: of its pictures, in rows of one length; a last row may be shorter.
        side: width of a picture before it was enlarged.
    """
    if not path.exists():
        return []
    with Image.open(path) as file:
        sheet = file.convert("RGB")
        left, top, right, bottom = map(int, file.info[_FIRST].split())
    width, height = right - left, bottom - top
    columns = (sheet.width - MARGIN) // (width + MARGIN)
    rows = -(-number // columns)
    strip = (sheet.height - MARGIN - top - rows * height) // max(1, rows - 1)
    size = side, height * side // width
    pictures = []
    for place in range(number):
        x, y = left + place % columns * (width + MARGIN), top + place // columns * (height + strip)
        pictures.append(sheet.crop((x, y, x + width, y + height)).resize(size, Image.Resampling.NEAREST))
    return pictures


def side_by_side(before: Path, after: Path, to: Path) -> None:
    """Lay the first and the last grid of a run beside each other in one picture."""
    left, right = Image.open(before).convert("RGB"), Image.open(after).convert("RGB")
    sheet = Image.new("RGB", (left.width + MARGIN + right.width, max(left.height, right.height)), "black")
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width + MARGIN, 0))
    save_picture(sheet, to)


def save_picture(picture: Image.Image, path: Path, *, shows: str = "") -> None:
    """Write a PNG, whole or not at all; `shows` says what it is a picture of, for `already_shows`."""
    content, note = io.BytesIO(), PngInfo()
    for name, text in ((_SHOWS, shows), (_FIRST, picture.info.get(_FIRST))):
        if text:
            note.add_text(name, text)
    picture.save(content, format="PNG", pnginfo=note)
    write_whole(path, content.getvalue())


def already_shows(path: Path, shows: str) -> bool:
    """Whether `save_picture` has written this very picture there before."""
    if not path.exists():
        return False
    with Image.open(path) as picture:
        return picture.info.get(_SHOWS) == shows
