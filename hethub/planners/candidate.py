"""Candidates: priced pipelines with their micro-batches, such that all rows of the batch are done once."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from hethub.apportion import apportion
from hethub.planners.chain import Chain, Chains
from hethub.planners.seats import Crew
from hethub.planners.stage import Setting

__all__ = [
    "Candidate",
    "Entry",
    "Proposal",
    "Rates",
    "Team",
    "divisors",
    "least_tail",
    "lower_bound",
    "price",
    "proposals",
    "quick_bound",
]


class Team(NamedTuple):
    """Pipelines side by side on different devices: (crew, copies) pairs. `family` says how it came about."""

    family: str
    crews: tuple[tuple[Crew, int], ...]

    @property
    def pipelines(self) -> int:
        """How many pipelines."""
        return sum(copies for _, copies in self.crews)

    @property
    def pools(self) -> tuple[int, ...]:
        """Numbers of the pools in use, ascending."""
        return tuple(sorted({seat.pool for crew, _ in self.crews for slot, _ in crew for seat in slot}))


class Proposal(NamedTuple):
    """A team and one number that settles the batch: either all micro-batches have `rows` rows and pipelines
    differ in their number, or all pipelines have `micro_batches` and differ in their rows (the other is 0).
    """

    team: Team
    rows: int
    micro_batches: int


class Entry(NamedTuple):
    """`repeat` alike pipelines with `micro_batches` each."""

    chain: Chain
    micro_batches: int
    repeat: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A whole split in counts of devices. `seconds` is the closed form's step time."""

    proposal: Proposal
    entries: tuple[Entry, ...]
    stage_major: bool
    reach: int
    seconds: float

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for candidates that are the same plan."""
        return (
            self.stage_major,
            tuple((e.chain.stages, e.chain.rows, e.micro_batches, e.repeat) for e in self.entries),
        )


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def proposals(team: Team, batch: int) -> Iterator[Proposal]:
    """All ways to settle a batch of `batch` rows that leave no pipeline empty."""
    pipelines, alike = team.pipelines, len(team.crews) == 1
    for rows in divisors(batch):
        if batch // rows >= pipelines:
            yield Proposal(team, rows, 0)
    for micro_batches in divisors(batch):
        rows = batch // micro_batches
        # equal rows for alike pipelines are among the first kind already
        if rows >= pipelines and not (alike and rows % pipelines == 0):
            yield Proposal(team, 0, micro_batches)


def least_tail(chains: Chains, team: Team) -> float:
    """Seconds that reduction and update of a team take at least, however the layers are divided."""
    return max(chains.tail_bound(crew, _setting(team, copies, 1, False, 0)) for crew, copies in team.crews)


class Rates(NamedTuple):
    """Row-decoders per second of one of `copies` alike pipelines, at the most: of its quickest stage and of all."""

    copies: int
    stage: float
    pipeline: float


def quick_bound(layers: int, rates: list[Rates], proposal: Proposal, batch: int) -> float:
    """A lower bound that needs no prices: rows of any size as quick as the largest, layers in fractions.

    It is below `lower_bound` and much cheaper, so that most proposals are cut off before they have to be priced.
    """
    if proposal.micro_batches:
        # Some pipeline has at least its part of the rows of every round of micro-batches.
        again = proposal.micro_batches - 1
        speed = sum(r.copies / (1.0 / r.stage + again / r.pipeline) for r in rates)
        return layers * (batch // proposal.micro_batches) / speed
    work = layers * proposal.rows
    bounds = [(r.copies, work / r.pipeline, work / r.stage) for r in rates]
    if len(bounds) == 1:
        copies, period, fill = bounds[0]
        return fill + (math.ceil(batch // proposal.rows / copies) - 1) * period
    return _least_seconds(bounds, batch // proposal.rows)


def lower_bound(chains: Chains, proposal: Proposal, batch: int) -> float:
    """Seconds up to the reduction that no division of the layers can beat, cheap to compute.

    Infinite where the rows cannot be dealt or a layer fits nowhere.
    """
    team = proposal.team
    if proposal.micro_batches:
        worst = 0.0
        for crew, rows, _ in _dealt_rows(chains, proposal, batch):
            if rows:
                period, fill = chains.bound(crew, rows)
                worst = max(
                    worst, math.inf if math.isinf(period) else fill + (proposal.micro_batches - 1) * period
                )
        return worst
    bounds = [(copies, *chains.bound(crew, proposal.rows)) for crew, copies in team.crews]
    if any(math.isinf(period) for _, period, _ in bounds):
        return math.inf
    if len(bounds) == 1:
        copies, period, fill = bounds[0]
        return fill + (math.ceil(batch // proposal.rows / copies) - 1) * period
    return _least_seconds(bounds, batch // proposal.rows)


def _least_seconds(bounds: list[tuple[int, float, float]], micro_batches: int) -> float:
    """When (copies, period, fill) pipelines can have done so many micro-batches together, fractions allowed.

    By T a pipeline has done at most 1 + (T - fill) / period, and none before that is positive.
    """
    while True:
        speed = sum(copies / period for copies, period, _ in bounds)
        ahead = sum(copies * (1 - fill / period) for copies, period, fill in bounds)
        seconds = (micro_batches - ahead) / speed
        able = [entry for entry in bounds if seconds > entry[2] - entry[1]]
        if len(able) == len(bounds) or not able:
            return seconds
        bounds = able


def price(
    chains: Chains, proposal: Proposal, batch: int, *, stage_major: bool = False, reach: int = 1
) -> Candidate | None:
    """Divide the layers and the batch; None when some pipeline does not fit."""
    entries = _common_rows(chains, proposal, batch, stage_major, reach)
    if proposal.micro_batches:
        entries = _common_count(chains, proposal, batch, stage_major, reach)
    if entries is None:
        return None
    seconds = max(e.chain.seconds(e.micro_batches) for e in entries)
    seconds += max(e.chain.tail_seconds for e in entries)
    return Candidate(
        proposal=proposal, entries=tuple(entries), stage_major=stage_major, reach=reach, seconds=seconds
    )


def _setting(team: Team, copies: int, micro_batches: int, stage_major: bool, reach: int) -> Setting:
    return Setting(copies, team.pipelines - copies, team.pools, micro_batches, stage_major, reach)


def _common_rows(
    chains: Chains, proposal: Proposal, batch: int, stage_major: bool, reach: int
) -> list[Entry] | None:
    """Every micro-batch alike; each pipeline gets as many as it can do in the same time."""
    team, rows = proposal.team, proposal.rows
    if not rows:
        return None
    total = batch // rows
    priced: list[Chain] = []
    for crew, copies in team.crews:
        # The number is not settled yet: an even deal decides how deep stages may run ahead.
        deal = max(1, total // team.pipelines)
        chain = chains.chain(crew, rows, _setting(team, copies, deal, stage_major, reach))
        if chain is None:
            return None
        priced.append(chain)
    counts = _deal_micro_batches(priced, [copies for _, copies in team.crews], total)
    entries = []
    for chain, (_, copies), count in zip(priced, team.crews, counts, strict=True):
        each, more = divmod(count, copies)
        for repeat, micro_batches in ((more, each + 1), (copies - more, each)):
            if repeat and micro_batches:
                entries.append(Entry(chain, micro_batches, repeat))
    return entries


def _deal_micro_batches(chains: list[Chain], copies: list[int], total: int) -> list[int]:
    """Micro-batches of each crew's copies together: one by one to the pipeline that would then end first."""
    if len(chains) == 1:
        return [total]
    counts = [0] * len(chains)
    queue = [(chain.seconds(1), i) for i, chain in enumerate(chains)]
    heapq.heapify(queue)
    for _ in range(total):
        _, i = queue[0]
        counts[i] += 1
        heapq.heapreplace(queue, (chains[i].seconds(counts[i] // copies[i] + 1), i))
    return counts


def _dealt_rows(chains: Chains, proposal: Proposal, batch: int) -> list[tuple[Crew, int, int]]:
    """(crew, rows of a micro-batch, copies) when every pipeline has the same number of micro-batches."""
    team = proposal.team
    total = batch // proposal.micro_batches
    weights: list[float] = []
    places: list[Crew] = []
    for crew, copies in team.crews:
        least = max(sum(seat.replicas for seat in slot) for slot, _ in crew)
        period = chains.bound(crew, max(1, least, total // team.pipelines))[0]
        weights.extend([1.0 / period] * copies)
        places.extend([crew] * copies)
    if not any(weights):
        weights = [1.0] * len(weights)
    kinds: dict[tuple[Crew, int], int] = {}
    for crew, rows in zip(places, apportion(total, weights), strict=True):
        kinds[crew, rows] = kinds.get((crew, rows), 0) + 1
    return [(crew, rows, copies) for (crew, rows), copies in kinds.items()]


def _common_count(
    chains: Chains, proposal: Proposal, batch: int, stage_major: bool, reach: int
) -> list[Entry] | None:
    """Every pipeline does as many micro-batches, with rows by speed."""
    entries = []
    for crew, rows, copies in _dealt_rows(chains, proposal, batch):
        if rows == 0:
            continue
        setting = _setting(proposal.team, copies, proposal.micro_batches, stage_major, reach)
        chain = chains.chain(crew, rows, setting)
        if chain is None:
            return None
        entries.append(Entry(chain, proposal.micro_batches, copies))
    return entries
