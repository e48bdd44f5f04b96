"""Curves as inline SVG: they need no script, and follow the colours of the page around them."""

from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 720, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 10, 26

Point = tuple[float, float]

STYLE = """
text { fill: currentColor; font-size: 12px; } polyline { fill: none; stroke-width: 2; }
.line { stroke: var(--mark); } .faint { stroke: var(--faint); stroke-width: 1; }
.level { stroke: currentColor; stroke-dasharray: 4 4; stroke-width: 1; } .band { fill: var(--mark); opacity: .2; }
"""
"""How curves look, beside the colours --mark and --faint."""


def curve(
    title: str,
    line: Sequence[Point],
    *,
    faint: Sequence[Point] = (),
    band: Sequence[tuple[float, float, float]] = (),
    level: float | None = None,
) -> str:
    """A line over steps.

    Args:
        title: what it shows, for those who cannot see it.
        line: (step, value).
        faint: another line, behind it.
        band: (step, low, high) of an area behind it.
        level: a value that gets a dashed line across.
    """
    steps = [step for step, _ in (*line, *faint)]
    values = [value for _, value in line] + [value for _, low, high in band for value in (low, high)]
    values += [] if level is None else [level]
    values += sorted(value for _, value in faint)[: max(1, 98 * len(faint) // 100)]  # spikes would flatten the rest
    low, high, first, last = min(values), max(values), min(steps), max(steps)

    def place(step: float, value: float) -> str:
        x = _LEFT + (WIDTH - _LEFT - _RIGHT) * (step - first) / ((last - first) or 1)
        y = _TOP + (HEIGHT - _TOP - _BOTTOM) * (high - min(value, high)) / ((high - low) or 1)
        return f"{x:.1f},{y:.1f}"

    def path(points: Sequence[Point], name: str) -> str:
        return f'<polyline class="{name}" points="{" ".join(place(*point) for point in points)}"/>' if points else ""

    area = [place(step, above) for step, _, above in band] + [place(step, below) for step, below, _ in reversed(band)]
    parts = [
        f'<polygon class="band" points="{" ".join(area)}"/>' if band else "",
        path(faint, "faint"),
        path([(first, level), (last, level)], "level") if level is not None else "",
        path(line, "line"),
        *(f'<text x="{_LEFT - 6}" y="{y}" text-anchor="end">{value:.4g}</text>'
          for value, y in ((high, _TOP + 8), (low, HEIGHT - _BOTTOM))),
        *(f'<text x="{x}" y="{HEIGHT - 8}" text-anchor="{anchor}">{step:g}</text>'
          for step, x, anchor in ((first, _LEFT, "start"), (last, WIDTH - _RIGHT, "end"))),
    ]  # fmt: skip
    label = f'role="img" aria-label="{escape(title)}"'
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" {label}><title>{escape(title)}</title>{"".join(parts)}</svg>'


def thinned(points: Sequence[Point], most: int = 600) -> list[Point]:
    """As many points as can be told apart: means of equal stretches."""
    size = -(-len(points) // most)
    stretches = [points[at : at + size] for at in range(0, len(points), size)] if points else []
    return [(sum(x for x, _ in some) / len(some), sum(y for _, y in some) / len(some)) for some in stretches]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """An exponential average that follows each point by a twentieth of the way."""
    found: list[Point] = []
    for point in points:
        follow_up(found, point)
    return found


def follow_up(average: list[Point], point: Point) -> None:
    """Add to such an average what it makes of one more point."""
    step, value = point
    average.append((step, value if not average else average[-1][1] + 0.05 * (value - average[-1][1])))
