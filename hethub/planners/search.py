"""The search: bounds of all pipelines, a lower bound of the step, and plans that come near it.

1. `columns.py` bounds the speed of every pipeline of the space.
2. *Alike* plans repeat one pipeline. All of them are bounded at once, and priced by the closed form in the order of
   their bounds until the next bound is no better than the best price: exact.
3. *Unlike* plans stand different pipelines side by side, on one pool or on several. The least time in which any
   choice of pipelines could do the batch (`master.py`) bounds them. From there the time is raised; at each, the choice
   with the most rows is priced, and its pipelines' bounds are replaced by their prices, so that the next is a better
   one. It ends when the time has passed the best candidate's.
4. On small clusters all unlike choices that the bounds allow to be quicker are priced, until none is left.

The lower bound is the least of all that was not priced, and of the best candidate.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import sub

import numpy as np
import numpy.typing as npt

from hethub.planners.candidate import Candidate, Part, chains_of, price
from hethub.planners.chain import Chains
from hethub.planners.columns import Columns, Tails, columns_of
from hethub.planners.interface import Progress
from hethub.planners.master import Taken, most_rows, relax
from hethub.planners.space import Space

__all__ = ["Ranking", "rank", "with_reach"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_NEAR = 1e-4  # how near the lower bound's bisection comes
_STEPS = (0.0, 0.004, 0.01, 0.02, 0.03, 0.045, 0.06, 0.08, 0.1, 0.14, 0.2, 0.3, 0.5, 1.0, 3.0)
_PRICED = 2  # choices at each time
_ALIKE = 1500  # alike plans priced
_CHOICES = 40  # unlike choices priced to close the gap on small clusters
_LOOKED = 1_500  # partial choices looked at for that
_EACH = 24  # numbers of alike pipelines bounded one by one; more of them in ranges
_SHORT = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """The best candidates by closed form, ascending; `considered` counts pipelines bounded and plans priced. No plan
    of the space has a closed form below `lower_bound_seconds`; `loose` says which plans the bound is of. `worth[pool]`
    is by how much of the step one more device of a pool would shorten the bound of unlike plans."""

    candidates: tuple[Candidate, ...]
    considered: int
    lower_bound_seconds: float
    loose: str
    worth: dict[int, float]


class _Best:
    """The `most` best distinct candidates so far."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.kept: dict[tuple[object, ...], Candidate] = {}
        self.seconds = math.inf

    def offer(self, candidate: Candidate) -> None:
        self.kept.setdefault(candidate.key, candidate)
        self.seconds = min(self.seconds, candidate.seconds)
        if len(self.kept) > self.most:
            del self.kept[max(self.kept, key=lambda key: self.kept[key].seconds)]

    def ascending(self) -> tuple[Candidate, ...]:
        return tuple(sorted(self.kept.values(), key=lambda candidate: candidate.seconds))


class _Search:
    def __init__(
        self,
        chains: Chains,
        space: Space,
        batch: int,
        most: int,
        late: Callable[[], bool],
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.chains, self.space, self.batch, self.late = chains, space, batch, late
        self.progress, self.lower = progress, 0.0
        self.columns = columns_of(chains, space)
        self.available = np.array(space.available, dtype=np.int64)
        self.best = _Best(most)
        self.tried: set[tuple[Taken, bool]] = set()

    def offer(self, taken: Taken) -> None:
        """Price a choice of columns, its groups dealt out in both ways."""
        parts = self.parts(taken)
        for stage_major in (False, True):
            if (taken, stage_major) not in self.tried:
                self.tried.add((taken, stage_major))
                candidate = price(self.chains, parts, self.batch, stage_major=stage_major)
                if candidate is not None and (not self.space.use_all or self._uses_all(taken)):
                    self.best.offer(candidate)
        self.tell()

    def tell(self) -> None:
        """How far the search is."""
        if self.progress is not None:
            best = self.best.seconds if self.best.kept else None
            self.progress(
                Progress(considered=self.considered, best_seconds=best, lower_bound_seconds=self.lower)
            )

    @property
    def considered(self) -> int:
        """Pipelines bounded and plans priced."""
        return len(self.columns) + len(self.tried)

    def _uses_all(self, taken: Taken) -> bool:
        used = sum(self.columns.usage[c] * n for c, n in taken)
        return bool((used == self.available).all())

    def parts(self, taken: Taken) -> list[Part]:
        columns = self.columns
        return [Part(columns.crew(c), int(columns.rows[c]), number) for c, number in taken]

    def rates(self, copies: int, pools: Sequence[int], *, alike: bool) -> tuple[Floats, Floats]:
        """(Update, gradients) seconds of a decoder on every slot."""
        found = [self.chains.links.least_rates(slot, copies, pools, alike=alike) for slot in self.space.slots]
        return np.array([f[0] for f in found]), np.array([f[1] for f in found])


# -- alike plans --------------------------------------------------------------------------------------------------


def _ranges(most: int) -> list[tuple[int, int]]:
    """Ranges of numbers of pipelines, first and last: single ones where they are few."""
    found = [(n, n) for n in range(1, min(most, _EACH) + 1)]
    while found and found[-1][1] < most:
        first = found[-1][1] + 1
        found.append((first, min(most, math.ceil(first * 1.1))))
    return found


def _alike(search: _Search, able: Ints, least: int, most: Ints) -> Floats:
    """Bounds of plans that repeat columns `able` at least `least` times and at most `most` times each."""
    own, batch = search.columns.taken(able), search.batch
    ends = [search.rates(n, search.space.pools, alike=True) for n in sorted({least, int(most.max())})]
    update, gradients = (np.minimum.reduce([end[k] for end in ends]) for k in (0, 1))
    micro_batches = np.ceil(batch / (own.rows * most) - _SHORT)
    seconds = own.seconds(micro_batches, own.tails(update, gradients))
    even = (batch % own.rows == 0) & (batch // own.rows >= least)
    return np.where(even, seconds, math.inf)


def _price_alike(search: _Search) -> float:
    """Price alike plans, most promising first; returns the least bound of those not priced, at most the best price."""
    columns = search.columns
    if not len(columns):
        return math.inf
    most = (search.available // np.maximum(columns.usage, 1)).min(
        axis=1, initial=search.batch, where=columns.usage > 0
    )
    queue: list[tuple[float, int, int, int]] = []  # bound, column, least and most copies
    for least, last in _ranges(int(most.max(initial=1))):
        able = np.flatnonzero(most >= least)
        copies = np.minimum(most[able], last)
        bounds = _alike(search, able, least, copies)
        kept = np.argsort(bounds, kind="stable")[:_ALIKE]
        queue += [(float(bounds[i]), int(able[i]), least, int(copies[i])) for i in kept]
    heapq.heapify(queue)
    for _ in range(_ALIKE):
        if not queue or queue[0][0] >= search.best.seconds:
            break
        if search.late():
            return queue[0][0]
        bound, column, least, copies = heapq.heappop(queue)
        search.offer(((column, copies),))
        if least < copies:  # the others of the range
            rest = _alike(search, np.array([column]), least, np.array([copies - 1]))
            heapq.heappush(queue, (max(bound, float(rest[0])), column, least, copies - 1))
    return min([search.best.seconds, *(entry[0] for entry in queue[:1])])


# -- unlike plans -------------------------------------------------------------------------------------------------


class _Unlike:
    """Plans of different pipelines on `pools` (places in the space): on one pool, or on several of them."""

    def __init__(self, search: _Search, columns: Ints) -> None:
        self.search = search
        self._take(columns, search.columns.taken(columns))
        if search.space.small:  # periods that count memory, of those that may matter
            kept = self._useful()
            columns, refined = columns[kept], self.columns.taken(kept).refined()
            fitting = np.isfinite(refined.period)
            self._take(columns[fitting], refined.taken(fitting))
            kept = self._useful()
            self._take(self.numbers[kept], self.columns.taken(kept))

    def _take(self, numbers: Ints, columns: Columns) -> None:
        self.numbers, self.columns = numbers, columns
        self.pools = [pool for k, pool in enumerate(self.search.space.pools) if columns.usage[:, k].any()]
        self._tails: dict[int, Tails] = {}

    def _useful(self) -> Ints:
        """Columns that stand in some choice which the bounds allow to be quicker than the best candidate."""
        search, usage = self.search, self.columns.usage
        if not search.best.kept or not len(usage):
            return np.arange(len(usage))
        rows = np.minimum(self.rows_within(search.best.seconds * (1 - _SHORT)), search.batch)
        most = _most_of_the_rest(usage, rows, search.available)
        rest = most[tuple((search.available - usage).T)]
        return np.flatnonzero((rows > 0) & (rows + rest >= search.batch))

    def tails(self, pipelines: int) -> Tails:
        """Of columns among at least so many pipelines."""
        if pipelines not in self._tails:
            most = max(pipelines, int(self.search.available.sum()))
            ends = [self.search.rates(n, self.pools, alike=False) for n in (pipelines, most)]
            update, gradients = (np.minimum.reduce([end[k] for end in ends]) for k in (0, 1))
            self._tails[pipelines] = self.columns.tails(update, gradients)
        return self._tails[pipelines]

    def rows_within(self, seconds: float) -> Ints:
        """Rows of each pipeline, at most: there are at least as many as the most rows of one ask for."""
        rows = self.columns.rows_within(seconds, self.tails(2))
        pipelines = max(2, -(-self.search.batch // max(1, int(rows.max(initial=1)))))
        pipelines = 1 << (pipelines.bit_length() - 1)  # few different ones, so that tails are used again
        return rows if pipelines == 2 else self.columns.rows_within(seconds, self.tails(pipelines))

    def may_be_done(self, seconds: float) -> bool:
        """Whether the bounds allow the batch within these seconds."""
        search, rows = self.search, self.rows_within(seconds)
        if relax(self.columns.usage, rows, search.available).rows < search.batch * (1 - _SHORT):
            return False
        if not search.space.small:
            return True
        found = most_rows(self.columns.usage, rows, search.available)
        return found is not None and found[0] >= search.batch

    def lower_bound(self, most: float) -> float:
        """The least seconds, or `most` where they are not less."""
        if not len(self.columns) or not self.may_be_done(most):
            return most
        low, high = 0.0, most
        while high - low > _NEAR * high:
            middle = (low + high) / 2
            low, high = (low, middle) if self.may_be_done(middle) else (middle, high)
        return low

    def worth(self, seconds: float) -> dict[int, float]:
        """What share of the rows one more device of each pool would add."""
        relaxed = relax(self.columns.usage, self.rows_within(seconds), self.search.available)
        shares = relaxed.prices / max(1.0, relaxed.rows)
        return {pool: float(share) for pool, share in zip(self.search.space.pools, shares, strict=True)}

    def raise_from(self, lower: float) -> None:
        """Price choices at ever longer times, until they are as long as the best candidate's."""
        search = self.search
        refined = replace(self.columns, period=self.columns.period.copy(), fill=self.columns.fill.copy())
        bounds = self.tails(2)
        tails = Tails(
            update=bounds.update.copy(), gradients=bounds.gradients.copy(), enough=bounds.enough.copy()
        )
        exact = np.zeros(len(refined), dtype=bool)
        for step in _STEPS:
            seconds = lower * (1 + step)
            if seconds >= search.best.seconds or search.late():
                break
            for _ in range(_PRICED):
                rows = refined.rows_within(seconds, tails)
                relaxed = None if search.space.small else relax(refined.usage, rows, search.available)
                if relaxed is not None and relaxed.rows < search.batch * (1 - _SHORT):
                    break
                found = most_rows(
                    refined.usage, rows, search.available, use_all=search.space.use_all, relaxed=relaxed
                )
                if found is None or found[0] < search.batch:
                    break
                search.offer(tuple((int(self.numbers[c]), n) for c, n in found[1]))
                if not self._refine(refined, tails, exact, found[1]) or seconds >= search.best.seconds:
                    break

    def _refine(self, refined: Columns, tails: Tails, exact: npt.NDArray[np.bool_], taken: Taken) -> bool:
        """Put prices in place of the bounds of these columns; False where all are priced already."""
        search = self.search
        fresh = [(place, c) for place, (c, _) in enumerate(taken) if not exact[c]]
        parts = search.parts(tuple((int(self.numbers[c]), n) for c, n in taken))
        ways = [
            chains_of(search.chains, parts, search.batch, stage_major=stage_major, reach=1)
            for stage_major in (False, True)
        ]
        for place, c in fresh:
            exact[c] = True
            fitting = [chain for chain in (way[place] for way in ways) if chain is not None]
            if not fitting:
                refined.fill[c] = math.inf
                continue
            chain = min(fitting, key=lambda one: one.period_seconds + one.tail_seconds / search.batch)
            refined.period[c], refined.fill[c] = chain.period_seconds, chain.fill_seconds
            tails.update[c], tails.gradients[c] = chain.tail_seconds, 0.0
        return bool(fresh)

    def close(self) -> bool:
        """Price every choice that its bounds allow to be quicker than the best candidate; True where none is left."""
        search, priced, better = self.search, 0, True
        while better:
            better, before = False, search.best.seconds
            looked = [0]
            for taken in self._quicker(looked):
                if taken is None:
                    return False
                if all((taken, way) in search.tried for way in (False, True)):
                    continue
                priced += 1
                if priced > _CHOICES or search.late():
                    return False
                search.offer(taken)
                if search.best.seconds < before:  # fewer are left now
                    better = True
                    break
        return True

    def _quicker(self, looked: list[int]) -> Iterator[Taken | None]:
        """All choices of pipelines whose bounds are below the best candidate's seconds, each once; None where too
        many would have to be looked at."""
        search, columns = self.search, self.columns
        rows = np.minimum(self.rows_within(search.best.seconds * (1 - _SHORT)), search.batch)
        order = np.flatnonzero(rows > 0)
        most = _most_of_the_rest(columns.usage[order], rows[order], search.available)
        # Plain numbers: these vectors are too short for numpy.
        needs, own = [tuple(need) for need in columns.usage[order].tolist()], rows[order].tolist()

        def further(start: int, left: tuple[int, ...], missing: int) -> Iterator[Taken | None]:
            if missing <= 0:
                yield ()
            for place in range(start, len(order)):
                need, number = needs[place], 1
                after, still = tuple(map(sub, left, need)), missing - own[place]
                while min(after) >= 0:
                    looked[0] += 1
                    if looked[0] > _LOOKED:
                        yield None
                        return
                    if still <= most[after]:
                        for rest in further(place + 1, after, still):
                            if rest is None:
                                yield None
                                return
                            yield ((int(self.numbers[order[place]]), number), *rest)
                    after, still, number = tuple(map(sub, after, need)), still - own[place], number + 1

        yield from further(0, tuple(search.available.tolist()), search.batch)


def _most_of_the_rest(usage: Ints, rows: Ints, available: Ints) -> Ints:
    """Most rows that so many devices of each pool can do, for all counts."""
    most = np.zeros(tuple(available + 1), dtype=np.int64)
    best: dict[tuple[int, ...], int] = {}
    for need, own in zip(map(tuple, usage.tolist()), rows.tolist(), strict=True):
        best[need] = max(own, best.get(need, 0))
    for need, own in best.items():
        number = 1
        while all(n * number <= a for n, a in zip(need, available, strict=True)):
            into = tuple(slice(n * number, None) for n in need)
            source = tuple(slice(None, int(a) + 1 - n * number) for n, a in zip(need, available, strict=True))
            most[into] = np.maximum(most[into], most[source] + own * number)
            number *= 2
    return most


def _unlike(search: _Search) -> list[tuple[str, _Unlike]]:
    """Plans on each pool alone, and plans on several pools."""
    usage = search.columns.usage
    found = []
    for k, pool in enumerate(search.space.pools):
        own = np.flatnonzero((usage > 0).sum(axis=1) * (usage[:, k] > 0) == 1)
        found.append(
            (f"unlike pipelines on {search.chains.costs.pools[pool].type.name}", _Unlike(search, own))
        )
    if len(search.space.pools) > 1:
        everything = _Unlike(search, np.arange(len(search.columns)))
        found.append(("unlike pipelines on several device types", everything))
    return found


# -- both ---------------------------------------------------------------------------------------------------------


def rank(
    chains: Chains,
    space: Space,
    batch: int,
    most: int,
    *,
    seconds: float = math.inf,
    progress: Callable[[Progress], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Ranking:
    """Find the `most` best distinct candidates for a batch of `batch` rows, within about `seconds`; `progress` is told
    at every plan that is priced."""
    end = clock() + seconds
    search = _Search(chains, space, batch, most, lambda: clock() >= end, progress)
    lower, loose = _price_alike(search), "alike pipelines"
    bounds: list[tuple[float, str, _Unlike]] = []
    worth: dict[int, float] = {}
    for name, plans in _unlike(search):
        limit = search.best.seconds if search.best.kept else _ever(search)
        bounds.append((plans.lower_bound(limit), name, plans))
    search.lower = min([lower, *(bound for bound, _, _ in bounds)])
    for bound, name, plans in sorted(bounds, key=lambda entry: entry[0]):
        if bound < search.best.seconds:
            plans.raise_from(bound)
        worth = worth or plans.worth(max(bound, 1e-300) * (1 + 2 * _NEAR))
        if bound < min(lower, search.best.seconds) and not (space.small and plans.close()):
            lower, loose = bound, name
    if search.best.seconds <= lower:
        lower, loose = search.best.seconds, "none"
    return Ranking(
        candidates=search.best.ascending(),
        considered=search.considered,
        lower_bound_seconds=lower,
        loose=loose,
        worth=worth,
    )


def _ever(search: _Search) -> float:
    """Longer than any plan that fits needs."""
    columns = search.columns
    return 1e3 * float((columns.fill + columns.period * search.batch).max(initial=0.0))


def with_reach(chains: Chains, candidate: Candidate, batch: int, reach: int) -> Candidate | None:
    """The same candidate with stages that run ahead otherwise (see `Setting`), or None where nothing
    changes."""
    other = price(chains, candidate.parts, batch, stage_major=candidate.stage_major, reach=reach)
    return other if other is not None and other.key != candidate.key else None
