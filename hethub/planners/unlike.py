"""Plans that stand different pipelines side by side, on one pool or on several: bounds, and choices near them.

A *branch* is a set of such plans: those on some pools, certainly on some of them, whose longest tail lies in a range.
Within T seconds a pipeline does at most so many rows, and the most rows that all devices can do (`master.py`) bound the
branch. Which pools work settles which links all gradients cross, and the longest tail is what every pipeline waits for:
so a branch is split by these two until its bound is no better than the best plan, or is dear enough to be left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from operator import sub

import numpy as np
import numpy.typing as npt

from hethub.planners.candidate import chains_of, ways
from hethub.planners.columns import MANY, Columns, Tails
from hethub.planners.master import Counted, Taken, most_rows, relax
from hethub.planners.priced import Search

__all__ = ["NEAR", "Branch", "roots"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

NEAR, _NEAR_OF_MANY = 1e-4, 1e-3  # how near a lower bound's bisection comes
_STEPS = (0.0, 0.004, 0.01, 0.02, 0.03, 0.045, 0.06, 0.08, 0.1, 0.14, 0.2, 0.3, 0.5, 1.0, 3.0)
_PRICED = 2  # choices at each time
_CHOICES = 40  # priced to close a branch on small clusters
_LAST_CHOICES = 400  # of a branch that cannot be split any further
_LOOKED = 4_000  # partial choices looked at for that
_CHOSEN_FROM = 20_000  # columns
_APART = 0.004  # of the bound: longest tails nearer to each other are not worth a split
_SHORT = 1e-9
_UNLIKE = 2  # pipelines, at least


@dataclass(frozen=True, slots=True, kw_only=True)
class _Limits:
    """Pools (numbers) that a branch's plans may use and those that each of them uses, and where the longest tail lies,
    seconds."""

    may: tuple[int, ...]
    must: tuple[int, ...] = ()
    least_tail: float = 0.0
    most_tail: float = np.inf


class Branch:
    """Some plans; `numbers` are their pipelines among the search's columns, `columns` those with their bounds."""

    def __init__(
        self,
        search: Search,
        name: str,
        limits: _Limits,
        numbers: Ints,
        columns: Columns,
        *,
        is_root: bool = False,
    ) -> None:
        self.search, self.name, self.limits, self.is_root = search, name, limits, is_root
        self.numbers, self.columns = numbers, columns
        # seconds in which the batch cannot, and in which it may be done
        self.bound, self.reached = 0.0, np.inf
        self._tails: dict[int, Tails] = {}
        # every plan within so many seconds has at least so many pipelines
        self._side_by_side = (np.inf, _UNLIKE)

    @property
    def decided(self) -> bool:
        """Whether it is settled which pools work."""
        return len(self.limits.must) == len(self.limits.may)

    @cached_property
    def counted(self) -> Counted:
        """Its columns by what they use; on small clusters."""
        return Counted(self.columns.usage, self.search.available)

    # -- bounds ---------------------------------------------------------------------------------------------------

    def tails(self, pipelines: int) -> Tails:
        """Of columns among at least so many pipelines."""
        if pipelines not in self._tails:
            limits, most = self.limits, max(pipelines, int(self.search.available.sum()))
            update, gradients = self.search.rates(
                self.columns, (pipelines, most), limits.may, alike=False, must=limits.must
            )
            self._tails[pipelines] = self.columns.tails(update, gradients)
        return self._tails[pipelines]

    def _rows(self, columns: Columns, seconds: float, tails: Tails) -> Ints:
        return columns.rows_within(seconds, tails, self.limits.least_tail, self.limits.most_tail)

    def rows_within(self, seconds: float) -> Ints:
        """Rows of each pipeline, at most."""
        return self._rows_and_pipelines(seconds)[0]

    def _rows_and_pipelines(self, seconds: float) -> tuple[Ints, int]:
        """The same, and how many pipelines there are at least: as many as the most rows of one ask for."""
        within, pipelines = self._side_by_side
        pipelines = pipelines if seconds <= within else _UNLIKE
        while True:
            rows = self._rows(self.columns, seconds, self.tails(pipelines))
            more = max(1, -(-self.search.batch // max(1, int(rows.max(initial=1)))))
            more = 1 << (more.bit_length() - 1)  # few different ones, so that tails are used again
            if more <= pipelines:
                return rows, pipelines
            if more > self.search.available.sum():  # than devices: no plan is so quick
                return np.zeros_like(rows), pipelines
            pipelines = more

    def may_be_done(self, seconds: float) -> bool:
        """Whether the bounds allow the batch within these seconds."""
        search = self.search
        rows, pipelines = self._rows_and_pipelines(seconds)
        if search.space.small:
            able = bool(self.counted.most_rows(rows).max() >= search.batch)
        else:
            relaxed = relax(self.columns.usage, rows, search.available)
            able = relaxed.rows >= search.batch * (1 - _SHORT)
        if able:
            self.reached, self._side_by_side = seconds, (seconds, pipelines)
        return able

    def find_bound(self, low: float, most: float) -> float:
        """The least seconds, at least `low`, or `most` where they are not less; kept in `bound`."""
        if not len(self.columns) or not self.may_be_done(most):
            self.bound = most
            return most
        high = most
        if low and self.may_be_done(next_to := min(most, low * (1 + self._near))):  # as most parts of a split
            high = next_to
        elif (few := self._promising(most)) is not self:  # those tell nearly where it is
            few.find_bound(low, most)
            low, high = self._around(few.bound, low, min(high, few.reached))
        near = self._near
        while high - low > near * high:
            middle = (low + high) / 2
            low, high = (low, middle) if self.may_be_done(middle) else (middle, high)
        self.bound = low
        return low

    @property
    def _near(self) -> float:
        return NEAR if len(self.columns) <= MANY else _NEAR_OF_MANY

    def _around(self, guess: float, low: float, high: float) -> tuple[float, float]:
        """Seconds between `low` and `high` in which the batch cannot and in which it may be done, near to a guess."""
        step = self._near
        if self.may_be_done(guess):
            high = guess
            while (sooner := high * (1 - step)) > low:
                if not self.may_be_done(sooner):
                    return sooner, high
                high, step = sooner, 4 * step
            return low, high
        low = guess
        while (later := low * (1 + step)) < high:
            if self.may_be_done(later):
                return low, later
            low, step = later, 4 * step
        return low, high

    def worth(self, seconds: float) -> dict[int, float]:
        """What share of the rows one more device of each pool would add."""
        relaxed = relax(self.columns.usage, self.rows_within(seconds), self.search.available)
        shares = relaxed.prices / max(1.0, relaxed.rows)
        return {pool: float(share) for pool, share in zip(self.search.space.pools, shares, strict=True)}

    # -- splitting ------------------------------------------------------------------------------------------------

    def split(self) -> list[Branch]:
        """Branches that hold all of this one's plans between them, none where splitting would do nothing."""
        limits = self.limits
        seconds = max(self.bound, 1e-300) * (1 + 2 * NEAR)
        rows = self.rows_within(seconds)
        relaxed = relax(self.columns.usage, rows, self.search.available)
        undecided = [pool for pool in limits.may if pool not in limits.must]
        if undecided and len(limits.may) > 1:
            use = relaxed.fractions @ self.columns.usage[relaxed.columns]
            share = dict(zip(self.search.space.pools, use.tolist(), strict=True))
            pool = max(undecided, key=lambda p: (share[p], -p))
            others = tuple(p for p in limits.may if p != pool)
            found = [self._limited(replace(limits, must=(*limits.must, pool)))]
            if len(others) > 1:
                found.append(self._limited(replace(limits, may=others)))
            return found
        tails = self.tails(_UNLIKE)
        longest = (tails.update + tails.gradients)[0, relaxed.columns]
        if not len(longest):
            return []
        low, high = max(limits.least_tail, float(longest.min())), min(limits.most_tail, float(longest.max()))
        if high - low < _APART * self.bound:
            return []
        middle = (low + high) / 2
        return [
            self._limited(replace(limits, most_tail=middle)),
            self._limited(replace(limits, least_tail=middle)),
        ]

    def _limited(self, limits: _Limits) -> Branch:
        if (limits.may, limits.must) == (self.limits.may, self.limits.must):
            part = Branch(self.search, self.name, limits, self.numbers, self.columns)
            part._tails = self._tails
            if self.search.space.small:
                part.counted = self.counted
        else:
            left_out = [k for k, pool in enumerate(self.search.space.pools) if pool not in limits.may]
            part = self._of(np.flatnonzero((self.columns.usage[:, left_out] == 0).all(axis=1)), limits)
        part._side_by_side = self._side_by_side
        return part

    def _of(self, kept: Ints, limits: _Limits) -> Branch:
        """Some of its plans, on some of its columns."""
        if len(kept) == len(self.columns):
            return Branch(self.search, self.name, limits, self.numbers, self.columns)
        return Branch(self.search, self.name, limits, self.numbers[kept], self.columns.taken(kept))

    # -- plans ----------------------------------------------------------------------------------------------------

    def _promising(self, seconds: float) -> Branch:
        """The columns that do most rows for what their devices are worth, where there are very many: to choose from,
        not to bound."""
        if len(self.columns) <= _CHOSEN_FROM:
            return self
        rows = self.rows_within(seconds)
        relaxed = relax(self.columns.usage, rows, self.search.available)
        worth = rows / np.maximum(self.columns.usage @ relaxed.prices, _SHORT)
        kept = np.sort(np.argsort(-worth, kind="stable")[:_CHOSEN_FROM])
        return self._of(kept, self.limits)

    def raise_from(self, lower: float) -> None:
        """Price choices at ever longer times, until they are as long as the best candidate's."""
        few = self._promising(lower * (1 + _STEPS[2]))
        if few is not self:
            few.raise_from(lower)
            return
        search = self.search
        own = self.columns
        refined = replace(own, period=own.period.copy(), quick=own.quick.copy(), fill=own.fill.copy())
        bounds = self.tails(_UNLIKE)
        tails = Tails(update=np.array(bounds.update), gradients=bounds.gradients.copy())
        exact = np.zeros(len(refined), dtype=bool)
        for step in _STEPS:
            seconds = lower * (1 + step)
            if seconds >= search.best.seconds or search.late():
                break
            for _ in range(_PRICED):
                rows = self._rows(refined, seconds, tails)
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
        found = [
            chains_of(search.chains, parts, search.batch, stage_major=stage_major, reach=1)
            for stage_major in ways(parts)
        ]
        for place, c in fresh:
            exact[c] = True
            fitting = [chain for chain in (way[place] for way in found) if chain is not None]
            if not fitting:
                refined.fill[:, c] = np.inf
                continue
            chain = min(fitting, key=lambda one: one.period_seconds + one.tail_seconds / search.batch)
            refined.period[c] = refined.quick[c] = chain.period_seconds
            refined.fill[:, c] = chain.fill_seconds
            tails.update[:, c], tails.gradients[:, c] = chain.tail_seconds, 0.0
        return bool(fresh)

    def close(self, *, whatever: bool) -> bool:
        """Price every choice that its bounds allow to be quicker than the best candidate; True where none is left.
        Where there are too many, none is priced, or `whatever` there is as far as it goes."""
        search, priced, better = self.search, 0, True
        while better:
            better, before = False, search.best.seconds
            choices = self._quicker([0])
            if not whatever:
                few = list(islice(choices, _CHOICES + 1))
                if len(few) > _CHOICES or None in few:
                    return False
                choices = iter(few)
            for taken in choices:
                if taken is None:
                    return False
                if taken in search.tried:
                    continue
                priced += 1
                if priced > _LAST_CHOICES or search.late():
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
        most = self.counted.most_rows(rows)
        # devices left -> columns, rows with one and the rest
        able_with: dict[tuple[int, ...], tuple[Ints, Ints]] = {}

        def able(left: tuple[int, ...]) -> tuple[Ints, Ints]:
            if left not in able_with:
                after_one = np.array(left) - columns.usage
                fitting = np.flatnonzero((after_one >= 0).all(axis=1) & (rows > 0))
                able_with[left] = fitting, rows[fitting] + most[tuple(after_one[fitting].T)]
            return able_with[left]

        def further(start: int, left: tuple[int, ...], missing: int) -> Iterator[Taken | None]:
            if missing <= 0:
                yield ()
            fitting, done = able(left)  # one of a column allows at least the rows that several of it do
            for place in fitting[(fitting >= start) & (done >= missing)].tolist():
                need, own, number = tuple(columns.usage[place].tolist()), int(rows[place]), 1
                after, still = tuple(map(sub, left, need)), missing - own
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
                            yield ((int(self.numbers[place]), number), *rest)
                    after, still, number = tuple(map(sub, after, need)), still - own, number + 1

        yield from further(0, tuple(search.available.tolist()), search.batch)


def roots(search: Search) -> Iterator[Branch]:
    """Plans on each pool alone, and plans on several pools."""
    usage, pools = search.columns.usage, search.space.pools
    for k, pool in enumerate(pools):
        own = np.flatnonzero((usage > 0).sum(axis=1) * (usage[:, k] > 0) == 1)
        name = f"unlike pipelines on {search.chains.costs.pools[pool].type.name}"
        yield _root(search, name, _Limits(may=(pool,), must=(pool,)), own)
    if len(pools) > 1:
        everything = np.arange(len(search.columns))
        yield _root(search, "unlike pipelines on several device types", _Limits(may=pools), everything)


def _root(search: Search, name: str, limits: _Limits, numbers: Ints) -> Branch:
    branch = Branch(search, name, limits, numbers, search.columns.taken(numbers), is_root=True)
    if not search.space.small:
        return branch
    # periods that count memory, of those that may matter
    kept = _useful(branch)
    refined = branch.columns.taken(kept).refined()
    fitting = np.isfinite(refined.period)
    branch = Branch(search, name, limits, numbers[kept][fitting], refined.taken(fitting))
    kept = _useful(branch)
    return Branch(search, name, limits, branch.numbers[kept], branch.columns.taken(kept), is_root=True)


def _useful(branch: Branch) -> Ints:
    """Columns that stand in some choice which the bounds allow to be quicker than the best candidate."""
    search, usage = branch.search, branch.columns.usage
    if not search.best.kept or not len(usage):
        return np.arange(len(usage))
    rows = np.minimum(branch.rows_within(search.best.seconds * (1 - _SHORT)), search.batch)
    most = branch.counted.most_rows(rows)
    rest = most[tuple((search.available - usage).T)]
    return np.flatnonzero((rows > 0) & (rows + rest >= search.batch))
