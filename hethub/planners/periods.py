"""The least period of a pipeline by time and memory: what its stages can hold together, one after the other.

The functions run as they stand, over lists, and compiled by numba over arrays where there are very many pipelines
(`compiled_periods`; loading it takes a third of a second). So they keep to what both understand: a *line* is a row of a
table, its fields are the constants below; seconds, and bytes on the most loaded rank.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import cache
from types import FunctionType
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["FIELDS", "compiled_periods", "least_periods"]

FIELDS = 16
DECODER, BACKWARD, AGAIN, HEAD, HEAD_AGAIN = range(5)  # seconds: of a decoder, its backward and recomputation
EACH, KEPT, ENTRY, EXCHANGED = range(5, 9)  # bytes of a decoder
MOST = 9  # decoders that one micro-batch lets fit
ROOM, OWN, EXCHANGE_ROOM = range(10, 13)  # bytes, of an inner stage; of the last one they stand 3 further
LAST = 3

_HALVINGS = 12
_EPS = 1e-9

Floats = npt.NDArray[np.float64]
Line = Sequence[float]


def stage_decoders(line: Line, last: bool, period: float, behind: float) -> int:
    """The most decoders of a stage: as many as it does in `period`, and as fit with the micro-batches in flight that
    `behind` seconds of decoders behind it, and its own, ask for."""
    shift = LAST if last else 0
    room, own = line[ROOM + shift], line[OWN + shift]
    head = line[HEAD] if last else 0.0
    again = line[AGAIN]
    head_again = line[HEAD_AGAIN] if last else 0.0
    decoder, each, kept = line[DECODER], line[EACH], line[KEPT]
    one = each + kept
    # n (each + kept k) + own k <= room with k = (behind + n decoder) / period micro-batches in flight
    a = kept * decoder / period
    b = each + (kept * behind + own * decoder) / period
    c = own * behind / period - room
    deep = 0.0 if c > 0 or room < own else (-b + math.sqrt(b * b - 4 * a * c)) / (2 * a)
    none = min((period - head) / decoder, (room - own) / one, deep)
    entries = line[ENTRY] * max(behind / period - 1, 0.0)
    full = min((period - head - head_again) / (decoder + again), (room - own - entries) / one)
    exchange = line[EXCHANGE_ROOM + shift] / (one + line[EXCHANGED])
    most: int = math.floor(max(0.0, min(max(none, full), exchange)) + _EPS)
    return most


def held(
    table: Sequence[Line], lines: Sequence[int], counts: Sequence[int], quick: float, period: float, less: int
) -> int:
    """Decoders that all stages but the first `less` hold; `lines` and `counts` are of the runs, the last one first."""
    total = -less
    for count in counts:
        total += count
    found = place = 0
    for run in range(len(counts)):
        for _ in range(counts[run]):
            if place < total:
                found += stage_decoders(table[lines[run]], place == 0, period, found * quick)
                place += 1
    return found


def least_periods(
    table: Sequence[Line],
    lines: Sequence[Sequence[int]],
    counts: Sequence[Sequence[int]],
    low: Sequence[float],
    layers: int,
    period: Floats,
    others: Floats,
) -> None:
    """Fill in, for each pipeline, the least period (never too long; infinite where the model does not fit) and the
    decoders that all stages but the first can hold then. `low` is a period that is not too long."""
    for i in range(len(lines)):
        quick, high = np.inf, 0.0
        for run in range(len(counts[i])):
            if counts[i][run]:
                line = table[lines[i][run]]
                quick = min(quick, line[DECODER])
                slow = (line[DECODER] + line[AGAIN]) * layers
                high = max(high, slow + line[HEAD] + line[HEAD_AGAIN])
        high *= 1 + _EPS
        if held(table, lines[i], counts[i], quick, high, 0) < layers:
            period[i] = np.inf
            others[i] = 0.0
            continue
        near = low[i]
        if held(table, lines[i], counts[i], quick, near * (1 + _EPS), 0) < layers:
            for _ in range(_HALVINGS):
                middle = math.sqrt(near * high)
                if held(table, lines[i], counts[i], quick, middle, 0) >= layers:
                    high = middle
                else:
                    near = middle
        period[i] = near
        others[i] = held(table, lines[i], counts[i], quick, near, 1)


@cache
def compiled_periods() -> Callable[..., None]:
    """`least_periods`, compiled; kept on disk until this file changes."""
    import numba

    own = sys.modules[__name__]
    space: dict[str, Any] = dict(vars(own))
    for name in ("stage_decoders", "held", "least_periods"):
        function: FunctionType = getattr(own, name)
        alike = FunctionType(function.__code__, space, name)
        space[name] = numba.njit(error_model="numpy", cache=name == "least_periods")(alike)
    found: Callable[..., None] = space["least_periods"]
    return found
