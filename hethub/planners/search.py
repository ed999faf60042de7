"""The search: bounds of all pipelines, a lower bound of the step, and plans that come near it.

1. `columns.py` bounds the speed of every pipeline of the space.
2. *Alike* plans repeat one pipeline. All of them are bounded at once, and priced by the closed form in the order of
   their bounds until the next bound is no better than the best price: exact.
3. *Unlike* plans stand different pipelines side by side, on one pool or on several. The least time in which any
   choice of pipelines could do the batch (`master.py`) bounds them. From there the time is raised; at each, the choice
   with the most rows is priced, and its pipelines' bounds are replaced by their prices, so that the next is a better
   one. It ends when the time has passed the best candidate's.
4. On small clusters all unlike choices that the bounds allow to be quicker are priced, until none is left.
5. The unlike plans with the least bound are split, by the pools that work and by their longest tail (`unlike.py`), and
   3 and 4 repeated, a number of times.

The lower bound is the least of all that was not priced, and of the best candidate.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import numpy.typing as npt

from hethub.planners.candidate import Candidate, price
from hethub.planners.chain import Chains
from hethub.planners.columns import MANY
from hethub.planners.interface import Progress
from hethub.planners.priced import Search
from hethub.planners.space import Space
from hethub.planners.unlike import NEAR, Branch, roots

__all__ = ["Ranking", "rank", "with_reach"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_ALIKE, _ALIKE_OF_MANY = 1500, 300  # alike plans priced
_LOOKED_AT = 20_000  # columns of which each number is bounded
_BRANCHES = {True: 24, False: 12}  # split at most, on small clusters and on others; of very many columns none
_PRICED_FIRST = 40  # of these at most, those that look best from afar
_EACH = 24  # numbers of alike pipelines bounded one by one; more of them in ranges
_SHORT = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """The best candidates by closed form, ascending; `considered` counts pipelines bounded and plans priced. No plan
    of the space has a closed form below `lower_bound_seconds`; `loose` says which plans the bound is of (None: it is
    the best candidate's own time). `worth[pool]` is by how much of the step one more device of a pool would shorten the
    bound of unlike plans."""

    candidates: tuple[Candidate, ...]
    considered: int
    lower_bound_seconds: float
    loose: str | None
    worth: dict[int, float]


# -- alike plans --------------------------------------------------------------------------------------------------


def _ranges(most: int) -> list[tuple[int, int]]:
    """Ranges of numbers of pipelines, first and last: single ones where they are few."""
    found = [(n, n) for n in range(1, min(most, _EACH) + 1)]
    while found and found[-1][1] < most:
        first = found[-1][1] + 1
        found.append((first, min(most, math.ceil(first * 1.1))))
    return found


def _alike(search: Search, able: Ints, least: int, most: Ints) -> Floats:
    """Bounds of plans that repeat columns `able` at least `least` times and at most `most` times each."""
    if not len(able):
        return np.zeros(0)
    own, batch = search.columns.taken(able), search.batch
    ends = sorted({least, int(most.max())})
    update, gradients = search.rates(own, ends, search.space.pools, alike=True)
    micro_batches = np.ceil(batch / (own.rows * most) - _SHORT)
    seconds = own.seconds(micro_batches, own.tails(update, gradients))
    even = (batch % own.rows == 0) & (batch // own.rows >= least)
    return np.where(even, seconds, math.inf)


def _without_tails(search: Search, chosen: Ints, most: Ints) -> Floats:
    """Rougher bounds, of plans that repeat columns `chosen` at most `most` times each."""
    columns = search.columns
    micro_batches = np.ceil(search.batch / (columns.rows[chosen] * most) - _SHORT)
    found: Floats = columns.fill.min(axis=0)[chosen] + (micro_batches - 1) * columns.quick[chosen]
    return found


def _price_alike(search: Search) -> float:
    """Price alike plans, most promising first; returns the least bound of those not priced, at most the best price."""
    columns = search.columns
    if not len(columns):
        return math.inf
    most = (search.available // np.maximum(columns.usage, 1)).min(
        axis=1, initial=search.batch, where=columns.usage > 0
    )
    rough = _without_tails(search, np.arange(len(columns)), most)
    order = np.argsort(rough, kind="stable")
    others = float(rough[order[_LOOKED_AT]]) if len(order) > _LOOKED_AT else math.inf
    promising = np.sort(order[:_LOOKED_AT])
    # until one fits, so that few others have to be looked at closely; periods of small spaces count no memory yet
    for column in () if search.space.small else order[:_PRICED_FIRST].tolist():
        if not search.best.kept:
            search.offer(((column, int(most[column])),))
    queue: list[tuple[float, int, int, int]] = []  # bound, column, least and most copies
    for least, last in _ranges(int(most.max(initial=1))):
        able = promising[most[promising] >= least]
        if not len(able):  # of those that may be repeated so often none is among the promising
            break
        able = able[_without_tails(search, able, np.minimum(most[able], last)) < search.best.seconds]
        copies = np.minimum(most[able], last)
        bounds = _alike(search, able, least, copies)
        kept = np.argsort(bounds, kind="stable")
        others = min([others, *bounds[kept[_ALIKE : _ALIKE + 1]].tolist()])  # of those that are cut off
        kept = kept[:_ALIKE]
        kept = kept[np.isfinite(bounds[kept])]
        queue += zip(bounds[kept].tolist(), able[kept].tolist(), repeat(least), copies[kept].tolist())
    heapq.heapify(queue)
    for _ in range(_ALIKE if len(columns) <= MANY else _ALIKE_OF_MANY):
        if not queue or queue[0][0] >= search.best.seconds:
            break
        if search.late():
            return min(queue[0][0], others)
        bound, column, least, copies = heapq.heappop(queue)
        search.offer(((column, copies),))
        if least < copies:  # the others of the range
            rest = _alike(search, np.array([column]), least, np.array([copies - 1]))
            heapq.heappush(queue, (max(bound, float(rest[0])), column, least, copies - 1))
    return min([search.best.seconds, others, *(entry[0] for entry in queue[:1])])


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
    """Find the `most` best distinct candidates for a batch of `batch` rows, within about `seconds`, or until
    one is found; `progress` is told at every plan that is priced."""
    end = clock() + seconds
    search = Search(chains, space, batch, most, lambda: clock() >= end, progress)
    lower = _price_alike(search)
    loose: str | None = "alike pipelines"
    branches = []
    for branch in roots(search):
        branch.find_bound(0.0, search.best.seconds if search.best.kept else _ever(search))
        branches.append(branch)
    search.lower = min([lower, *(branch.bound for branch in branches)])
    worth: dict[int, float] = {}
    if branches:
        first = min(branches, key=lambda branch: branch.bound)
        worth = first.worth(max(first.bound, 1e-300) * (1 + 2 * NEAR))
    for branch in _open_branches(search, branches, lower):
        if branch.bound < lower:
            lower, loose = branch.bound, branch.name
    if search.best.seconds <= lower:
        lower, loose = search.best.seconds, None
    return Ranking(
        candidates=search.best.ascending(),
        considered=search.considered,
        lower_bound_seconds=lower,
        loose=loose,
        worth=worth,
    )


def _open_branches(search: Search, branches: list[Branch], lower: float) -> list[Branch]:
    """Price choices of all branches, those with the least bounds first, and split what bounds the search; the branches
    that are left then."""
    queue = [(branch.bound, number, branch) for number, branch in enumerate(branches)]
    heapq.heapify(queue)
    made = len(queue)
    many = len(search.columns) > MANY
    splits = 5 if many else _BRANCHES[search.space.small]
    left: list[Branch] = []
    while queue and queue[0][0] < search.best.seconds:
        search.lower = min([lower, queue[0][0], *(branch.bound for branch in left)])
        bound, _, branch = heapq.heappop(queue)
        # on small clusters closing prices what there is; of very many columns the root's choices stand for all
        if branch.is_root or not (search.space.small or many):
            branch.raise_from(bound)
        if bound >= search.best.seconds:
            continue
        # before it is decided, a branch has choices of too many sorts
        if search.space.small and branch.decided and branch.close(whatever=False):
            continue
        parts = branch.split() if splits and bound < lower and not search.late() else []
        if not parts and search.space.small and branch.close(whatever=True):
            continue
        splits -= bool(parts)
        for part in parts:
            part.find_bound(bound, search.best.seconds)
            made += 1
            heapq.heappush(queue, (part.bound, made, part))
        left += [] if parts else [branch]
    return left


def _ever(search: Search) -> float:
    """Longer than any plan that fits needs."""
    columns = search.columns
    return 1e3 * float((columns.fill[0] + columns.period * search.batch).max(initial=0.0))


def with_reach(chains: Chains, candidate: Candidate, batch: int, reach: int) -> Candidate | None:
    """The same candidate with stages that run ahead otherwise (see `Setting`), or None where nothing
    changes."""
    other = price(chains, candidate.parts, batch, stage_major=candidate.stage_major, reach=reach)
    return other if other is not None and other.split != candidate.split else None
