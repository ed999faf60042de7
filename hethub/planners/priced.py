"""What a search knows: pipelines with their bounds, the best candidates so far, and how to price a choice of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import numpy as np
import numpy.typing as npt

from hethub.planners.candidate import Candidate, Part, price, ways
from hethub.planners.chain import Chains
from hethub.planners.columns import Columns
from hethub.planners.interface import Progress
from hethub.planners.master import Taken
from hethub.planners.pipelines import columns_of
from hethub.planners.space import Space

__all__ = ["Best", "Search"]

Floats = npt.NDArray[np.float64]


class Best:
    """The `most` best distinct candidates so far: of one choice dealt out in both ways, the quicker."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.kept: dict[tuple[object, ...], Candidate] = {}
        self.seconds = math.inf

    def offer(self, candidate: Candidate) -> None:
        """Keep it, where it is among the best."""
        known = self.kept.get(candidate.split)
        if known is None or candidate.seconds < known.seconds:
            self.kept[candidate.split] = candidate
        self.seconds = min(self.seconds, candidate.seconds)
        if len(self.kept) > self.most:
            del self.kept[max(self.kept, key=lambda key: self.kept[key].seconds)]

    def ascending(self) -> tuple[Candidate, ...]:
        """Best first."""
        return tuple(sorted(self.kept.values(), key=lambda candidate: candidate.seconds))


class Search:
    """The state of one search, which ends with the best so far when its `time_is_up`."""

    def __init__(
        self,
        chains: Chains,
        space: Space,
        batch: int,
        most: int,
        time_is_up: Callable[[], bool],
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.chains, self.space, self.batch = chains, space, batch
        self._time_is_up = time_is_up
        self.progress, self.lower = progress, 0.0
        self.columns = columns_of(chains, space)
        self.available = np.array(space.available, dtype=np.int64)
        self.best = Best(most)
        self.tried: set[Taken] = set()
        self._priced = 0
        self._rates: dict[tuple[object, ...], Floats] = {}

    def late(self) -> bool:
        """Whether to end with the best so far. Never before there is one: else nothing would seem to fit."""
        return bool(self.best.kept) and self._time_is_up()

    def offer(self, taken: Taken) -> None:
        """Price a choice of columns, its groups dealt out in all ways."""
        if taken in self.tried:
            return
        parts = self.parts(taken)
        for stage_major in ways(parts):
            self._priced += 1
            candidate = price(self.chains, parts, self.batch, stage_major=stage_major)
            if candidate is not None and (not self.space.use_all or self._uses_all(taken)):
                self.best.offer(candidate)
        self.tried.add(taken)
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
        return len(self.columns) + self._priced

    def _uses_all(self, taken: Taken) -> bool:
        used = sum(self.columns.usage[c] * n for c, n in taken)
        return bool((used == self.available).all())

    def parts(self, taken: Taken) -> list[Part]:
        """The choice as `candidate.price` takes it."""
        columns = self.columns
        return [Part(columns.crew(c), int(columns.rows[c]), number) for c, number in taken]

    def rates(
        self,
        columns: Columns,
        copies: Collection[int],
        pools: Sequence[int],
        *,
        alike: bool,
        must: Sequence[int] = (),
    ) -> Floats:
        """(Update, gradients) seconds [2, slots] of a decoder, at least, on every slot of some columns, which are on
        these pools, in any of these numbers of pipelines; see `LinkCosts.least_rates`."""
        least: Floats = np.minimum.reduce(
            [self._rates_among(columns, n, pools, alike=alike, must=must) for n in copies]
        )
        return least

    def _rates_among(
        self, columns: Columns, copies: int, pools: Sequence[int], *, alike: bool, must: Sequence[int]
    ) -> Floats:
        """The same in one number of pipelines; kept."""
        slots, key = self.space.slots, (copies, tuple(pools), alike, frozenset(must))
        known = self._rates.setdefault(key, np.full((2, len(slots)), np.nan))
        used = np.bincount(columns.runs[columns.counts > 0], minlength=len(slots)) > 0
        for number in np.flatnonzero(used & np.isnan(known[0])).tolist():
            known[:, number] = self.chains.links.least_rates(
                slots[number], copies, pools, alike=alike, must=must
            )
        return known
