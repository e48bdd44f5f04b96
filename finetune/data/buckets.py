"""Aspect-ratio buckets: sizes of about the same area, of which each image uses the nearest."""

from dataclasses import dataclass
from functools import cache
from math import log

from finetune.errors import UsageError


@dataclass(frozen=True)
class Buckets:
    """The sizes that pictures may be trained in: sides that are multiples of `step`, area at most that of the square.

    Raises:
        UsageError: no size is possible.
    """

    resolution: int
    """Side of the square whose area no bucket exceeds, in pixels."""
    smallest: int
    """Shortest side of a bucket."""
    largest: int
    """Longest side of a bucket."""
    step: int
    """Sides are multiples of this."""
    upscale: bool = False
    """Enlarge pictures that are smaller than their bucket, instead of training them in a smaller one."""

    def __post_init__(self) -> None:
        if self.step < 1 or not self.sizes():
            raise UsageError(
                f"no bucket with sides from {self.smallest} to {self.largest} in steps of {self.step} has an area of "
                f"at most {self.resolution} x {self.resolution}: give another min_bucket_reso, max_bucket_reso or "
                "bucket_reso_steps"
            )

    @cache  # noqa: B019 # of as many small tables as there are runs in a process
    def sizes(self) -> list[tuple[int, int]]:
        """Width and height of every bucket that is as large as the area allows, from tall to wide."""
        most = self.resolution**2
        first, last = -(-self.smallest // self.step), self.largest // self.step
        sides = [self.step * number for number in range(max(1, first), last + 1)]
        wide = [(side, max((s for s in sides if s * side <= most), default=0)) for side in sides]
        sizes = {size for width, height in wide if height for size in ((width, height), (height, width))}
        return sorted(sizes, key=lambda size: size[0] / size[1])

    @cache  # noqa: B019 # many pictures are of few sizes
    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the bucket of a picture: that of the nearest shape, by the ratio's logarithm.

        Where the picture would have to be enlarged for it, and may not, a smaller one: one side as long as the picture
        allows, the other so that the shape is nearest. No side is shorter than `smallest`, even so.
        """
        bucket = min(self.sizes(), key=lambda size: (_distance(size, (width, height)), -size[0] * size[1]))
        if self.upscale or (bucket[0] <= width and bucket[1] <= height):
            return bucket
        long, tall = self._below(width, width), self._below(height, height)
        wide = long, self._below(round(long * height / width / self.step) * self.step, height)
        high = self._below(round(tall * width / height / self.step) * self.step, width), tall
        return min((wide, high), key=lambda size: (_distance(size, (width, height)), -size[0] * size[1]))

    def _below(self, side: int, most: int) -> int:
        """A side of a bucket that is at most `side` and `most`, where `smallest` allows it."""
        low = -(-self.smallest // self.step) * self.step
        return min(max(low, min(side, most) // self.step * self.step), self.largest // self.step * self.step)


def _distance(a: tuple[int, int], b: tuple[int, int]) -> float:
    """How far two shapes are apart: |log of the quotient of their ratios|."""
    return abs(log(a[0] * b[1] / (a[1] * b[0])))
