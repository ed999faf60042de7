"""One measured quantity over a size: made monotone, interpolated and extrapolated as physics allows."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Curve", "LinkFit", "fit_link"]


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds over a size (rows of a micro-batch, or bytes), both ascending.

    More work never takes less time: a point above a later one was disturbed (a cold start, waiting for the host) and
    is left out. Between points the curve is straight. Below the first it goes on straight, but never below the first
    point's time per unit, since a device is not more efficient on less work; above the last it has the last two
    points' slope, where the efficiency has saturated.
    """

    sizes: tuple[float, ...]
    seconds: tuple[float, ...]

    @classmethod
    def through(cls, points: Mapping[float, float]) -> Curve:
        """The curve through measured points {size: seconds}, disturbed ones left out. At least one is needed."""
        sizes = sorted(points)
        kept = [
            (size, points[size])
            for n, size in enumerate(sizes)
            if all(points[size] <= points[later] for later in sizes[n + 1 :])
        ]
        return cls(tuple(size for size, _ in kept), tuple(seconds for _, seconds in kept))

    @property
    def best_rate(self) -> float:
        """Least seconds per unit of all points: what the device itself needs when launches do not hold it up."""
        return min(seconds / size for size, seconds in zip(self.sizes, self.seconds, strict=True))

    def slowed(self, size: float, slow_down: float) -> float:
        """Seconds at `size` on a device that works `slow_down` times as long: what the host's launches take stays."""
        seconds = self.at(size)
        return seconds + (slow_down - 1) * min(seconds, self.best_rate * size)

    def at(self, size: float) -> float:
        """Seconds at `size`, never negative."""
        sizes, seconds = self.sizes, self.seconds
        if len(sizes) == 1:
            return seconds[0] * max(1.0, size / sizes[0]) if size >= sizes[0] else seconds[0]
        place = min(max(bisect_left(sizes, size), 1), len(sizes) - 1)
        left, right = place - 1, place
        slope = (seconds[right] - seconds[left]) / (sizes[right] - sizes[left])
        straight = seconds[left] + slope * (size - sizes[left])
        if size < sizes[0]:
            return max(straight, seconds[0] * size / sizes[0])
        return straight


@dataclass(frozen=True, slots=True)
class LinkFit:
    """Seconds of a message = latency + bytes / bandwidth."""

    latency_seconds: float
    bandwidth_bytes_per_second: float


def fit_link(points: Mapping[float, float]) -> LinkFit:
    """Latency and bandwidth of least squares of the relative error, through {bytes: seconds}, neither negative.

    Relative, because messages of a KiB and a GiB count alike. Needs one point above 0 bytes and seconds.
    """
    # Minimise sum((latency * u + slope * v - 1)^2) with u = 1 / seconds, v = bytes / seconds.
    pairs = [(1 / seconds, size / seconds) for size, seconds in points.items() if seconds > 0 and size > 0]
    uu, vv = sum(u * u for u, _ in pairs), sum(v * v for _, v in pairs)
    uv, u1, v1 = sum(u * v for u, v in pairs), sum(u for u, _ in pairs), sum(v for _, v in pairs)
    determinant = uu * vv - uv * uv
    latency = (u1 * vv - v1 * uv) / determinant if determinant > 1e-12 * uu * vv else 0.0
    latency = max(0.0, latency)
    slope = (v1 - latency * uv) / vv
    if slope <= 0:
        raise ValueError("the seconds do not grow with the bytes")
    return LinkFit(latency, 1 / slope)
