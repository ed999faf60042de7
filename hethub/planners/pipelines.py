"""All pipelines of a plan space, enumerated and bounded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, permutations

import numpy as np
import numpy.typing as npt

from hethub.planners.chain import Chains
from hethub.planners.columns import BY_COLUMN, BY_SEGMENT, SEGMENTS, Columns, least_fills, least_firsts
from hethub.planners.periods import (
    AGAIN,
    BACKWARD,
    DECODER,
    EACH,
    ENTRY,
    EPS,
    EXCHANGE_ROOM,
    EXCHANGED,
    FIELDS,
    HEAD,
    HEAD_AGAIN,
    KEPT,
    LAST,
    MOST,
    OWN,
    ROOM,
)
from hethub.planners.seats import SeatCost, Slot
from hethub.planners.space import WORTH, Space

__all__ = ["columns_of"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_Made = tuple[tuple[int, ...], Ints, Ints]  # slots from the last stage on, counts, rows

_HALVINGS = 20  # of the range of periods
_NEVER = np.inf
_FIRST, _INNER, _LAST, _ONLY = (True, False), (False, False), (False, True), (True, True)


class _Lines:
    """What a slot with some rows is worth in a stage, as rows of a table (see `periods.py`), one a (slot, rows).

    A slot of several groups is at most as good as its slowest, and as the one with the least memory.
    """

    def __init__(self, chains: Chains, space: Space) -> None:
        self.width = len(space.rows)
        self.table = np.full((len(space.slots) * self.width, FIELDS), _NEVER)
        # of every slot, the rows that it can have, and those with which it is quicker for each row
        self.able = np.zeros((len(space.slots), self.width), dtype=bool)
        self.worth = np.zeros((len(space.slots), self.width), dtype=bool)
        self._holders = max(2, sum(space.available))
        self._memory: dict[tuple[int, int, int], tuple[int, Floats]] = {}  # (pool, degree, rows)
        for number, slot in enumerate(space.slots):
            best = _NEVER
            for at, rows in enumerate(space.rows):
                staff = chains.staff(slot, rows)
                if staff is None:
                    continue
                line = self.table[number * self.width + at]
                self._fill(line, staff.costs)
                each = line[DECODER] / rows
                self.able[number, at], self.worth[number, at] = True, space.small or each < WORTH * best
                best = min(best, each)

    def _fill(self, line: Floats, members: Sequence[SeatCost]) -> None:
        _, line[:] = min(map(self._memory_line, members), key=lambda found: found[0])
        slow = max(members, key=lambda cost: sum(cost.decoder))
        line[DECODER], line[BACKWARD], line[AGAIN] = sum(slow.decoder), slow.decoder[1], slow.decoder[0]
        line[HEAD], line[HEAD_AGAIN] = sum(slow.head), slow.head_again

    def _memory_line(self, cost: SeatCost) -> tuple[int, Floats]:
        """(Most decoders of an inner stage, the fields that are bytes) of a group."""
        key = (cost.pool, cost.degree, cost.rows)
        if key not in self._memory:
            line = np.full(FIELDS, _NEVER)
            line[MOST] = 0.0
            for places, shift in (((_INNER, _FIRST), 0), ((_LAST, _ONLY), LAST)):
                # a first stage of a small model has less to hold than an inner one, whose messages come from both sides
                found = [cost.least_lines(place, self._holders) for place in places]
                room, own = max(f.room for f in found), min(f.own for f in found)
                line[ROOM + shift], line[OWN + shift] = room, own
                line[EXCHANGE_ROOM + shift] = room - own - min(f.own_exchanged for f in found)
                line[EACH], line[KEPT], line[EXCHANGED] = found[0].each, found[0].kept, found[0].exchanged
                line[ENTRY] = min(line[ENTRY], *(f.entry for f in found))
                line[MOST] = max(line[MOST], (room - own) // (found[0].each + found[0].kept))
            self._memory[key] = cost.most_decoders(_INNER, 1, self._holders, full=True), line
        return self._memory[key]


def columns_of(chains: Chains, space: Space) -> Columns:
    """All pipelines of the space. On small clusters their periods count no memory yet (`Columns.refined`)."""
    lines = _Lines(chains, space)
    counts = [_counts(chains, space, slot) for slot in space.slots]
    alone = [(number,) for number in range(len(counts))]
    single = _evaluated(chains, space, lines, _enumerated(space, lines, alone, counts))
    if len(space.pools) == 1:
        return single
    chosen = _joined(single, space)
    tuples = [
        several
        for length in range(2, space.most_pools + 1)
        for several in permutations(chosen, length)
        if _apart(space, several)
    ]
    made: Iterator[_Made] = _enumerated(space, lines, tuples, counts)
    if len(space.pools) > space.most_pools:
        made = chain(made, _through(chains, space, lines))
    parts = [single, _evaluated(chains, space, lines, made)]
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in BY_COLUMN}
    joined |= {name: np.concatenate([getattr(part, name) for part in parts], axis=1) for name in BY_SEGMENT}
    return Columns(slots=space.slots, table=lines.table, layers=chains.layers, **joined)


def _through(chains: Chains, space: Space, lines: _Lines) -> Iterator[_Made]:
    """Pipelines through more pools than any others: all of them, and all but one, each shared out evenly among some
    number of alike pipelines, in a few orders, with tensor-parallel degrees as alike as can be."""
    alone = [i for i, slot in enumerate(space.slots) if len(slot) == 1 and slot[0].replicas == 1]
    each = {pool: [i for i in alone if space.slots[i][0].pool == pool] for pool in space.pools}
    steps = sorted({space.slots[i][0].degree for i in alone})
    seen = set()
    for left_out in (None, *space.pools):
        pools = [pool for pool in space.pools if pool != left_out and each[pool]]
        if len(pools) <= space.most_pools:
            continue
        for step in steps:
            slots = {
                p: max((i for i in each[p] if space.slots[i][0].degree <= step), default=each[p][0])
                for p in pools
            }
            units = {p: chains.costs.pools[p].unit_count(space.slots[slots[p]][0].degree) for p in pools}
            grid = np.array([[units[p] // n for p in pools] for n in range(1, min(units.values()) + 1)])
            if not len(grid):
                continue
            for order in _orders(chains, pools):
                numbers, at = tuple(slots[p] for p in order), [pools.index(p) for p in order]
                if numbers not in seen:
                    seen.add(numbers)
                    yield from _with_rows(space, lines, numbers, grid[:, at])


def _orders(chains: Chains, pools: Sequence[int]) -> list[tuple[int, ...]]:
    """Orders of many pools along a pipeline: as in the spec, by memory, by speed, and their reverses."""
    types = {n: chains.costs.pools[n].type for n in pools}
    memory = tuple(sorted(pools, key=lambda n: (types[n].memory_bytes, n)))
    speed = tuple(sorted(pools, key=lambda n: (sum(chains.costs.cost(n, 1, 1).decoder), n)))
    return list(dict.fromkeys(o for one in (tuple(pools), memory, speed) for o in (one, one[::-1])))


def _counts(chains: Chains, space: Space, slot: Slot) -> Ints:
    """Numbers of stages that a run of a slot may have: on small clusters all, else up to eight and all that leave the
    fewest groups over for some number of alike pipelines."""
    units = min(chains.costs.pools[s.pool].unit_count(s.degree) // s.replicas for s in slot)
    most = min(units, space.most_stages)
    if space.small:
        return np.arange(1, most + 1)
    found = {n for n in range(1, 9) if n <= most} | {units // n for n in range(1, units + 1)}
    return np.array(sorted(n for n in found if n <= most), dtype=np.int64)


def _joined(single: Columns, space: Space) -> list[int]:
    """Slots that pipelines of several pools are made of: groups by themselves; of more than three pools only the two of
    each that do most for each device alone, or all where none can alone."""
    alone = [i for i, slot in enumerate(space.slots) if len(slot) == 1 and slot[0].replicas == 1]
    if len(space.pools) <= 3:
        return alone
    chosen: list[int] = []
    for pool in space.pools:
        own = [i for i in alone if space.slots[i][0].pool == pool]
        speed = {}
        for i in own:
            mine = single.runs[:, 0] == i
            if mine.any():
                speed[i] = float((single.rows / single.period / single.usage.sum(axis=1))[mine].max())
        chosen += sorted(speed, key=lambda i: -speed[i])[:2] if speed else own
    return sorted(chosen)


def _apart(space: Space, numbers: tuple[int, ...]) -> bool:
    """Whether the slots use different pools."""
    pools = [seat.pool for number in numbers for seat in space.slots[number]]
    return len(set(pools)) == len(pools)


def _enumerated(
    space: Space, lines: _Lines, tuples: Sequence[tuple[int, ...]], counts: Sequence[Ints]
) -> Iterator[_Made]:
    """(slots, counts, rows) of all pipelines of these sequences of slots, last stage first; with the fewest rows that
    all slots can have, and with those with which one of them is quicker for each row (small clusters: with all)."""
    for numbers in tuples:
        axes = np.meshgrid(*(counts[n] for n in numbers), indexing="ij")
        yield from _with_rows(space, lines, numbers, np.stack(axes, axis=-1).reshape(-1, len(numbers)))


def _with_rows(space: Space, lines: _Lines, numbers: tuple[int, ...], grid: Ints) -> Iterator[_Made]:
    grid = grid[grid.sum(axis=1) <= space.most_stages]
    slots = list(numbers)
    rows = np.array(space.rows)[lines.able[slots].all(axis=0) & lines.worth[slots].any(axis=0)]
    if len(grid) and len(rows):
        yield numbers, np.tile(grid, (len(rows), 1)), np.repeat(rows, len(grid))


def _evaluated(chains: Chains, space: Space, lines: _Lines, made: Iterator[_Made]) -> Columns:
    runs, counts, rows = _stacked(made, len(space.pools))
    slot_usage = np.zeros((len(space.slots), len(space.pools)), dtype=np.int64)
    for number, slot in enumerate(space.slots):
        for seat in slot:
            devices = chains.costs.pools[seat.pool].unit_devices(seat.degree)
            slot_usage[number, space.pools.index(seat.pool)] += devices * seat.replicas
    usage = np.zeros((len(runs), len(space.pools)), dtype=np.int64)
    for j in range(runs.shape[1]):
        usage += counts[:, [j]] * slot_usage[runs[:, j]]
    fitting = (usage <= np.array(space.available)).all(axis=1)
    runs, counts, rows, usage = runs[fitting], counts[fitting], rows[fitting], usage[fitting]
    places = np.where(counts > 0, runs * lines.width + np.searchsorted(space.rows, rows)[:, None], 0)
    hops, load = _hops(chains, space, runs, counts, rows)
    period = np.maximum(_time_periods(lines.table, places, counts, chains.layers), load)
    segments = (len(SEGMENTS) - 1, len(runs))
    columns = Columns(
        slots=space.slots,
        table=lines.table,
        layers=chains.layers,
        runs=runs,
        counts=counts,
        places=places,
        rows=rows,
        usage=usage,
        hops=hops,
        period=period,
        quick=period,
        hidden=_hidden(chains, space, lines, runs, counts, places),
        fill=np.zeros(segments),
        first=np.zeros(segments),
    )
    if not space.small:
        columns = columns.refined(compiled=True)
        return columns.taken(np.isfinite(columns.period))
    given = (lines.table, places, counts, chains.layers, period)
    return replace(columns, fill=least_fills(*given) + hops, first=least_firsts(*given))


def _stacked(made: Iterator[_Made], width: int) -> tuple[Ints, Ints, Ints]:
    parts = list(made)
    total = sum(len(rows) for _, _, rows in parts)
    all_runs = np.full((total, width), -1, dtype=np.int64)
    all_counts, all_rows = np.zeros((total, width), dtype=np.int64), np.empty(total, dtype=np.int64)
    start = 0
    for numbers, grid, rows in parts:
        own, used = slice(start, start + len(rows)), slice(len(numbers))
        all_runs[own, used], all_counts[own, used], all_rows[own] = numbers, grid, rows
        start += len(rows)
    return all_runs, all_counts, all_rows


def _time_periods(table: Floats, places: Ints, counts: Ints, layers: int) -> Floats:
    """The least period of each column as if memory were plenty, never too long."""
    used = counts > 0
    decoder = np.where(used, table[places, DECODER], _NEVER)
    head = table[places[:, 0], HEAD]
    low = layers / (counts / decoder).sum(axis=1) * (1 - EPS)
    high = layers * decoder.min(axis=1) + head
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        room = np.floor(middle[:, None] / decoder + EPS)
        last = np.maximum(np.floor((middle - head) / decoder[:, 0] + EPS), 0.0)
        enough = (room * counts).sum(axis=1) - room[:, 0] + last >= layers
        high, low = np.where(enough, middle, high), np.where(enough, low, middle)
    found: Floats = low
    return found


def _hidden(chains: Chains, space: Space, lines: _Lines, runs: Ints, counts: Ints, places: Ints) -> Floats:
    """Periods that may hide the gradients of each column's first stage: the backwards of as many stages as stand on its
    node."""
    at = np.arange(len(runs)), (counts > 0).sum(axis=1) - 1
    front = places[at]
    near = np.array(
        [max(max(1, chains.costs.pools[s.pool].node_size // s.degree) for s in slot) for slot in space.slots]
    )
    share = lines.table[front, BACKWARD] / lines.table[front, DECODER]
    found: Floats = np.minimum(near[runs[at]], counts[at]) * share
    return found


def _hops(chains: Chains, space: Space, runs: Ints, counts: Ints, rows: Ints) -> tuple[Floats, Floats]:
    """(Seconds of all hops there and back, the longest time that one keeps a link busy) over idle links."""
    seconds, load = np.zeros(len(runs)), np.zeros(len(runs))
    known: dict[tuple[int, int, int], tuple[float, float]] = {}

    def table(one: Ints, other: Ints, times: Ints) -> None:
        mine = np.flatnonzero(times > 0)
        keys = (one[mine] * (len(space.slots) + 1) + other[mine]) * (space.rows[-1] + 1) + rows[mine]
        kinds, places = np.unique(keys, return_inverse=True)
        found = np.zeros((len(kinds), 2))
        for number, key in enumerate(kinds.tolist()):
            pair, own = divmod(key, space.rows[-1] + 1)
            source, target = divmod(pair, len(space.slots) + 1)
            if (source, target, own) not in known:
                known[source, target, own] = chains.links.least_hop(
                    space.slots[source], space.slots[target], own
                )
            found[number] = known[source, target, own]
        seconds[mine] += found[places, 0] * times[mine]
        load[mine] = np.maximum(load[mine], found[places, 1])

    for j in range(runs.shape[1]):
        table(runs[:, j], runs[:, j], np.maximum(counts[:, j] - 1, 0))
        if j:
            table(runs[:, j], runs[:, j - 1], (counts[:, j] > 0).astype(np.int64))
    return seconds, load
