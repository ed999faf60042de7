"""The units that people write (GiB, MiB, Gbit/s, GB/s, MB/s, TFLOP/s, us), to and from SI units."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = [
    "BANDWIDTHS",
    "LARGEST",
    "MEMORIES",
    "PEAKS",
    "one_of",
    "seconds_from_us",
    "us_from_seconds",
    "write_bandwidth",
    "write_exactly",
    "write_memory",
    "write_peaks",
]

# By ending of the key: what one unit is in bytes, bytes per second or FLOP/s. The first one is preferred in
# writing.
MEMORIES = {"gib": 2.0**30, "mib": 2.0**20}
BANDWIDTHS = {"gb_s": 1e9, "gbit_s": 1e9 / 8, "mb_s": 1e6}
LARGEST = 1e15  # of any unit: products of such numbers stay far from what a double holds
PEAKS = {"tflops": 1e12, "gflops": 1e9}


def one_of(spec: object, stem: str, units: Mapping[str, float]) -> tuple[Any, float] | None:
    """What stands at `stem` with any of the units' endings, and that unit; None when nothing does.

    Raises ValueError when more than one is given, or more than anything could be.
    """
    given = [(f"{stem}_{ending}", unit) for ending, unit in units.items()]
    given = [(key, unit) for key, unit in given if getattr(spec, key, None) is not None]
    if len(given) > 1:
        raise ValueError(f"give only one of {' and '.join(key for key, _ in given)}")
    if not given:
        return None
    key, unit = given[0]
    value = getattr(spec, key)
    if max(value.values(), default=0.0) > LARGEST if isinstance(value, Mapping) else value > LARGEST:
        raise ValueError(f"{key} is more than anything can have. Give a smaller number")
    return value, unit


def seconds_from_us(microseconds: float) -> float:
    """Microseconds to seconds."""
    return microseconds / 1e6


def us_from_seconds(seconds: float) -> float:
    """Seconds to the microseconds that read back as the same seconds."""
    near = seconds * 1e6
    return next((us for us in _neighbours(near) if seconds_from_us(us) == seconds), near)


def write_memory(stem: str, size_bytes: int) -> dict[str, float]:
    """The key and value that read back as `size_bytes`."""
    return {f"{stem}_gib": _number(float(size_bytes), MEMORIES["gib"])}


def write_bandwidth(stem: str, bytes_per_second: float) -> dict[str, float]:
    """The key and value that read back as `bytes_per_second`."""
    for ending, unit in BANDWIDTHS.items():
        if _exact(bytes_per_second, unit) is not None:
            return {f"{stem}_{ending}": _number(bytes_per_second, unit)}
    return {f"{stem}_gb_s": _number(bytes_per_second, BANDWIDTHS["gb_s"])}


def write_peaks(stem: str, peaks: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The key and mapping that read back as `peaks`, FLOP/s by dtype."""
    for ending, unit in PEAKS.items():
        if all(_exact(peak, unit) is not None for peak in peaks.values()):
            return {f"{stem}_{ending}": {dtype: _number(peak, unit) for dtype, peak in peaks.items()}}
    return {f"{stem}_tflops": {dtype: _number(peak, PEAKS["tflops"]) for dtype, peak in peaks.items()}}


def write_exactly(key: str, value: float, unit: float) -> dict[str, float]:
    """`key` with the number that times `unit` is `value`."""
    return {key: _number(value, unit)}


def _exact(value: float, unit: float) -> float | None:
    """The number that times `unit` is `value` to the last bit. There may be none."""
    return next((number for number in _neighbours(value / unit) if number * unit == value), None)


def _neighbours(near: float) -> tuple[float, ...]:
    """`near` as people would write it, `near` itself, and the doubles on either side."""
    return (round(near, 9), near, math.nextafter(near, math.inf), math.nextafter(near, 0))


def _number(value: float, unit: float) -> float:
    exact = _exact(value, unit)
    number = value / unit if exact is None else exact
    # 1555 reads better than 1555.0, and a number is a number.
    return int(number) if number.is_integer() and abs(number) < 1e15 else number
