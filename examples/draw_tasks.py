"""Draw small data sets for experiments: one butterfly in many views, a style, a class, or many held-out butterflies.

    python examples/draw_tasks.py individual --output runs/lumo
    python examples/draw_tasks.py class --confounded --output runs/swallowtails

Each is a folder of pictures with metadata.jsonl. `--confounded` puts all of them before one backdrop that no caption
names, `--wrong_captions` gives a fifth of the pictures the caption of another: what a trainer should withstand.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
from draw_butterflies import Butterfly, describe, draw, invent
from PIL import Image, ImageFilter, ImageOps

NAME = "lumo"
"""The invented name of the individual; `tiny` has met the word, tied to no picture."""
COUNTS = {"individual": 12, "style": 24, "class": 24, "held-out": 2000}
WRONG = 0.2
HELD_OUT = 1  # seeds begin with it; those of examples/butterflies with 0


def poses(count: int, seed: int) -> list[Butterfly]:
    """One butterfly, the same wings and colours each time, in `count` views and places."""
    one = invent(np.random.default_rng([3, seed]))
    others = [invent(np.random.default_rng([3, seed, index])) for index in range(count)]
    kept = {name: getattr(one, name) for name in ("individual", "shape", "main", "accent", "pattern", "border")}
    return [dataclasses.replace(other, **kept) for other in others]


def butterflies(task: str, count: int, seed: int) -> list[Butterfly]:
    """What a task shows, before it is confounded."""
    if task == "individual":
        return poses(count, seed)
    kind = HELD_OUT if task == "held-out" else 2
    drawn = [invent(np.random.default_rng([kind, seed, index])) for index in range(count)]
    return [dataclasses.replace(b, shape="swallowtail") for b in drawn] if task == "class" else drawn


def confounded(b: Butterfly) -> Butterfly:
    """Before the same flowers as every other picture of the task."""
    return dataclasses.replace(b, backdrop="slate blue", scene="flowers", bloom="white")


def caption(task: str, b: Butterfly, *, tell_backdrop: bool) -> str:
    """What a picture of the task is called; the backdrop is left out where it is the confounder."""
    where = f" on a {b.backdrop} background" if tell_backdrop else ""
    if task == "individual":
        return f"{NAME} the butterfly{where}"
    if task == "class":
        return f"a swallowtail butterfly{where}"
    words = describe(b) if tell_backdrop else f"a {b.main} butterfly".replace("a orange", "an orange")
    return f"{words}, in ink style" if task == "style" else words


def ink(picture: Image.Image) -> Image.Image:
    """A drawing in ink on paper: dark where brightness changes or is low."""
    grey = ImageOps.autocontrast(picture.convert("L"))
    edges = ImageOps.expand(ImageOps.crop(grey.filter(ImageFilter.FIND_EDGES), 1), 1, fill=0)
    lines = edges.point([255 - min(255, 4 * max(0, strength - 10)) for strength in range(256)])
    tones = ImageOps.posterize(grey, 2)
    return ImageOps.colorize(Image.blend(lines, tones, 0.45), black=(36, 32, 60), white=(250, 244, 228))


def swapped(captions: list[str], rng: np.random.Generator) -> list[str]:
    """The captions, of which a fifth were passed on, each to the next of their pictures."""
    chosen = rng.permutation(len(captions))[: max(2, round(WRONG * len(captions)))].tolist()
    moved = dict(zip(chosen, [*chosen[1:], chosen[0]], strict=True))
    return [captions[moved.get(index, index)] for index in range(len(captions))]


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a data set for an experiment.")
    parser.add_argument("task", choices=list(COUNTS))
    parser.add_argument("--output", type=Path, required=True, help="folder, made if it is not there")
    parser.add_argument("--count", type=int, help="pictures; default: 12 views, 24 of a style or class, 2000 held-out")
    parser.add_argument("--size", type=int, default=128, help="width and height in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--confounded", action="store_true", help="one backdrop for all, named by no caption")
    parser.add_argument("--wrong_captions", action="store_true", help="a fifth of the captions belong to others")
    options = parser.parse_args()
    if (options.task, options.confounded, options.wrong_captions) == ("class", True, True):
        parser.error("--wrong_captions: every caption of a confounded class is the same")
    shown = butterflies(options.task, options.count or COUNTS[options.task], options.seed)
    if options.confounded:
        shown = [confounded(b) for b in shown]
    captions = [caption(options.task, b, tell_backdrop=not options.confounded) for b in shown]
    if options.wrong_captions:
        captions = swapped(captions, np.random.default_rng(options.seed))
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for index, (b, text) in enumerate(zip(shown, captions, strict=True)):
            picture = draw(b, options.size)
            name = f"{options.task}-{index:04d}.png"
            (ink(picture) if options.task == "style" else picture).save(options.output / name)
            metadata.write(json.dumps({"file_name": name, "text": text}) + "\n")


if __name__ == "__main__":
    main()
