"""The steady state of a 1F1B pipeline: its period, and how many micro-batches every stage holds."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["round_trips", "settle"]

_NEAR = 0.005  # of the period: how near the bisection comes


def round_trips(times: Sequence[float], hops: Sequence[float]) -> list[float]:
    """Seconds from a stage's forward to its backward's end, for every stage, nobody waiting."""
    trips = [times[-1]]
    for seconds, hop in zip(reversed(times[:-1]), reversed(hops), strict=True):
        trips.append(trips[-1] + seconds + hop)
    return trips[::-1]


def settle(
    times: Sequence[float], trips: Sequence[float], limits: Sequence[int], micro_batches: int, least: float
) -> tuple[float, list[int]]:
    """(period, micro-batches in flight of every stage) of the quickest steady state, at least `least`
    seconds.

    With k[i] in flight a stage does, in turn, one backward and the forward of k[i] micro-batches later.
    From a forward of stage i over the hops to stage j, its forward, its next backward, and back again, k[i]
    - k[j] + 1 micro-batches pass; so T (k[i] - k[j] + 1) >= the seconds of that round, for all i <= j.
    Counted from the last stage, the least k at a given T follows, and it falls with T: bisect for the least
    T whose k are within the limits.
    """
    period = max(least, *times)
    found = _in_flight(times, trips, limits, micro_batches, period)
    if found is not None:
        return period, found
    low, high = period, max(period, trips[0])
    best = _in_flight(times, trips, limits, micro_batches, high) or [1] * len(times)
    while high - low > _NEAR * low:
        middle = (low + high) / 2
        found = _in_flight(times, trips, limits, micro_batches, middle)
        if found is None:
            low = middle
        else:
            high, best = middle, found
    return high, best


def _in_flight(
    times: Sequence[float], trips: Sequence[float], limits: Sequence[int], micro_batches: int, period: float
) -> list[int] | None:
    """The least micro-batches in flight that sustain `period`, or None where a limit forbids it."""
    counts: list[int] = []
    most = 0.0  # of k[j] - 1 - (trip[j] - time[j]) / period over the later stages
    for seconds, trip, limit in zip(reversed(times), reversed(trips), reversed(limits), strict=True):
        count = max(1, math.ceil(trip / period + most - 1e-9)) if counts else 1
        if count > limit and limit < micro_batches:
            return None
        counts.append(min(count, micro_batches))
        most = max(most, count - 1 - (trip - seconds) / period)
    return counts[::-1]
