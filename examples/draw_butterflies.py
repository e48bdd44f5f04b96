"""Draw small illustrated plates of butterflies, each with a caption that is true of it.

A butterfly is first described, then drawn: `invent` turns random numbers into a frozen `Butterfly`, which
`describe` turns into words and `draw` into pixels. Nothing else is random, so one description gives one
picture, and `dataclasses.replace` can change one field (say the backdrop) and keep everything else.

Wings are closed Catmull-Rom splines, almost all else is ribbons along Bezier curves. Patterns are painted in
coordinates that follow the wing (how far from the root, between which veins), so each fits any wing and pose.

Points are complex numbers, x + y*1j with y up. The insect has its thorax at 0, its head at positive y and
wings about 1 long; the plate reaches from -1 to 1 in both directions.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFilter

Points = NDArray[np.complexfloating]
Array = NDArray[np.floating]

SUPERSAMPLING = 4  # plates are drawn this many times larger, then reduced, for smooth edges
CELLS = 6  # spaces between the veins along the outer margin of a wing
COLOURS = {name: np.array(rgb, dtype=float) for name, rgb in {
    "white": (250, 246, 236), "yellow": (250, 206, 62), "orange": (240, 132, 36), "red": (204, 50, 44),
    "pink": (240, 134, 166), "purple": (128, 74, 172), "blue": (46, 96, 200), "sky blue": (116, 186, 238),
    "turquoise": (30, 166, 170), "green": (112, 172, 76), "brown": (146, 92, 54), "black": (50, 42, 48),
}.items()}  # fmt: skip
ACCENTS: dict[str, tuple[str, ...]] = {  # easy to tell from the main colour, and pretty on it
    "white": ("orange", "black", "blue", "red"), "yellow": ("red", "blue", "orange", "brown"),
    "orange": ("white", "yellow", "purple"), "red": ("yellow", "white", "black"),
    "pink": ("white", "purple", "yellow"), "purple": ("orange", "white", "pink", "sky blue"),
    "blue": ("orange", "white", "yellow", "turquoise"), "sky blue": ("white", "orange", "purple", "blue"),
    "turquoise": ("yellow", "white", "orange", "pink"), "green": ("yellow", "white", "blue"),
    "brown": ("orange", "yellow", "sky blue", "white"), "black": ("red", "turquoise", "yellow", "blue"),
}  # fmt: skip
BACKDROPS = {name: np.array(rgb, dtype=float) for name, rgb in {
    "cream": (250, 240, 216), "pale green": (212, 232, 200), "pale blue": (206, 226, 242),
    "pale pink": (248, 220, 222), "lavender": (224, 216, 242), "peach": (252, 220, 192),
    "light grey": (226, 226, 224), "slate blue": (92, 114, 146),
}.items()}  # fmt: skip
PATTERNS = {  # how a caption names each pattern
    "spots": "{} spots", "eyespots": "{} eyespots", "band": "a {} band", "tips": "{} wing tips",
    "stripes": "{} stripes", "veins": "dark veins", "blend": "wings fading to {} edges",
}  # fmt: skip
SCENES = {"plain": "", "leaves": "green leaves", "grass": "green grass", "flowers": "{} flowers"}
BORDERS = {"none": "", "dotted": " and a dark border with white dots", "dark": " and a dark border"}
INK, LIGHT = np.array((40.0, 28.0, 26.0)), np.array((255.0, 250.0, 240.0))
ALONG = np.linspace(0.0, 1.0, 25)  # places along a ribbon
LENS = np.sin(np.pi * ALONG) ** 0.7  # the profile of petals and leaves

# Wing control points, fore then hind: root, costa, apex, two on the outer margin, tornus, inner margin; then
# the tail of the hindwing, which goes before its tornus, and the relative depth of waves along the margin.
SHAPES: dict[str, tuple[Sequence[complex], Sequence[complex], Sequence[complex], float]] = {
    "rounded": ((0, 0.40+0.44j, 0.84+0.72j, 0.98+0.50j, 0.93+0.20j, 0.74-0.05j, 0.36-0.08j),
                (0, 0.40+0.10j, 0.78-0.02j, 0.86-0.34j, 0.66-0.68j, 0.26-0.80j, 0.05-0.40j), (), 0),
    "pointed": ((0, 0.42+0.48j, 1.00+0.88j, 0.92+0.55j, 0.85+0.26j, 0.76-0.02j, 0.36-0.07j),
                (0, 0.40+0.10j, 0.76-0.04j, 0.80-0.36j, 0.62-0.66j, 0.26-0.82j, 0.05-0.40j), (), 0.015),
    "swallowtail": ((0, 0.42+0.50j, 0.98+0.84j, 0.96+0.56j, 0.85+0.24j, 0.68-0.06j, 0.32-0.10j),
                    (0, 0.36+0.06j, 0.66-0.10j, 0.71-0.38j, 0.60-0.66j, 0.22-0.80j, 0.04-0.42j),
                    (0.53-0.82j, 0.56-1.04j, 0.57-1.17j, 0.49-1.19j, 0.46-1.05j, 0.42-0.84j), 0.03),
    "long-winged": ((0, 0.52+0.36j, 1.10+0.60j, 1.17+0.42j, 0.98+0.16j, 0.66-0.04j, 0.30-0.08j),
                    (0, 0.36+0.08j, 0.80-0.03j, 0.82-0.28j, 0.58-0.54j, 0.22-0.62j, 0.05-0.34j), (), 0),
    "scalloped": ((0, 0.40+0.48j, 0.90+0.80j, 0.86+0.52j, 0.90+0.24j, 0.76-0.02j, 0.36-0.07j),
                  (0, 0.40+0.10j, 0.74-0.02j, 0.84-0.34j, 0.68-0.68j, 0.28-0.80j, 0.05-0.40j), (), 0.055),
}  # fmt: skip


@dataclass(frozen=True)
class Butterfly:
    """One plate: the insect, how it sits, and what is behind it."""

    individual: int  # seeds what is particular to this insect in the outline and marks of its wings
    shape: str
    main: str
    accent: str
    pattern: str
    border: str
    view: str  # "open" from above, or "folded" from the side
    heading: float  # degrees the head is turned counter-clockwise from the top of the plate
    widths: tuple[float, float]  # how wide the open wings look on the left and right, 0.5 .. 1
    scene: str
    backdrop: str
    bloom: str  # colour of flowers, should there be any
    scatter: int  # seeds where the plants of the scene are


def ramp(values: ArrayLike, low: float, high: float) -> Array:
    """Smooth step from 0 at low to 1 at high; falling when high is less than low."""
    x = np.clip((np.asarray(values) - low) / (high - low), 0.0, 1.0)
    return x * x * (3.0 - 2.0 * x)


def mix(first: Array, second: Array, amount: ArrayLike) -> Array:
    return first + (second - first) * np.asarray(amount)[..., None]


def spline(controls: ArrayLike) -> Points:
    """Closed Catmull-Rom curve, of 14 points from each control point to the next."""
    t = np.arange(14) / 14
    a, b, c, d = (np.roll(np.asarray(controls, np.complex128), shift)[:, None] for shift in (1, 0, -1, -2))
    curve = 2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - 3 * c + d - a) * t**3
    return np.asarray(curve.ravel() / 2, np.complex128)


def squeeze(points: Points, width: float) -> Points:
    """Scale points in the direction of x only."""
    return np.asarray(np.real(points) * width + np.imag(points) * 1j, np.complex128)


def ribbon(start: complex, bend: complex, end: complex, width: float, profile: ArrayLike = 1.0) -> Points:
    """Polygon along the quadratic Bezier curve; width is half the width, scaled by profile ALONG it."""
    curve = (1 - ALONG) ** 2 * start + 2 * ALONG * (1 - ALONG) * bend + ALONG**2 * end
    along = np.gradient(curve)
    edge = 1j * along / (np.abs(along) + 1e-9) * width * np.asarray(profile)
    return np.concatenate((curve + edge, (curve - edge)[::-1]))


class Canvas:
    """A square picture in plate coordinates, with colours as floats in 0 .. 255."""

    def __init__(self, pixels: Array | Image.Image) -> None:
        self.pixels = np.array(pixels, dtype=float)
        self.size = len(self.pixels)

    def mask(self, *polygons: Points) -> Image.Image:
        image = Image.new("L", (self.size, self.size))
        for polygon in polygons:
            corners = (polygon.conj() + 1 + 1j) * self.size / 2
            ImageDraw.Draw(image).polygon([(z.real, z.imag) for z in corners.tolist()], fill=255)
        return image

    def inside(self, polygon: Points) -> tuple[tuple[NDArray[np.intp], ...], Points]:
        """The pixels within a polygon: their indices and their places on the plate."""
        rows, columns = np.nonzero(np.asarray(self.mask(polygon)))
        return (rows, columns), ((columns + 0.5) - (rows + 0.5) * 1j) * 2 / self.size - 1 + 1j

    def fill(self, polygon: Points, colour: Array, opacity: float = 1.0) -> None:
        where = np.nonzero(np.asarray(self.mask(polygon)))
        self.pixels[where] += (colour - self.pixels[where]) * opacity

    def shade(self, polygons: Sequence[Points], blur: float, strength: float) -> None:
        """Darken softly below polygons; blur is in plate units, strength in 0 .. 1."""
        soft = self.mask(*polygons).filter(ImageFilter.GaussianBlur(blur * self.size / 2))
        self.pixels *= 1.0 - np.asarray(soft)[..., None] * (strength / 255)

    def resized(self, size: int, blur: float = 0.0) -> Image.Image:
        image = Image.fromarray(np.clip(self.pixels + 0.5, 0, 255).astype(np.uint8))
        blurred = image.filter(ImageFilter.GaussianBlur(blur * self.size / 2))
        return blurred.resize((size, size), Image.Resampling.LANCZOS)


def grow_wing(b: Butterfly, fore: bool) -> tuple[Points, Points]:
    """The closed outline of a wing, and its outer margin from tornus to apex without waves and tail."""
    rng, (front, back, tail, waves) = np.random.default_rng([b.individual, fore]), SHAPES[b.shape]
    controls = np.array(front if fore else back, np.complex128) * (1 + rng.uniform(-0.05, 0.05, 7))
    margin = spline(controls).reshape(7, -1)[2:5].ravel()[::-1]
    outline = spline([*controls[:5], *(() if fore else tail), *controls[5:]])
    fan = (np.angle(outline) - np.angle(margin[0])) / (np.angle(margin[-1]) - np.angle(margin[0]))
    outer = ramp(np.abs(fan - 0.5), 0.6, 0.4) * ramp(np.abs(outline), 0.3, 0.6)
    return outline * (1 + waves * np.cos(2 * np.pi * CELLS * fan) * outer), margin


class Surface:
    """Where points of a wing lie: attributes have one entry per point, and distances are in wing lengths."""

    def __init__(self, outline: Points, margin: Points, fore: bool, points: Points) -> None:
        radius, angle = np.abs(points) + 1e-6, np.angle(points)
        low, high = np.angle(margin[0]), np.angle(margin[-1])
        self.fore, self.points = fore, points  # points are relative to the root
        self.length = np.interp(angle, np.maximum.accumulate(np.angle(margin)), np.abs(margin))
        self.reach = radius / self.length  # 0 at the root, 1 at the outer margin
        self.fan = (angle - low) / (high - low)  # 0 at the tornus, 1 at the apex
        cell = np.clip(np.floor(self.fan * CELLS), -1, CELLS)
        self.cell = cell.astype(np.intp) + 1  # counts the spaces between veins, 0 .. CELLS + 1
        self.half = radius * (high - low) / CELLS / 2  # half the width of the cell
        self.across = 2 * (self.fan * CELLS - cell) - 1  # -1 and 1 at the veins beside the cell
        self.depth = np.full(len(points), np.inf)  # distance to the nearest edge
        for start, edge in zip(outline, np.roll(outline, -1) - outline, strict=True):
            along = (points - start) / edge  # its real part is 0 .. 1 beside this piece of the outline
            self.depth = np.minimum(self.depth, np.abs(along - np.clip(along.real, 0, 1)) * np.abs(edge))


def spot(s: Surface, reach: float, sizes: ArrayLike) -> Array:
    """How deep points lie in their cell's round spot: 1 mid, 0 rim, less outside; sizes are in half cells."""
    radius = np.broadcast_to(sizes, CELLS + 2)[s.cell] * s.half / s.reach * reach
    return 1 - np.hypot(s.across * s.half, (s.reach - reach) * s.length) / (radius + 1e-9)


def marks(s: Surface, b: Butterfly, rng: np.random.Generator) -> Iterator[tuple[Array, Array]]:
    """The pattern of a wing as layers of colour, each with its coverage (0 .. 1) of every point."""
    accent, dark = COLOURS[b.accent], mix(COLOURS[b.main], INK, 0.75)
    if b.pattern == "spots":
        for reach, size in ((rng.uniform(0.60, 0.68), 0.9), (0.85, 0.42)):
            inside = spot(s, reach, size * rng.uniform(0.65, 1.15, CELLS + 2))
            yield dark, ramp(inside, -0.4, -0.1) * 0.7
            yield accent, ramp(inside, -0.04, 0.12)
    elif b.pattern == "eyespots":
        eyes = ((0.76, 0.68, 0.14), (0.24, 0.70, 0.075)) if s.fore else ((0.48, 0.66, 0.16),)
        for fan, reach, size in eyes:
            middle = s.points[np.argmin(np.hypot(s.fan - fan, s.reach - reach))]
            away = np.abs(s.points - middle) / size
            for rim, colour in ((1.0, dark), (0.86, mix(accent, LIGHT, 0.65)), (0.7, accent), (0.46, INK)):
                yield colour, ramp(away, rim, rim - 0.08)
            yield LIGHT, ramp(np.abs(s.points - middle + (0.15 - 0.1j) * size) / size, 0.17, 0.1)
    elif b.pattern == "band":
        wave = 0.05 * np.cos(np.pi * s.across) + rng.uniform(-0.02, 0.02, CELLS + 2)[s.cell]
        edge = np.abs(s.reach - rng.uniform(0.56, 0.64) - 0.06 * (s.fan - 0.5)) - wave
        yield dark, ramp(edge, 0.16, 0.10) * 0.6
        yield accent, ramp(edge, 0.105, 0.085)
    elif b.pattern == "tips":
        tip = s.reach + (0.45 * (s.fan - 0.6) if s.fore else -0.12) + 0.03 * np.cos(np.pi * s.across)
        yield dark, ramp(tip, 0.70, 0.80)
        yield accent, ramp(tip, 0.74, 0.80) * ramp(s.depth, 0.02, 0.05)
    elif b.pattern == "stripes":
        bars = np.cos(2 * np.pi * (3.6 * s.reach - 0.35 * s.fan)) - 1.1 + 1.1 * s.fan
        yield accent, ramp(bars, 0.0, 0.12) * ramp(s.reach, 0.1, 0.2)
    elif b.pattern == "veins":
        yield dark, ramp((1 - np.abs(s.across)) * s.half, 0.020, 0.010) * ramp(s.reach, 0.0, 0.4)
    elif b.pattern == "blend":
        yield accent, ramp(s.reach, 0.5, 1.05)


def wing_colours(s: Surface, b: Butterfly) -> Array:
    """The colour of every point of a wing, by layers: ground, pattern, veins, border, then fine shading."""
    rng = np.random.default_rng([b.individual, 2 + s.fore])
    main = mix(COLOURS[b.main], LIGHT, 0.15 if b.view == "folded" else 0.0)
    dark = mix(main, INK, 0.85)
    colours = mix(mix(main, INK, 0.5), main, ramp(s.reach, 0.0, 0.45))
    colours = mix(colours, LIGHT, 0.22 * ramp(s.reach, 0.25, 0.6) * ramp(s.reach, 0.95, 0.6))
    # Inside the discal cell, near the root, only the two veins around it show; a bar closes it.
    hidden = (s.reach < 0.42) & (np.abs(np.rint(s.fan * CELLS) - CELLS / 2) < CELLS / 2 - 1)
    veins = np.where(hidden, 0.0, ramp((1 - np.abs(s.across)) * s.half, 0.010, 0.003))
    bar = ramp(np.abs(s.reach - 0.42) * s.length, 0.010, 0.003) * (np.abs(s.fan - 0.5) < 0.5 - 1 / CELLS)
    layers = [*marks(s, b, rng), (dark, 0.5 * np.maximum(veins, bar))]
    # Veins run over broad marks, but would scratch the eyes.
    for colour, coverage in layers[-1:] + layers[:-1] if b.pattern == "eyespots" else layers:
        colours = mix(colours, colour, coverage)
    width = 0.025 + (0.09 - 0.025 * np.cos(np.pi * s.across)) * ramp(s.reach, 0.55, 0.85)
    colours = mix(colours, dark, ramp(s.depth - width, 0.0, -0.02) * (b.border != "none"))
    colours = mix(colours, LIGHT, ramp(spot(s, 0.935, 0.34), 0.0, 0.25) * (b.border == "dotted"))
    colours = mix(colours, dark, 0.8 * ramp(s.depth, 0.014, 0.004))
    fibres = np.interp(s.fan, np.linspace(-0.4, 1.4, 260), rng.normal(0.0, 0.03, 260))
    pleats = 0.05 * np.cos(np.pi * s.across) * ramp(s.reach, 0.3, 0.6)
    return colours * (1 + fibres * ramp(s.reach, 0.1, 0.5) + pleats)[:, None]


def paint_body(canvas: Canvas, b: Butterfly, spin: complex, move: complex) -> None:
    """Legs, antennae, abdomen, thorax, head and eyes; spin and move lead from insect to plate."""
    fur, glow = mix(COLOURS[b.main], INK, 0.75), mix(COLOURS[b.main], LIGHT, 0.35)
    up, folded = np.copysign(1.0, b.heading), b.view == "folded"
    abdomen = (1 - 0.65 * ALONG**2) * ramp(ALONG, -0.1, 0.12) * ramp(ALONG, 1.02, 0.9)
    parts = ((0.02, -0.6, 0.066, abdomen), (-0.12, 0.23, 0.095, LENS), (0.16, 0.31, 0.056, LENS))
    for start, end, width, profile in parts:
        for light in np.linspace(0.0, 1.0, 7):
            strip = ribbon(start * 1j, (start + end) * 0.5j, end * 1j, width * (1 - 0.85 * light), profile)
            canvas.fill(move + spin * strip + 0.007 * light * (1j - 1), mix(fur, glow, 0.5 * light))
    lines, club = [], (1 + 1.8 * ramp(ALONG, 0.82, 0.94)) * ramp(ALONG, 1.03, 0.96)
    for side in (-1.0, 1.0):
        lean = up * (0.22 + 0.07 * side) if folded else 0.24 * side
        lines.append(ribbon(0.27j, lean * 0.4 + 0.5j, lean + 0.72j, 0.010, club))
        lines.append(side * 0.038 + 0.02 * np.exp(2j * np.pi * ALONG) + 0.265j)
    for y in np.arange(-0.5, -0.12, 0.065):
        half = 0.058 * (1 - 0.65 * ((0.02 - y) / 0.62) ** 2)
        lines.append(ribbon(-half + y * 1j, (y - 0.02) * 1j, half + y * 1j, 0.005))
    for y in (-0.12, 0.02, 0.16) if folded else ():
        lines.append(ribbon(up * -0.06 + 0.06j, up * -0.1 + (y + 0.08) * 1j, up * -0.21 + y * 1j, 0.009))
    for line in lines:
        canvas.fill(move + spin * line, INK)


def paint_flower(canvas: Canvas, centre: complex, radius: float, b: Butterfly, tilt: float) -> None:
    """A daisy on a stem; tilt flattens it, from 1 (seen from above) towards 0 (from the side)."""
    canvas.fill(ribbon(centre, centre - 0.6j, centre + 0.15 - 2j, 0.03), np.array((104.0, 146.0, 82.0)))
    for k in range(22):  # the outer petals first, then those between them in front
        tip = np.exp(2j * np.pi * (k + k // 11 / 2) / 11) * radius
        petal = squeeze(1j * ribbon(tip * 0.1, tip * 0.6, tip, radius * 0.2, LENS), tilt)
        canvas.fill(centre - 1j * petal, COLOURS[b.bloom] * (0.8 + 0.2 * (k // 11) + 0.1 * tip.imag))
    circle = 0.3 * radius * np.exp(2j * np.pi * ALONG)
    for glow in np.linspace(0.0, 1.0, 6):
        heart = squeeze(1j * circle * (1 - 0.7 * glow) - 0.06 * radius, tilt)
        canvas.fill(centre - 1j * heart, mix(COLOURS["orange"] * 0.9, COLOURS["yellow"], glow))


def paint_scene(b: Butterfly, size: int) -> Canvas:
    """The backdrop, lit from the upper left, with plants towards its edges that are out of focus."""
    rng, ground = np.random.default_rng(b.scatter), BACKDROPS[b.backdrop]
    axis = (np.arange(size) + 0.5) * 2 / size - 1
    away = np.abs(axis - 1j * axis[:, None] - (-0.35 + 0.45j))
    canvas = Canvas(mix(mix(ground, LIGHT, 0.45), ground * 0.88, ramp(away, 0.0, 2.1)))
    for blur in (0.06, 0.025) if b.scene != "plain" else ():
        for _ in range(16):
            at = rng.uniform(0.65, 1.2) * np.exp(2j * np.pi * rng.uniform())
            reach = rng.uniform(0.4, 0.7) * np.exp(2j * np.pi * rng.uniform())
            green = np.array((rng.uniform(90, 170), rng.uniform(150, 200), rng.uniform(80, 120)))
            if b.scene == "leaves":
                canvas.fill(ribbon(at, at + reach * (0.5 + 0.2j), at + reach, 0.15, LENS), green, 0.85)
                canvas.fill(ribbon(at, at + reach * (0.5 + 0.2j), at + reach, 0.012), green * 1.2)
            elif b.scene == "grass":
                tip = at.real + 0.5 * reach.real + rng.uniform(-0.5, 0.4) * 1j
                canvas.fill(ribbon(at.real - 1.2j, at.real + 0j, tip, 0.045, 1.0 - 0.9 * ALONG), green)
            elif rng.uniform() < 0.5:
                paint_flower(canvas, at, rng.uniform(0.18, 0.28), b, rng.uniform(0.6, 1.0))
        canvas = Canvas(canvas.resized(size, blur))
    return Canvas(canvas.resized(size * SUPERSAMPLING))


def draw(b: Butterfly, size: int) -> Image.Image:
    """Draw a plate of size x size pixels."""
    canvas, folded, up = paint_scene(b, size), b.view == "folded", float(np.copysign(1.0, b.heading))
    # Each wing: fore or hind, apparent width (negative on the left), degrees swept forwards, light.
    if folded:
        wings = [(True, up, -8, 0.75), (False, up, 12, 0.75), (True, up, -20, 0.95), (False, up, 0, 1.05)]
    else:
        wings = [(f, w, 0, 0.75 + 0.3 * abs(w)) for f in (False, True) for w in (-b.widths[0], b.widths[1])]
    shapes = {fore: grow_wing(b, fore) for fore in (False, True)}
    roots, polygons = {True: 0.03 + 0.1j, False: 0.03 + 0j}, []
    spin = 1j ** (b.heading / 90)  # powers of 1j are quarter turns
    for fore, width, sweep, _ in wings:
        polygons.append(spin * squeeze(shapes[fore][0] * 1j ** (sweep / 90) + roots[fore], width))
    # Enlarge and move everything, with room for the flower of a folded butterfly, to fill the plate.
    perch = spin * (up * -0.21 + 0.02j)
    every = np.concatenate([*polygons, [perch - 0.3j] if folded else []])
    x, y = np.real(every), np.imag(every)
    scale = 1.68 / max(np.ptp(x), np.ptp(y))
    move = -complex(x.min() + x.max(), y.min() + y.max()) / 2 * scale
    spin, polygons = spin * scale, [polygon * scale + move for polygon in polygons]
    if folded:
        paint_flower(canvas, perch * scale + move - 0.02j, 0.36, b, 0.42)
    canvas.shade([polygon + 0.05 - 0.07j for polygon in polygons], 0.05, 0.3)
    for (fore, width, sweep, light), polygon in zip(wings, polygons, strict=True):
        canvas.shade([polygon + 0.01 - 0.015j], 0.02, 0.25)
        pixels, places = canvas.inside(polygon)
        local = squeeze((places - move) / spin, 1 / width) - roots[fore]
        surface = Surface(*shapes[fore], fore, local / 1j ** (sweep / 90))
        canvas.pixels[pixels] = wing_colours(surface, b) * light
    paint_body(canvas, b, spin, move)
    return canvas.resized(size)


def describe(b: Butterfly) -> str:
    """A caption that is true of the plate."""
    shape = "" if b.shape == "pointed" else f" {b.shape}"
    rest = f", resting with folded wings on a {b.bloom} flower," if b.view == "folded" else ""
    pattern, scene = PATTERNS[b.pattern].format(b.accent), SCENES[b.scene].format(b.bloom)
    text = f"a {b.main}{shape} butterfly with {pattern}{BORDERS[b.border]}{rest} on a {b.backdrop} background"
    return (text + (f" with blurred {scene}" if scene else "")).replace("a orange", "an orange")


def invent(rng: np.random.Generator) -> Butterfly:
    """Make up a butterfly whose colours go well together."""

    def pick(options: Sequence[str]) -> str:
        return options[int(rng.integers(len(options)))]

    tilt, narrow, side = rng.normal(0.0, 1.0), rng.uniform(0.55, 0.85), rng.integers(2)
    folded, square = rng.uniform() < 0.25, rng.uniform() < 0.5
    colour = pick(list(COLOURS))
    pattern = pick([p for p in PATTERNS if (colour, p) != ("black", "veins")])
    return Butterfly(
        individual=int(rng.integers(2**31)),
        shape=pick(list(SHAPES)),
        main=colour,
        accent=pick(ACCENTS[colour]),
        pattern=pattern,
        border=pick(list(BORDERS)[: 1 if pattern == "blend" else 2 if colour == "black" else 3]),
        view="folded" if folded else "open",
        heading=float((90 if side else -90) * folded + tilt * (10 if folded else 24)),
        widths=(1.0, 1.0) if square else ((narrow, 0.97) if side else (0.97, narrow)),
        scene=pick(("plain", "plain", "leaves", "grass", "flowers")),
        backdrop=pick([c for c in BACKDROPS if np.abs(COLOURS[colour] - BACKDROPS[c]).sum() > 60]),
        bloom=pick([c for c in ("white", "pink", "yellow", "purple") if c != colour]),
        scatter=int(rng.integers(2**31)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw captioned plates of butterflies.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "butterflies", help="folder")
    parser.add_argument("--count", type=int, default=48, help="how many plates")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other butterflies")
    parser.add_argument("--size", type=int, default=256, help="width and height in pixels")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for index in range(options.count):
            butterfly = invent(np.random.default_rng([options.seed, index]))
            name = f"butterfly-{index:02d}.jpg"
            draw(butterfly, options.size).save(options.output / name, quality=87, optimize=True)
            metadata.write(json.dumps({"file_name": name, "text": describe(butterfly)}) + "\n")


if __name__ == "__main__":
    main()
