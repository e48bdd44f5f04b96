"""Curves as inline SVG, without scripts, in the colours of the page."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple, TypeVar

WIDTH, HEIGHT = 720, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 10, 26

Point = tuple[float, float]
_T = TypeVar("_T")

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
    steps: tuple[float, float] | None = None,
) -> str:
    """A line over steps.

    Args:
        title: what it shows, for those who cannot see it.
        line: (step, value).
        faint: another line, behind it.
        band: (step, low, high) of an area behind it.
        level: a value that gets a dashed line across.
        steps: the first and the last step of the axis. Default: those of the lines.
    """
    first, last = steps or (min(at := [step for step, _ in (*line, *faint)]), max(at))
    values = [value for _, value in line] + [value for _, low, high in band for value in (low, high)]
    values += [] if level is None else [level]
    values += sorted(value for _, value in faint)[: max(1, 98 * len(faint) // 100)]  # spikes would flatten the rest
    low, high = min(values), max(values)

    def place(step: float, value: float) -> str:
        x = _LEFT + (WIDTH - _LEFT - _RIGHT) * (step - first) / ((last - first) or 1)
        y = _TOP + (HEIGHT - _TOP - _BOTTOM) * (high - min(value, high)) / ((high - low) or 1)
        return f"{x:.1f},{y:.1f}"

    def path(points: Sequence[Point], name: str) -> str:
        return f'<polyline class="{name}" points="{" ".join(place(*point) for point in points)}"/>' if points else ""

    area = [place(step, above) for step, _, above in band] + [place(step, below) for step, below, _ in reversed(band)]
    elements = [
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
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" {label}><title>{escape(title)}</title>{"".join(elements)}</svg>'


class LossCurve:
    """The loss of each step and its exponential average, in at most `MOST` points, however long the run is.

    Each point stands for the mean of `stride` steps. When there are too many points, neighbours are merged in pairs and
    `stride` doubles. The average follows each loss by a twentieth of the way.
    """

    MOST = 600

    def __init__(self, points: Iterable[Point] = ()) -> None:
        self.stride = 1
        self._points: list[_Mean] = []
        for point in points:
            self.add(*point)

    def add(self, step: float, loss: float) -> None:
        """Add the loss of one more step."""
        before = self.last_average
        average = loss if before is None else before + 0.05 * (loss - before)
        new = _Mean(1, step, step, loss, average)
        if self._points and self._points[-1].number < self.stride:
            self._points[-1] = self._points[-1].merged(new)
        else:
            self._points.append(new)
        if len(self._points) > self.MOST:
            pairs = zip(self._points[::2], [*self._points[1::2], None], strict=False)
            self._points = [first if second is None else first.merged(second) for first, second in pairs]
            self.stride *= 2

    def cut(self, step: float) -> None:
        """Drop the points that hold a later step."""
        while self._points and self._points[-1].last > step:
            self._points.pop()

    @property
    def losses(self) -> list[Point]:
        """(mean step, mean loss) of each point."""
        return [(point.steps / point.number, point.losses / point.number) for point in self._points]

    @property
    def averages(self) -> list[Point]:
        """(last step, exponential average there) of each point."""
        return [(point.last, point.average) for point in self._points]

    @property
    def last_average(self) -> float | None:
        """The exponential average after the last step; None before the first."""
        return self._points[-1].average if self._points else None

    @property
    def last_step(self) -> float | None:
        """The last step; None before the first."""
        return self._points[-1].last if self._points else None


class _Mean(NamedTuple):
    """Sums over neighbouring steps."""

    number: int
    last: float
    steps: float
    losses: float
    average: float

    def merged(self, later: "_Mean") -> "_Mean":
        """Both as one point."""
        steps, losses = self.steps + later.steps, self.losses + later.losses
        return _Mean(self.number + later.number, later.last, steps, losses, later.average)


def spread(items: Sequence[_T], most: int = LossCurve.MOST) -> list[_T]:
    """At most `most` items, evenly chosen, the last one among them."""
    every = -(-len(items) // most) or 1
    return list(items[::-1][::every][::-1])
