"""All pipelines of a plan space at once, as arrays, with bounds of their speed.

A column is a pipeline in counts: runs of slots, and the rows of a micro-batch. With M micro-batches it takes at least
`fill + (M - 1) * period + tail` seconds, whatever surrounds it, where

- the period is the least p at which the stages together can hold all decoders: a stage holds as many as it does in p
  seconds and as its memory takes. From a forward to its backward a stage waits for all stages behind it, so that it has
  at least (their seconds) / p micro-batches in flight, without which a step at p is not possible; the stages are
  filled from the last one on, each with as many decoders as it takes, which leaves the least to the others;
- the fill is every decoder once, on the quickest devices that have the memory, and every hop over an idle link;
- the tail is the update and the new weights of the stage that has least to do there, and before that the first stage's
  gradients: it has at least the decoders that the others cannot hold at the period, and what hides its exchange is at
  most the last backwards of the stages on its node. A longer period would leave it fewer, but costs more than that
  from a number of micro-batches on (`enough`); with fewer of them its gradients count nothing.

Left out, and so the looseness of the bound: links that are shared by hops, memory of the embedding, recomputation in the
fill, and stages that wait for each other though each alone is quick enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import permutations

import numpy as np
import numpy.typing as npt

from hethub.planners.chain import Chains
from hethub.planners.seats import Crew, SeatCost, Slot
from hethub.planners.space import Space

__all__ = ["Columns", "Tails", "columns_of"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_HALVINGS = 22  # of the range of periods
_NEVER = np.inf
_MOST = 1 << 30  # micro-batches
_EPS = 1e-9
_LAST, _INNER = (False, True), (False, False)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tails:
    """Of every column, seconds of update and new weights, and of gradients where there are `enough` micro-batches."""

    update: Floats
    gradients: Floats
    enough: Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Columns:
    """Pipelines, one an entry: `runs[i]` are slot numbers from the last stage to the first (-1: none), `counts[i]` how
    many stages each has; `usage[i]` devices of each pool of the space. Seconds as above.

    The first stage has at least `first` decoders, `relief` fewer for each second that the period is longer;
    `hiding` are the seconds that may hide its gradients.
    """

    slots: tuple[Slot, ...]
    runs: Ints
    counts: Ints
    rows: Ints
    usage: Ints
    period: Floats
    fill: Floats
    first: Floats
    relief: Floats
    hiding: Floats

    def __len__(self) -> int:
        return len(self.rows)

    def crew(self, number: int) -> Crew:
        """The pipeline, first stage first."""
        pairs = zip(self.runs[number], self.counts[number], strict=True)
        return tuple((self.slots[slot], int(count)) for slot, count in pairs if count)[::-1]

    def tails(self, update: Floats, gradients: Floats, layers: int) -> Tails:
        """From the seconds that a decoder's update and its gradients take on each slot."""
        used = self.counts > 0
        each = np.where(used, update[self.runs], 1.0)
        spread = np.where(used, self.counts / np.maximum(each, 1e-300), 0.0).sum(axis=1)
        front = self.runs[np.arange(len(self)), used.sum(axis=1) - 1]
        exchange = gradients[front]
        return Tails(
            update=layers / spread,
            gradients=np.maximum(0.0, exchange * self.first - self.hiding),
            enough=exchange * self.relief + self.hiding / self.period,
        )

    def rows_within(self, seconds: float, tails: Tails) -> Ints:
        """Rows that each pipeline can have done within `seconds`, at most."""
        left = seconds * (1 + _EPS) - tails.update - self.fill
        few = np.minimum(_done(left, self.period), np.ceil(tails.enough))
        many = _done(left - tails.gradients, self.period)
        return np.maximum(few, many).astype(np.int64) * self.rows

    def seconds(self, micro_batches: Floats, tails: Tails) -> Floats:
        """Least seconds with so many micro-batches."""
        further = micro_batches - 1
        late = np.where(further >= tails.enough, tails.gradients, 0.0)
        return self.fill + further * self.period + tails.update + late

    def taken(self, chosen: npt.NDArray[np.bool_] | Ints) -> Columns:
        """Some of them."""
        kept = {f.name: getattr(self, f.name)[chosen] for f in fields(self) if f.name != "slots"}
        return Columns(slots=self.slots, **kept)


def _done(left: Floats, period: Floats) -> Floats:
    """Micro-batches that `left` seconds behind the fill allow."""
    return np.where(left >= 0, np.minimum(np.floor(np.maximum(left, 0.0) / period + 1 + _EPS), _MOST), 0.0)


class _Lines:
    """What a slot with some rows is worth in a stage, as arrays over (slot, rows), in straight lines of its decoders.

    A slot of several groups is at most as good as its slowest, and as the one with the least memory.
    """

    def __init__(self, chains: Chains, space: Space, holders: int) -> None:
        self.width = len(space.rows)
        shape = len(space.slots) * self.width
        self.able = np.zeros(shape, dtype=bool)
        names = ("decoder", "backward", "again", "head", "head_again", "each", "kept", "entry", "exchanged", "most")
        self.of: dict[str, Floats] = {name: np.full(shape, _NEVER) for name in names}
        for place in ("inner", "last"):
            self.of[f"room_{place}"], self.of[f"exchange_room_{place}"] = np.zeros(shape), np.zeros(shape)
            self.of[f"own_{place}"] = np.zeros(shape)
        for number, slot in enumerate(space.slots):
            for at, rows in enumerate(space.rows):
                staff = chains.staff(slot, rows)
                if staff is not None:
                    self._fill(number * self.width + at, staff.costs, holders)

    def _fill(self, index: int, members: Sequence[SeatCost], holders: int) -> None:
        self.able[index] = True
        slow = max(members, key=lambda cost: sum(cost.decoder))
        full = min(members, key=lambda cost: cost.most_decoders(_INNER, 1, holders, full=True))
        of = self.of
        of["decoder"][index], of["again"][index] = sum(slow.decoder), slow.decoder[0]
        of["backward"][index] = slow.decoder[1]
        of["head"][index], of["head_again"][index] = sum(slow.head), slow.head_again
        lines = full.least_lines(_INNER, holders)
        of["each"][index], of["kept"][index], of["exchanged"][index] = lines.each, lines.kept, lines.exchanged
        of["entry"][index] = lines.entry
        for place, name in ((_INNER, "inner"), (_LAST, "last")):
            own = full.least_lines(place, holders)
            of[f"room_{name}"][index], of[f"own_{name}"][index] = own.room, own.own
            of[f"exchange_room_{name}"][index] = own.room - own.own - own.own_exchanged
        of["most"][index] = max(0.0, (lines.room - lines.own) // (lines.each + lines.kept))


def columns_of(chains: Chains, space: Space) -> Columns:
    """All pipelines of the space that can hold the model at all."""
    lines = _Lines(chains, space, max(2, sum(space.available)))
    counts = [_counts(chains, space, slot) for slot in space.slots]
    single = _evaluated(chains, space, lines, _enumerated(space, lines, [(n,) for n in range(len(counts))], counts))
    parts = [single]
    chosen = _joined(single, space)
    for length in range(2, space.most_pools + 1):
        tuples = [t for t in permutations(chosen, length) if _apart(space, t)]
        parts.append(_evaluated(chains, space, lines, _enumerated(space, lines, tuples, counts)))
    names = [f.name for f in fields(Columns) if f.name != "slots"]
    return Columns(
        slots=space.slots, **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    )


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
) -> Iterator[tuple[tuple[int, ...], Ints, Ints]]:
    """(slots, counts, rows) of all pipelines of these sequences of slots, last stage first."""
    for numbers in tuples:
        grid = np.stack(np.meshgrid(*(counts[n] for n in numbers), indexing="ij"), axis=-1).reshape(-1, len(numbers))
        grid = grid[grid.sum(axis=1) <= space.most_stages]
        if not len(grid):
            continue
        able = [
            rows
            for at, rows in enumerate(space.rows)
            if all(lines.able[n * lines.width + at] for n in numbers)
        ]
        for rows in able:
            yield numbers, grid, np.full(len(grid), rows)


def _evaluated(
    chains: Chains,
    space: Space,
    lines: _Lines,
    made: Iterator[tuple[tuple[int, ...], Ints, Ints]],
) -> Columns:
    layers = chains.layers
    runs, counts, rows = _stacked(made, space.most_pools)
    order = np.argsort(-counts.sum(axis=1), kind="stable")  # the longest first, so that a prefix is still at work
    runs, counts, rows = runs[order], counts[order], rows[order]
    at = np.searchsorted(space.rows, rows)
    places = np.where(counts > 0, runs * lines.width + at[:, None], 0)
    period = _least_periods(lines, places, counts, layers)
    able = np.isfinite(period)
    runs, counts, rows, places, period = (a[able] for a in (runs, counts, rows, places, period))
    quick = np.where(counts > 0, lines.of["decoder"][places], _NEVER).min(axis=1)
    others = _held(lines, places, _run_of_stage(counts), quick, period, but_first=True)
    slot_usage = np.zeros((len(space.slots), len(space.pools)), dtype=np.int64)
    for number, slot in enumerate(space.slots):
        for seat in slot:
            pool = chains.costs.pools[seat.pool]
            devices = pool.count // max(1, pool.unit_count(seat.degree))  # those that a group takes or spoils
            slot_usage[number, space.pools.index(seat.pool)] += devices * seat.replicas
    usage = sum(counts[:, [j]] * slot_usage[runs[:, j]] for j in range(runs.shape[1]))
    fitting = np.asarray((usage <= np.array(space.available)).all(axis=1))
    hops, load = _hops(chains, space, runs, counts, rows)
    fill = _fills(lines, places, counts, layers) + hops
    front, hidden = _front(chains, space, lines, runs, counts, places)
    relief = np.where(counts > 0, counts / lines.of["decoder"][places], 0.0).sum(axis=1)
    columns = Columns(
        slots=space.slots,
        runs=runs,
        counts=counts,
        rows=rows,
        usage=np.asarray(usage),
        period=np.maximum(period, load),
        fill=fill,
        first=np.maximum(0.0, layers - others),
        relief=relief - 1.0 / lines.of["decoder"][front],
        hiding=hidden * period,
    )
    return columns.taken(fitting)


def _stacked(
    made: Iterator[tuple[tuple[int, ...], Ints, Ints]], width: int
) -> tuple[Ints, Ints, Ints]:
    all_runs, all_counts, all_rows = [], [], []
    for numbers, grid, rows in made:
        spare = width - len(numbers)
        all_runs.append(np.tile(np.array([*numbers, *([-1] * spare)]), (len(grid), 1)))
        all_counts.append(np.pad(grid, ((0, 0), (0, spare))))
        all_rows.append(rows)
    if not all_runs:
        nothing = np.zeros((0, width), dtype=np.int64)
        return nothing, nothing, np.zeros(0, dtype=np.int64)
    return np.concatenate(all_runs), np.concatenate(all_counts), np.concatenate(all_rows)


def _least_periods(lines: _Lines, places: Ints, counts: Ints, layers: int) -> Floats:
    """The least period of each column by bisection, never too long; infinite where the model does not fit."""
    if not len(places):
        return np.zeros(0)
    of = {name: lines.of[name][places] for name in ("decoder", "again", "head", "head_again")}
    used = counts > 0
    slow = np.where(used, (of["decoder"] + of["again"]) * layers + of["head"] + of["head_again"], 0.0)
    high = slow.max(axis=1) * (1 + _EPS)
    quick = np.where(used, of["decoder"], _NEVER).min(axis=1)
    low = quick * layers / counts.sum(axis=1) * (1 - _EPS)
    stage_run = _run_of_stage(counts)
    fits = _held(lines, places, stage_run, quick, high) >= layers
    for _ in range(_HALVINGS):
        middle = np.sqrt(low * high)
        enough = _held(lines, places, stage_run, quick, middle) >= layers
        high, low = np.where(enough, middle, high), np.where(enough, low, middle)
    return np.where(fits, low, _NEVER)


def _run_of_stage(counts: Ints) -> list[Ints]:
    """For each place from the end, the run that the columns with so many stages have there; columns are sorted by their
    number of stages, the most first."""
    total, ends = counts.sum(axis=1), counts.cumsum(axis=1)
    found = []
    for place in range(int(total.max())):
        active = int(np.searchsorted(-total, -place, side="left"))
        found.append((place >= ends[:active]).sum(axis=1))
    return found


def _front(
    chains: Chains, space: Space, lines: _Lines, runs: Ints, counts: Ints, places: Ints
) -> tuple[Ints, Floats]:
    """(Place in the lines of each column's first stage, periods that may hide its gradients: the backwards of as many
    stages as stand on its node)."""
    last = (counts > 0).sum(axis=1) - 1
    at = np.arange(len(runs)), last
    front = places[at]
    near = np.array(
        [
            max(max(1, chains.costs.pools[s.pool].node_size // s.degree) for s in slot)
            for slot in space.slots
        ]
    )
    share = lines.of["backward"][front] / lines.of["decoder"][front]
    return front, np.minimum(near[runs[at]], counts[at]) * share


def _held(
    lines: _Lines,
    places: Ints,
    stage_run: Sequence[Ints],
    quick: Floats,
    period: Floats,
    *,
    but_first: bool = False,
) -> Floats:
    """Decoders that the stages (or all but the first one) can hold at a period, one a column."""
    held = np.zeros(len(places))
    for place, run in enumerate(stage_run):
        active = len(run)
        if but_first:
            active = len(stage_run[place + 1]) if place + 1 < len(stage_run) else 0
            run = run[:active]
        index = places[np.arange(active), run]
        p, behind = period[:active], held[:active] * quick[:active]
        held[:active] += _stage_decoders({k: v[index] for k, v in lines.of.items()}, place == 0, p, behind)
    return held


def _stage_decoders(of: dict[str, Floats], last: bool, period: Floats, behind: Floats) -> Floats:
    """The most decoders of a stage: as many as it does in `period`, and as fit with the micro-batches in flight that
    `behind` seconds of decoders behind it (and its own) ask for."""
    name = "last" if last else "inner"
    room, own = of[f"room_{name}"], of[f"own_{name}"]
    head, head_again = (of["head"], of["head_again"]) if last else (0.0, 0.0)
    one = of["each"] + of["kept"]
    alone = (room - own) / one
    # n (each + kept k) + own k <= room with k = (behind + n decoder) / period micro-batches in flight
    a = of["kept"] * of["decoder"] / period
    b = of["each"] + (of["kept"] * behind + own * of["decoder"]) / period
    c = own * behind / period - room
    deep = (-b + np.sqrt(np.maximum(b * b - 4 * a * c, 0.0))) / (2 * a)
    kept = np.minimum(np.minimum((period - head) / of["decoder"], alone), deep)
    entries = of["entry"] * np.maximum(behind / period - 1, 0.0)
    again = np.minimum(
        (period - head - head_again) / (of["decoder"] + of["again"]), (room - own - entries) / one
    )
    exchange = of[f"exchange_room_{name}"] / (one + of["exchanged"])
    most = np.minimum(np.floor(np.maximum(kept, again) + _EPS), np.floor(exchange + _EPS))
    return np.asarray(np.maximum(most, 0.0))


def _fills(lines: _Lines, places: Ints, counts: Ints, layers: int) -> Floats:
    """Every decoder once, on the quickest run as far as memory goes, then on the next."""
    decoder = np.where(counts > 0, lines.of["decoder"][places], _NEVER)
    room = np.where(counts > 0, lines.of["most"][places] * counts, 0.0)
    order = np.argsort(decoder, axis=1, kind="stable")
    left, total = np.full(len(places), float(layers)), np.zeros(len(places))
    for j in range(places.shape[1]):
        run = order[:, [j]]
        done = np.minimum(left, np.take_along_axis(room, run, axis=1)[:, 0])
        total += done * np.where(done > 0, np.take_along_axis(decoder, run, axis=1)[:, 0], 0.0)
        left -= done
    return total + lines.of["head"][places[:, 0]]


def _hops(
    chains: Chains, space: Space, runs: Ints, counts: Ints, rows: Ints
) -> tuple[Floats, Floats]:
    """(Seconds of all hops there and back, the longest time that one keeps a link busy) over idle links."""
    seconds, load = np.zeros(len(runs)), np.zeros(len(runs))
    known: dict[tuple[int, int, int], tuple[float, float]] = {}

    def table(one: Ints, other: Ints, times: Ints) -> None:
        keys = (one * (len(space.slots) + 1) + other) * (space.rows[-1] + 1) + rows
        keys = np.where(times > 0, keys, -1)
        for key in np.unique(keys):
            if key < 0:
                continue
            pair, own = divmod(int(key), space.rows[-1] + 1)
            source, target = divmod(pair, len(space.slots) + 1)
            if (source, target, own) not in known:
                known[source, target, own] = chains.links.least_hop(space.slots[source], space.slots[target], own)
            hop = known[source, target, own]
            mine = keys == key
            seconds[mine] += hop[0] * times[mine]
            load[mine] = np.maximum(load[mine], hop[1])

    for j in range(runs.shape[1]):
        table(runs[:, j], runs[:, j], np.maximum(counts[:, j] - 1, 0))
        if j:
            table(runs[:, j], runs[:, j - 1], (counts[:, j] > 0).astype(np.int64))
    return seconds, load

