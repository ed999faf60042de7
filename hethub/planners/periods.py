"""The least period of a pipeline by time and memory: what its stages can hold together, one after the other.

`held` is one formula for one pipeline, compiled by numba where there are very many of them (`compiled_periods`; loading
that takes a third of a second), and for all pipelines at once over arrays (`least_periods`). So it keeps to what both
understand: a *line* has the fields below, each a number or an array over pipelines; seconds, and bytes on the most
loaded rank.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import numpy as np
import numpy.typing as npt

from hethub.simulate.compiled import load_numba

__all__ = ["EPS", "FIELDS", "compiled_periods", "least_periods"]

FIELDS = 16
DECODER, BACKWARD, AGAIN, HEAD, HEAD_AGAIN = range(5)  # seconds: of a decoder, its backward and recomputation
EACH, KEPT, ENTRY, EXCHANGED = range(5, 9)  # bytes of a decoder
MOST = 9  # decoders that one micro-batch lets fit
ROOM, OWN, EXCHANGE_ROOM = range(10, 13)  # bytes, of an inner stage; of the last one they stand 3 further
LAST = 3

_NEAR = 5e-4  # how near a period's bisection comes
_PARTS = 16  # of its range, looked at together: few pipelines cost little more than one
_STEP = 1.05  # the first step beyond the period by time alone
EPS = 1e-9

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def stage_decoders(line: Any, last: bool, period: Any, waiting: Any) -> Any:
    """The most decoders of a stage: as many as it does in `period`, and as fit with the micro-batches in flight that
    the stages behind it ask for, which take `waiting` periods, and its own."""
    shift = LAST if last else 0
    room, own = line[ROOM + shift], line[OWN + shift]
    decoder, each, kept = line[DECODER], line[EACH], line[KEPT]
    head, head_again = (line[HEAD], line[HEAD_AGAIN]) if last else (0.0, 0.0)
    one = each + kept
    # n (each + kept k) + own k <= room with k = waiting + n turn micro-batches in flight
    turn = decoder / period
    a = kept * turn
    b = each + own * turn + kept * waiting
    c = own * waiting - room
    deep = (np.sqrt(np.maximum(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    none = np.minimum(np.minimum((period - head) / decoder, (room - own) / one), deep)
    entries = line[ENTRY] * np.maximum(waiting - 1, 0.0)
    full = np.minimum((period - head - head_again) / (decoder + line[AGAIN]), (room - own - entries) / one)
    exchange = line[EXCHANGE_ROOM + shift] / (one + line[EXCHANGED])
    return np.floor(np.maximum(0.0, np.minimum(np.maximum(none, full), exchange)) + EPS)


def held(lines: Any, counts: Any, most: Any, total: Any, quick: Any, period: Any) -> Any:
    """Decoders that all stages hold but the first ones, up to `total` stages from the last on; `lines`, `counts` and
    `most` (the largest count) are of the runs, the last one first."""
    turn = quick / period
    found = (total > 0) * stage_decoders(lines[0], True, period, 0.0 * period)
    place = 0 * total + 1
    for run in range(len(most)):
        for number in range(1 if run == 0 else 0, most[run]):
            working = (number < counts[run]) * (place < total)
            found = found + working * stage_decoders(lines[run], False, period, found * turn)
            place = place + working
    return found


def single_periods(
    table: Floats,
    places: Ints,
    counts: Ints,
    low: Floats,
    layers: int,
    ends: Floats,
    period: Floats,
    others: Floats,
) -> None:
    """`least_periods`, pipeline by pipeline; fills in `period` and `others`."""
    for i in range(len(places)):
        lines, own = table[places[i]], counts[i]
        total = own.sum()
        quick, longest = np.inf, 0.0
        for run in range(len(own)):
            if own[run]:
                quick = min(quick, lines[run, DECODER])
                slow = (lines[run, DECODER] + lines[run, AGAIN]) * layers
                longest = max(longest, slow + lines[run, HEAD] + lines[run, HEAD_AGAIN])
        longest *= 1 + EPS
        # most pipelines need no longer than by time alone, or little longer
        near, high, step = low[i], low[i] * (1 + EPS), _STEP
        while held(lines, own, own, total, quick, high) < layers and high < longest:
            near, high, step = high, min(high * step, longest), step * step
        fits = high < longest or held(lines, own, own, total, quick, longest) >= layers
        while fits and high > near * (1 + _NEAR):
            middle = math.sqrt(near * high)
            if held(lines, own, own, total, quick, middle) >= layers:
                high = middle
            else:
                near = middle
        period[i] = near if fits else np.inf
        for k in range(len(ends)):
            enough = k > 0 and others[k - 1, i] >= layers  # then so in longer periods
            if fits and not enough:
                others[k, i] = held(lines, own, own, total - 1, quick, near * ends[k])
            else:
                others[k, i] = layers if fits else 0.0


def least_periods(
    table: Floats, places: Ints, counts: Ints, low: Floats, layers: int, ends: Floats
) -> tuple[Floats, Floats]:
    """For each pipeline the least period (never too long; infinite where the model does not fit) and the decoders
    [ends, pipelines] that all stages but the first can hold in `ends` times that. `low` is a period that is not too
    long; `places` are rows of `table`."""
    if not len(places):
        return np.zeros(0), np.zeros((len(ends), 0))
    # [runs, fields, pipelines]; a run that a pipeline lacks counts nothing, whatever its line
    lines = np.ascontiguousarray(table[np.where(counts > 0, places, places[:, :1])].transpose(1, 2, 0))
    own, total = counts.T, counts.sum(axis=1)
    most = own.max(axis=1).tolist()
    used = own > 0
    quick = np.where(used, lines[:, DECODER], np.inf).min(axis=0)
    period = low.copy()
    # most need no longer than by time alone
    longer = np.flatnonzero(held(lines, own, most, total, quick, period * (1 + _NEAR)) < layers)
    if len(longer):
        given = (lines[:, :, longer], own[:, longer], most, total[longer], quick[longer])
        period[longer] = _bisected(*given, low[longer], layers)
    fits = np.isfinite(period)
    known = np.where(fits, period, 1.0)
    others = np.array([held(lines, own, most, total - 1, quick, known * end) for end in ends])
    return period, np.where(fits, others, 0.0)


def _bisected(
    lines: Floats, own: Ints, most: list[int], total: Ints, quick: Floats, low: Floats, layers: int
) -> Floats:
    """Least periods of pipelines that need longer than `low`, infinite where the model does not fit; see `held`."""
    slow = (lines[:, DECODER] + lines[:, AGAIN]) * layers + lines[:, HEAD] + lines[:, HEAD_AGAIN]
    high, near = np.where(own > 0, slow, 0.0).max(axis=0) * (1 + EPS), low

    def enough(periods: Floats) -> npt.NDArray[np.bool_]:
        found: npt.NDArray[np.bool_] = held(lines, own, most, total, quick, periods) >= layers
        return found

    fits = enough(high)
    while (fits & (high > near * (1 + _NEAR))).any():
        edges = near * (high / near) ** np.linspace(0.0, 1.0, _PARTS + 1)[:, None]
        short = (~enough(edges[1:-1])).sum(axis=0)
        near, high = (np.take_along_axis(edges, (short + end)[None], axis=0)[0] for end in (0, 1))
    return np.where(fits, near, np.inf)


@cache
def compiled_periods() -> Callable[..., None]:
    """`single_periods`, compiled; kept on disk until this file changes."""
    numba = load_numba()
    own = sys.modules[__name__]
    space: dict[str, Any] = dict(vars(own))
    for name in ("stage_decoders", "held", "single_periods"):
        function: FunctionType = getattr(own, name)
        alike = FunctionType(function.__code__, space, name)
        space[name] = numba.njit(error_model="numpy", cache=name == "single_periods")(alike)
    found: Callable[..., None] = space["single_periods"]
    return found
