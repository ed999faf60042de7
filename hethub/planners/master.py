"""Which pipelines to take, and how many of each: the most rows that a number of devices of each pool can do.

Whole numbers where the devices are few (a lattice of all counts, by dynamic programming), else fractions (a linear
program with one constraint a pool), rounded down, and whole numbers for the devices that are then left; where those
are still many, greedily.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import lt

import numpy as np
import numpy.typing as npt

__all__ = ["Counted", "Relaxed", "Taken", "most_rows", "relax"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Taken = tuple[tuple[int, int], ...]  # (column, how many), by column

_STATES = 200_000  # of the lattice, at most
_ITEMS = 48  # columns that the lattice looks at, where there are many
_PIVOTS = 400
_TINY = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Relaxed:
    """Fractions of columns allowed: no choice does more than `rows`. `prices[k]` is what one device more of pool k
    would add; `columns` and `fractions` are a solution that reaches it."""

    rows: float
    prices: Floats
    columns: Ints
    fractions: Floats


def relax(usage: Ints, rows: Ints, available: Ints) -> Relaxed:
    """The linear program max rows . x, usage^T x <= available, x >= 0, by the revised simplex over all columns.

    The bound is the dual's: its prices are raised until no column is worth more than its devices, so that it holds
    even where the simplex stopped early.
    """
    pools = usage.shape[1]
    # a little more of each pool, each another: no two vertices are the same
    supply = available * (1 + 1e-9 * np.arange(1, pools + 1))
    work, values = usage.astype(float), rows.astype(float)
    basis = np.full(pools, -1)  # -1 - k would be slack k; kept apart in `slack`
    slack = np.arange(pools)
    inverse = np.eye(pools)
    cost = np.zeros(pools)
    prices = np.zeros(pools)
    for _ in range(_PIVOTS):
        prices = cost @ inverse
        gain = values - work @ prices if len(values) else np.zeros(0)
        entering = int(gain.argmax()) if len(gain) else -1
        best = gain[entering] if entering >= 0 else 0.0
        free = int((-prices).argmax())
        if best <= _TINY and -prices[free] <= _TINY:
            break
        take_slack = -prices[free] > best
        column = np.eye(pools)[free] if take_slack else work[entering]
        direction, level = inverse @ column, inverse @ supply
        ratios = np.where(direction > _TINY, level / np.where(direction > _TINY, direction, 1.0), np.inf)
        leaving = int(ratios.argmin())
        pivot = inverse[leaving] / direction[leaving]
        inverse = inverse - np.outer(direction, pivot)
        inverse[leaving] = pivot
        basis[leaving], slack[leaving] = (-1, free) if take_slack else (entering, -1)
        cost[leaving] = 0.0 if take_slack else values[entering]
    prices = np.maximum(prices, 0.0)
    worth = work @ prices
    busy = values > 0
    if busy.any():
        with np.errstate(divide="ignore"):
            prices = prices * max(1.0, float((values[busy] / np.maximum(worth[busy], 1e-300)).max()))
    level = inverse @ available.astype(float)
    real = basis >= 0
    return Relaxed(
        rows=float(prices @ available),
        prices=prices,
        columns=basis[real],
        fractions=np.maximum(level[real], 0.0),
    )


def most_rows(
    usage: Ints, rows: Ints, available: Ints, *, use_all: bool = False, relaxed: Relaxed | None = None
) -> tuple[int, Taken] | None:
    """(Rows, columns) of the best choice found in whole numbers; None where nothing can be taken. The best of all where
    the lattice of counts is small; `relaxed`, the solution in fractions, starts it where it is not."""
    base: dict[int, int] = {}
    left = available.copy()
    steps = _steps(usage, rows, left)
    if _states(left, steps) > _STATES:
        relaxed = relax(usage, rows, available) if relaxed is None else relaxed
        for spare in (1, 0):
            base = {
                int(c): int(max(0, np.floor(x + _TINY) - spare))
                for c, x in zip(relaxed.columns, relaxed.fractions, strict=True)
            }
            left = available - sum((usage[c] * n for c, n in base.items()), np.zeros_like(available))
            steps = _steps(usage, rows, left)
            if _states(left, steps) <= _STATES:
                break
    items = _items(usage, rows, left, relaxed)
    if relaxed is not None and _states(left, steps) > _STATES:
        chosen: dict[int, int] | None = _greedy(usage, rows, left, items, relaxed.prices)
    else:
        chosen = _lattice(usage, rows, left, steps, items, use_all=use_all)
    if chosen is None:
        return None
    for column, number in chosen.items():
        base[column] = base.get(column, 0) + number
    taken = tuple(sorted((c, n) for c, n in base.items() if n))
    return (int(sum(rows[c] * n for c, n in taken)), taken) if taken else None


class Counted:
    """Columns by how many devices of each pool they use, where all counts make a small lattice."""

    def __init__(self, usage: Ints, available: Ints) -> None:
        key = usage @ np.cumprod(np.concatenate(([1], available[:-1] + 1)))  # one number for each usage
        self._order = np.argsort(key, kind="stable")
        self._firsts = np.flatnonzero(np.diff(key[self._order], prepend=-1))
        self._usage = usage[self._order[self._firsts]]  # what is part of another usage stands before it
        self._shape = tuple(available + 1)

    def most_rows(self, rows: Ints) -> Ints:
        """Most rows that so many devices of each pool can do, for all counts of devices."""
        exact = np.zeros(self._shape, dtype=np.int64)
        if len(self._order):
            _fill(exact, self._usage, np.maximum.reduceat(rows[self._order], self._firsts))
        return exact


def _steps(usage: Ints, rows: Ints, left: Ints) -> Ints:
    """The unit of each pool's count: what all columns that fit use a multiple of."""
    able = (usage <= left).all(axis=1) & (rows > 0)
    return np.array(
        [max(1, int(np.gcd.reduce(usage[able, k]))) if able.any() else 1 for k in range(len(left))]
    )


def _states(left: Ints, steps: Ints) -> int:
    return int(np.prod([int(n) // int(s) + 1 for n, s in zip(left, steps, strict=True)], dtype=object))


def _items(usage: Ints, rows: Ints, left: Ints, relaxed: Relaxed | None) -> Ints:
    """The columns that the lattice looks at: of each usage the one with most rows, and where those are many the best by
    the relaxation's prices."""
    able = np.flatnonzero((usage <= left).all(axis=1) & (rows > 0))
    key = usage[able] @ np.cumprod(np.concatenate(([1], left[:-1] + 1)))  # one number for each usage
    order = np.lexsort((able, -rows[able], key))
    kept = able[order[np.diff(key[order], prepend=-1) > 0]]
    if relaxed is not None and len(kept) > _ITEMS and relaxed.prices.any():
        loss = usage[kept] @ relaxed.prices - rows[kept]
        kept = kept[np.argsort(loss, kind="stable")[:_ITEMS]]
    return np.sort(kept)


def _greedy(usage: Ints, rows: Ints, left: Ints, items: Ints, prices: Floats) -> dict[int, int]:
    """As many as fit of the items in turn, those first that do most rows for what their devices are worth."""
    worth = rows[items] / np.maximum(usage[items] @ prices, _TINY)
    left = left.copy()
    chosen: dict[int, int] = {}
    for item in items[np.argsort(-worth, kind="stable")]:
        need = usage[item]
        number = int((left[need > 0] // need[need > 0]).min(initial=0 if not need.any() else 1 << 30))
        if number:
            chosen[int(item)] = number
            left -= need * number
    return chosen


def _lattice(
    usage: Ints, rows: Ints, left: Ints, steps: Ints, items: Ints, *, use_all: bool
) -> dict[int, int] | None:
    """An unbounded knapsack over all counts of devices."""
    sizes = left // steps
    exact = np.zeros(tuple(sizes + 1), dtype=np.int64)
    if use_all:
        if (left % steps).any():
            return None
        exact -= 1 << 40
        exact[(0,) * len(sizes)] = 0
    _fill(exact, usage[items] // steps, rows[items])
    state = sizes.copy()
    if exact[tuple(state)] < 0:
        return None
    chosen: dict[int, int] = {}
    while exact[tuple(state)] > 0:
        for item in items:
            before = state - usage[item] // steps
            if (before >= 0).all() and exact[tuple(before)] + rows[item] == exact[tuple(state)]:
                chosen[int(item)] = chosen.get(int(item), 0) + 1
                state = before
                break
        else:
            state = _smaller(exact, state)
    return chosen


def _fill(exact: Ints, usage: Ints, rows: Ints) -> None:
    """Raise `exact[counts]` to the most rows that any number of these do with so many devices."""
    ends = exact.shape
    for need, gain in zip(map(tuple, usage.tolist()), rows.tolist(), strict=True):
        # 1, 2, 4, ... of it: every number is a sum of those; until others do as much
        while all(map(lt, need, ends)) and exact[need] < gain:
            into = exact[tuple([slice(n, None) for n in need])]
            source = exact[tuple([slice(end - n) for end, n in zip(ends, need, strict=True)])]
            np.maximum(into, source + gain, out=into)
            need, gain = tuple([2 * n for n in need]), 2 * gain


def _smaller(exact: Ints, state: Ints) -> Ints:
    """A state with one count less and as many rows."""
    for k in range(len(state)):
        before = state.copy()
        before[k] -= 1
        if before[k] >= 0 and exact[tuple(before)] == exact[tuple(state)]:
            return before
    raise AssertionError("the lattice has rows that come from nowhere")
