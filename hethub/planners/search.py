"""Best-first search over proposals: lower bounds, first very cheap and then dearer ones, decide which are priced,
closed-form prices which are kept."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

from hethub.planners.candidate import (
    Candidate,
    Proposal,
    Rates,
    Team,
    least_tail,
    lower_bound,
    price,
    proposals,
    quick_bound,
)
from hethub.planners.chain import Chains
from hethub.planners.seats import Crew, SeatCosts, crew_size
from hethub.planners.teams import orders, teams

__all__ = ["Ranking", "rank", "with_reach"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """The best candidates by closed form, ascending; `considered` counts all proposals, those cut off by a
    bound and those that do not fit included."""

    candidates: tuple[Candidate, ...]
    considered: int


class _Best:
    """The `most` best distinct candidates so far."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.kept: dict[tuple[object, ...], Candidate] = {}

    @property
    def limit(self) -> float:
        """What a new candidate must beat."""
        if len(self.kept) < self.most:
            return math.inf
        return max(candidate.seconds for candidate in self.kept.values())

    def offer(self, candidate: Candidate) -> None:
        limit = self.limit
        if candidate.seconds >= limit or candidate.key in self.kept:
            return
        if limit < math.inf:
            del self.kept[max(self.kept, key=lambda key: self.kept[key].seconds)]
        self.kept[candidate.key] = candidate

    def ascending(self) -> tuple[Candidate, ...]:
        return tuple(sorted(self.kept.values(), key=lambda candidate: candidate.seconds))


def rank(chains: Chains, numbers: tuple[int, ...], batch: int, most: int) -> Ranking:
    """Find the `most` best distinct candidates for a batch of `batch` rows on the pools `numbers`."""
    costs = chains.costs
    queue: list[tuple[float, int, bool, Proposal]] = []  # the bound, and whether it is the dear one
    considered = 0
    for team in dict.fromkeys(teams(costs, numbers, batch)):
        rates = [Rates(copies, *chains.rates(crew, batch)) for crew, copies in team.crews]
        for proposal in proposals(team, batch):
            considered += 1
            queue.append((quick_bound(chains.layers, rates, proposal, batch), considered, False, proposal))
    heapq.heapify(queue)
    best = _Best(most)
    while queue and queue[0][0] < best.limit:
        bound, number, dear, proposal = heapq.heappop(queue)
        if dear:
            considered += _offer_variants(chains, proposal, batch, best)
            continue
        bound = least_tail(chains, proposal.team) + lower_bound(chains, proposal, batch)
        if bound < math.inf:
            heapq.heappush(queue, (bound, number, True, proposal))
    return Ranking(candidates=best.ascending(), considered=considered)


def _offer_variants(chains: Chains, proposal: Proposal, batch: int, best: _Best) -> int:
    """Price a proposal in all orders of its pools and both ways to deal out units; returns how many more
    these are."""
    variants = _variants(chains.costs, proposal)
    ways = (False, True) if _repeats(proposal) else (False,)
    for variant in variants:
        for stage_major in ways:
            candidate = price(chains, variant, batch, stage_major=stage_major)
            if candidate is not None:
                best.offer(candidate)
    return len(variants) * len(ways) - 1


def _repeats(proposal: Proposal) -> bool:
    """Whether dealing out by stage or by pipeline differs."""
    return any(copies > 1 and crew_size(crew) > 1 for crew, copies in proposal.team.crews)


def _variants(costs: SeatCosts, proposal: Proposal) -> list[Proposal]:
    """The proposal with its pools in other orders along the pipelines."""
    pools = proposal.team.pools
    if len(pools) == 1 or proposal.team.family in ("mixed", "beside"):
        return [proposal]
    found = []
    for order in orders(costs, pools):
        place = {pool: number for number, pool in enumerate(order)}
        crews = tuple((_sorted(crew, place), copies) for crew, copies in proposal.team.crews)
        found.append(proposal._replace(team=Team(proposal.team.family, crews)))
    return found


def _sorted(crew: Crew, place: dict[int, int]) -> Crew:
    return tuple(sorted(crew, key=lambda run: place[run[0][0].pool]))


def with_reach(chains: Chains, candidate: Candidate, batch: int, reach: int) -> Candidate | None:
    """The same candidate with stages that run ahead otherwise (see `Setting`), or None where nothing
    changes."""
    other = price(chains, candidate.proposal, batch, stage_major=candidate.stage_major, reach=reach)
    return other if other is not None and other.key != candidate.key else None
