"""Draw the small world that the embedded model `tiny` knows: one thing on a plain ground, with a true caption.

Things lie at three distances from butterflies: shapes (far), plants (in the middle), insects (near). As in
draw_butterflies.py a picture is first described, then drawn: `invent` makes a frozen `Scene` from random numbers,
`describe` says it in words, `draw` paints it. `scribble` draws pictures of nothing in particular, for a VAE that must
carry more than this world.

Points are complex numbers, x + y*1j with y up; a thing is about 1 in radius, the picture reaches from -1 to 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from draw_butterflies import COLOURS, INK, LIGHT, Array, mix, ribbon, spline, squeeze
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

Polygon = NDArray[Any]  # its corners

SUPERSAMPLING = 4
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "heart", "crescent")
PLANTS = ("flower", "tulip", "leaf", "tree", "mushroom")
INSECTS = ("moth", "bee", "dragonfly", "ladybird")
THINGS = (*SHAPES, *PLANTS, *INSECTS)
INKS = ("red", "orange", "yellow", "green", "turquoise", "blue", "purple", "pink", "brown", "black", "white")
GROUNDS = {name: COLOURS[name] for name in ("red", "yellow", "green", "blue", "purple", "brown", "black", "white")} | {
    "cream": np.array((250.0, 236.0, 206.0)), "pale green": np.array((206.0, 234.0, 190.0)),
    "pale blue": np.array((196.0, 224.0, 246.0)), "pale pink": np.array((250.0, 210.0, 218.0)),
}  # fmt: skip
STYLES = {"flat": "", "outlined": ", outlined", "shaded": ", shaded"}  # how a caption says each
SIZES = {"small ": 0.42, "": 0.6, "large ": 0.8}  # radius of a thing in plate units, by how a caption says it
UNTOLD = ("butterfly", "sks", "lumo", "pilu", "zarn", "velo")
"""Words without a picture: they stand in captions for any thing, so that a text encoder has met them."""

CIRCLE = np.exp(2j * np.pi * np.arange(48) / 48)
LENS = np.sin(np.pi * np.linspace(0.0, 1.0, 25)) ** 0.8  # the profile of petals and leaves


@dataclass(frozen=True)
class Scene:
    """One picture of the world."""

    thing: str
    colour: str
    ground: str
    style: str
    size: str
    turn: float  # degrees counter-clockwise
    centre: complex
    shift: tuple[float, float]  # how much lighter (positive) or darker thing and ground are than their colours
    detail: int  # seeds what is particular to this one


def held_out(thing: str, colour: str) -> bool:
    """True for the pairs of shape and colour, one in nine, that captioned training never shows together."""
    return thing in SHAPES and (SHAPES.index(thing) + 4 * INKS.index(colour)) % 9 == 0


def near(colour: str, ground: str) -> bool:
    """True where a thing could not be told from its ground."""
    return bool(np.abs(COLOURS[colour] - GROUNDS[ground]).sum() < 110)


def invent(rng: np.random.Generator, *, unseen: bool = False) -> Scene:
    """Make up a picture; `unseen`: one whose shape and colour are held out from training, drawn plainly."""

    def pick(options: Sequence[str]) -> str:
        return options[int(rng.integers(len(options)))]

    things = SHAPES if unseen else (SHAPES, PLANTS, INSECTS)[int(rng.choice(3, p=(0.5, 0.22, 0.28)))]
    pairs = [(t, c) for t in things for c in INKS if held_out(t, c) == unseen]
    thing, colour = pairs[int(rng.integers(len(pairs)))]
    radius = 0.45 * rng.uniform(-1, 1, 2)
    size = "" if unseen else pick(list(SIZES))
    room = 1 - SIZES[size]
    return Scene(
        thing=thing,
        colour=colour,
        ground=pick([ground for ground in GROUNDS if not near(colour, ground)]),
        style="flat" if unseen else pick(list(STYLES)),
        size=size,
        turn=float(rng.uniform(-14, 14) if thing not in INSECTS else rng.uniform(-30, 30)),
        centre=complex(radius[0] * room, radius[1] * room),
        shift=(float(rng.normal(0, 0.03)), float(rng.normal(0, 0.03))),
        detail=int(rng.integers(2**31)),
    )


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """A true caption, of one of several lengths; now and then a word without a picture stands for the thing."""
    thing = scene.thing if rng.uniform() > 0.06 else UNTOLD[int(rng.integers(len(UNTOLD)))]
    text = f"a {scene.size if rng.uniform() < 0.6 else ''}{scene.colour if rng.uniform() < 0.93 else ''} {thing}"
    if rng.uniform() < 0.9:
        text += f" on a {scene.ground} background"
    text += STYLES[scene.style] if rng.uniform() < 0.7 else ""
    return with_articles(" ".join(text.split()))


def with_articles(text: str) -> str:
    """ "a orange" -> "an orange"."""
    return text.replace("a orange", "an orange").replace("a outlined", "an outlined")


class Sketch:
    """A picture under way: polygons of colour, drawn large, reduced at the end."""

    def __init__(self, ground: Image.Image, style: str) -> None:
        self.image, self.style, self.scale = ground, style, ground.width / 2
        self.place: Callable[[Polygon], Polygon] = np.asarray

    def corners(self, polygon: Polygon) -> list[tuple[float, float]]:
        placed = (np.conj(self.place(polygon)) + 1 + 1j) * self.scale
        return list(zip(placed.real.tolist(), placed.imag.tolist(), strict=True))

    def fill(self, polygon: Polygon, colour: Array, *holes: Polygon) -> None:
        """Paint a polygon in the scene's style, leaving out the holes."""
        area, corners = Image.new("L", self.image.size), self.corners(polygon)
        ImageDraw.Draw(area).polygon(corners, fill=255)
        for hole in holes:
            ImageDraw.Draw(area).polygon(self.corners(hole), fill=0)
        self.image.paste(self._paint(colour, corners), (0, 0), area)
        if self.style == "outlined":
            pen = ImageDraw.Draw(self.image)
            for line in (corners, *map(self.corners, holes)):
                pen.line([*line, line[0]], fill=tint(INK), width=round(self.scale * 0.045), joint="curve")

    def _paint(self, colour: Array, corners: list[tuple[float, float]]) -> Image.Image | tuple[int, int, int]:
        if self.style != "shaded":
            return tint(colour)
        x, y = (sum(axis) / len(corners) for axis in zip(*corners, strict=True))
        light = Image.radial_gradient("L")  # 0 in the middle, 255 towards the corners
        reach = round(self.scale * 2)
        light = light.resize((reach, reach))
        whole = Image.new("L", self.image.size, 255)
        whole.paste(light, (round(x - reach * 0.62), round(y - reach * 0.62)))
        bright, dark = (Image.new("RGB", self.image.size, tint(c)) for c in (mix(colour, LIGHT, 0.25), colour * 0.72))
        return Image.composite(dark, bright, whole)


def tint(colour: Array) -> tuple[int, int, int]:
    red, green, blue = np.clip(colour + 0.5, 0, 255).astype(int).tolist()
    return red, green, blue


def lighter(colour: Array, amount: float) -> Array:
    """Mixed with white, or with black where `amount` is negative."""
    return mix(colour, LIGHT if amount > 0 else INK, np.abs(amount))


def slope(degrees: float, size: int) -> Image.Image:
    """A square that goes from black at the top to white at the bottom, turned counter-clockwise."""
    return Image.linear_gradient("L").rotate(degrees).crop((48, 48, 208, 208)).resize((size, size))


def plain_ground(colour: Array, size: int) -> Image.Image:
    """A square of one colour, a little lighter at the upper left."""
    ramp = slope(30.0, size)
    low, high = (Image.new("RGB", (size, size), tint(lighter(colour, amount))) for amount in (0.06, -0.03))
    return Image.composite(high, low, ramp)


def outline(shape: str) -> tuple[Polygon, ...]:
    """The outline of a shape, about 1 in radius, and its holes."""
    corners = {"square": 4, "triangle": 3}
    if shape in corners:
        turn = {"square": 0.25, "triangle": 0.5}[shape] * np.pi
        count = corners[shape]
        return (np.exp(1j * (2 * np.pi * np.arange(count) / count + turn)) * 1.08,)
    if shape == "star":
        return (np.exp(1j * np.pi * (np.arange(10) / 5 + 0.5)) * np.where(np.arange(10) % 2, 0.45, 1.1),)
    if shape == "ring":
        return CIRCLE, CIRCLE * 0.52
    if shape == "cross":
        arm = np.array((1 + 0.32j, 0.32 + 0.32j, 0.32 + 1j))
        return (np.concatenate([arm, *((np.conj(arm[::-1]) * -1, -arm, np.conj(arm[::-1])))]),)
    if shape == "diamond":
        return (np.array((0.68, 1.1j, -0.68, -1.1j)),)
    if shape == "heart":
        t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return ((16 * np.sin(t) ** 3 + 1j * (y + 2)) / 16,)
    if shape == "crescent":
        angle = np.linspace(0.25 * np.pi, 1.75 * np.pi, 40)
        outer = np.exp(1j * angle)
        inner = 0.42 + 0.78 * np.exp(1j * np.linspace(1.69 * np.pi, 0.31 * np.pi, 40))
        return (np.concatenate([outer, inner]) + 0.2,)
    return (CIRCLE,)


def petal(tip: complex, width: float, start: complex = 0j) -> Polygon:
    return ribbon(start, (start + tip) / 2, tip, width, LENS)


def paint_plant(sketch: Sketch, plant: str, colour: Array, rng: np.random.Generator) -> None:
    stem, wood = np.array((86.0, 132.0, 66.0)), np.array((112.0, 78.0, 52.0))
    if plant == "flower":
        petals = int(rng.integers(5, 9))
        for tip in np.exp(2j * np.pi * (np.arange(petals) / petals + rng.uniform())):
            sketch.fill(petal(tip, 1.7 / petals), colour)
        sketch.fill(CIRCLE * 0.27, COLOURS["white" if colour is COLOURS["yellow"] else "yellow"])
    elif plant == "tulip":
        sketch.fill(ribbon(0j, -0.05 - 0.5j, -1.1j, 0.07), stem)
        sketch.fill(petal(0.75 - 0.15j, 0.12, -0.9j), stem)
        for tip in (-0.5 + 1j, 0.5 + 1j, 1.1j):
            sketch.fill(petal(tip, 0.36, -0.1j), colour)
    elif plant == "leaf":
        sketch.fill(petal(-0.9 + 0.9j, 0.62, 0.75 - 0.75j), colour)
        sketch.fill(ribbon(1 - 1j, 0.1j, -0.7 + 0.7j, 0.04), lighter(colour, -0.5))
    elif plant == "tree":
        sketch.fill(np.array((-0.16 - 1.1j, 0.16 - 1.1j, 0.12, -0.12)), wood)
        for centre in (-0.4 + 0.15j, 0.4 + 0.2j, 0.05 + 0.6j):
            sketch.fill(centre + CIRCLE * rng.uniform(0.46, 0.56), colour)
    else:
        sketch.fill(np.array((-0.26 - 1j, 0.26 - 1j, 0.2 + 0.1j, -0.2 + 0.1j)), GROUNDS["cream"])
        sketch.fill(spline((-1, -0.6 + 0.75j, 0.6 + 0.75j, 1, -0.1j)), colour)
        for spot in (-0.45 + 0.28j, 0.05 + 0.6j, 0.5 + 0.25j):
            sketch.fill(spot + CIRCLE * 0.13, lighter(colour, 0.75))


def paint_insect(sketch: Sketch, insect: str, colour: Array, rng: np.random.Generator) -> None:
    glass, ink = np.array((214.0, 226.0, 232.0)), INK * 1.2
    dark = lighter(colour, -0.55)
    for side in (-1, 1):
        sketch.fill(ribbon(0.5j, 0.3 * side + 0.9j, 0.5 * side + 1j, 0.035), ink)
        if insect == "moth":  # blunt triangles swept back, without a waist between fore and hind wing
            sketch.fill(np.array((0.3j, side * 0.55 - 0.75j, side * 0.1 - 0.7j)), lighter(colour, 0.35))
            sketch.fill(np.array((0.45j, side * 1.05 - 0.35j, side * 0.85 - 0.65j, -0.2j)), colour)
            sketch.fill(side * 0.55 - 0.22j + CIRCLE * rng.uniform(0.09, 0.15), dark)
        elif insect in ("bee", "dragonfly"):
            for lift, reach in ((0.35, 1.0), (-0.1, 0.85)):
                wide = 0.2 if insect == "bee" else 0.1
                tip = side * reach + (lift + 0.1) * 1j if insect == "dragonfly" else side * reach * 0.85 + lift * 1.6j
                sketch.fill(petal(tip, wide, lift * 0.5j), glass)
    if insect == "moth":
        sketch.fill(squeeze(CIRCLE, 0.3) * 0.5 - 0.1j, dark)
    elif insect == "bee":
        sketch.fill(squeeze(CIRCLE, 0.62) * 0.68 - 0.2j, colour)
        for y in (0.05, -0.28, -0.6):
            half = 0.4 * np.sqrt(max(0.0, 1 - ((y + 0.2) / 0.68) ** 2))
            sketch.fill(np.array((-half + y * 1j, half + y * 1j, half + (y - 0.14) * 1j, -half + (y - 0.14) * 1j)), ink)
        sketch.fill(CIRCLE * 0.24 + 0.5j, ink)
    elif insect == "dragonfly":
        sketch.fill(ribbon(0.5j, -0.2j, -1.1j, 0.1), colour)
        sketch.fill(CIRCLE * 0.2 + 0.55j, colour)
    else:
        sketch.fill(CIRCLE * 0.28 + 0.6j, ink)
        sketch.fill(squeeze(CIRCLE, 0.9) * 0.78 - 0.1j, colour)
        sketch.fill(ribbon(0.6j, -0.1j, -0.85j, 0.035), ink)
        for spot in (0.36 + 0.2j, 0.42 - 0.3j):
            for side in (spot, -np.conj(spot)):
                sketch.fill(side + CIRCLE * 0.13, ink)


def draw(scene: Scene, size: int) -> Image.Image:
    """Paint a picture of size x size pixels."""
    ground = plain_ground(lighter(GROUNDS[scene.ground], scene.shift[1]), size * SUPERSAMPLING)
    sketch = Sketch(ground, scene.style)
    spin = SIZES[scene.size] * np.exp(1j * np.pi * scene.turn / 180)
    sketch.place = lambda points: np.asarray(points) * spin + scene.centre
    colour, rng = lighter(COLOURS[scene.colour], scene.shift[0]), np.random.default_rng(scene.detail)
    if scene.thing in SHAPES:
        edge, *holes = outline(scene.thing)
        sketch.fill(edge, colour, *holes)
    else:
        (paint_plant if scene.thing in PLANTS else paint_insect)(sketch, scene.thing, colour, rng)
    return sketch.image.reduce(SUPERSAMPLING)


def scribble(rng: np.random.Generator, size: int) -> Image.Image:
    """A picture of nothing in particular: blots, lines, stripes, fans and dots, the first of them out of focus."""
    large = size * SUPERSAMPLING
    one, other = (Image.new("RGB", (large, large), tint(any_colour(rng))) for _ in range(2))
    sketch = Sketch(Image.composite(one, other, slope(float(rng.uniform(0, 360)), large)), "flat")
    for _ in range(int(rng.integers(0, 9))):
        doodle(sketch, rng)
    blur = 0.04 * large * float(rng.uniform(-1, 1))
    sketch.image = sketch.image.filter(ImageFilter.BoxBlur(max(0.0, blur)))
    for _ in range(int(rng.integers(1, 10))):
        doodle(sketch, rng)
    return ImageChops.offset(sketch.image, int(rng.integers(large))).reduce(SUPERSAMPLING)


def any_colour(rng: np.random.Generator) -> Array:
    return lighter(rng.uniform(0, 255, 3), rng.uniform(-0.7, 0.7) * rng.integers(2))


def doodle(sketch: Sketch, rng: np.random.Generator) -> None:
    """Add one kind of mark to a scribble."""
    sketch.style = str(rng.choice(list(STYLES), p=(0.5, 0.2, 0.3)))
    at, reach, colour = complex(*rng.uniform(-1, 1, 2)), rng.uniform(0.08, 0.7), any_colour(rng)
    turn, gap = np.exp(2j * np.pi * rng.uniform()), rng.uniform(0.06, 0.25)
    kind = rng.integers(6)
    if kind == 0:
        knots = CIRCLE[:: int(rng.integers(5, 12))]
        sketch.fill(at + reach * spline(knots * rng.uniform(0.4, 1.2, len(knots))), colour)
    elif kind == 1:
        bend = complex(*rng.uniform(-1, 1, 2))
        sketch.fill(ribbon(at, bend, at + 2 * reach * turn, rng.uniform(0.008, 0.1)), colour)
    elif kind == 2:
        sketch.fill(at + reach * turn * np.array((1, 1j, -1, -1j))[: int(rng.integers(3, 5))], colour)
    elif kind == 3:
        bar = 1j * np.array((-3, 3, 3, -3)) + np.array((0, 0, 0.5, 0.5))
        for step in range(int(rng.integers(3, 8))):
            sketch.fill(at + turn * gap * (step + bar), colour)
    elif kind == 4:
        for spoke in np.exp(1j * np.linspace(0, rng.uniform(0.5, 2), int(rng.integers(4, 10)))):
            sketch.fill(ribbon(at, at + reach * turn * spoke * 0.5, at + reach * turn * spoke, 0.012), colour)
    else:
        for x, y in np.ndindex(*rng.integers(2, 5, 2).tolist()):
            sketch.fill(at + turn * gap * complex(x, y) + gap * rng.uniform(0.2, 0.4) * CIRCLE, colour)
