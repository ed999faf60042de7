"""The first planner: simple and honest. Closed forms rank thousands of splits, the simulator decides
between a few."""

from __future__ import annotations

from hethub.planners.candidate import Candidate
from hethub.planners.chain import Chains
from hethub.planners.finalists import Finalist, describe, run_off, why_slower
from hethub.planners.interface import Found, Problem, RunnerUp
from hethub.planners.pools import Pools
from hethub.planners.search import rank, with_reach
from hethub.planners.seats import SeatCosts
from hethub.simulate.modelled import DETAILED_ACTIONS

__all__ = ["FirstPlanner"]

_FINALISTS = 6
_ACTIONS = 350_000  # of all simulated finalists together, about; big plans are simulated less often
_FEW = 3  # micro-batches for each stage
_WIDE = 64  # candidates tried when the best few turn out not to fit by the exact count of updates


class FirstPlanner:
    """Searches the families of `teams.py`. Prices are kept between calls with the same `ComputeModel`."""

    def __init__(self) -> None:
        self._chains: Chains | None = None

    def plan(self, problem: Problem) -> Found:
        """Find a plan. Raises InfeasibleError when none fits."""
        found = self.search(problem)
        if found is None:
            # Loaded here: most problems have a plan, and start-up counts.
            from hethub.planners.shortage import shortage

            raise shortage(problem, self.chains(problem), FirstPlanner().search)
        return found

    def search(self, problem: Problem) -> Found | None:
        """Find a plan, or None when none fits."""
        chains = self.chains(problem)
        pools = chains.costs.pools
        numbers = pools.of_types(problem.types)
        batch = problem.workload.global_batch
        most = _FINALISTS if problem.finalists is None else problem.finalists
        ranking = rank(chains, numbers, batch, most)
        considered = ranking.considered
        affordable = [_first_reach(chains, candidate, batch) for candidate in _affordable(ranking.candidates)]
        # The only finalist's simulation is the one that will be reported: keep its timeline.
        alone = len(affordable) == 1
        finalists = run_off(affordable, problem, pools, record=alone)
        if not finalists and ranking.candidates:
            finalists = self._any_that_fits(problem, numbers)
        if not finalists:
            return None
        if problem.finalists is None and not alone:
            # The simulator also says how deep the best one's stages should run ahead.
            best = finalists[0].candidate
            tried = [with_reach(chains, best, batch, reach) for reach in (0, 1, 2) if reach != best.reach]
            others = list({other.key: other for other in tried if other is not None}.values())
            considered += len(others)
            finalists = sorted([*finalists, *run_off(others, problem, pools)], key=lambda f: f.step_seconds)
        return _found(finalists, ranking.candidates, considered, pools)

    def _any_that_fits(self, problem: Problem, numbers: tuple[int, ...]) -> list[Finalist]:
        """The first of many candidates whose exact memory is within the devices'."""
        chains = self.chains(problem)
        for candidate in rank(chains, numbers, problem.workload.global_batch, _WIDE).candidates:
            finalists = run_off([candidate], problem, chains.costs.pools)
            if finalists:
                return finalists
        return []

    def chains(self, problem: Problem) -> Chains:
        """The prices for this problem's compute model."""
        if self._chains is None or self._chains.costs.compute is not problem.compute:
            self._chains = Chains(SeatCosts(problem.compute, Pools(problem.compute.graph)))
        return self._chains


def _found(finalists: list[Finalist], ranked: tuple[Candidate, ...], considered: int, pools: Pools) -> Found:
    """The winner, and of every other split its best variant."""
    winner, *losers = finalists
    shown = describe(winner.candidate, pools)
    lost: dict[str, RunnerUp] = {}
    for loser in losers:
        description = describe(loser.candidate, pools)
        if description != shown and description not in lost:
            seconds = loser.step_seconds - winner.step_seconds
            reason = why_slower(loser.candidate, winner.candidate, seconds)
            lost[description] = RunnerUp(
                description=description, step_seconds=loser.step_seconds, reason=reason
            )
    return Found(
        plan=winner.plan,
        modelled=winner.modelled,
        considered=considered,
        runners_up=tuple(lost.values()) or _second(winner, ranked, pools),
    )


def _second(winner: Finalist, ranked: tuple[Candidate, ...], pools: Pools) -> tuple[RunnerUp, ...]:
    """The next best by closed form, where only one candidate was simulated; its time is scaled alike."""
    best = winner.candidate
    for other in ranked:
        description = describe(other, pools)
        if description != describe(best, pools) and other.seconds >= best.seconds:
            seconds = winner.step_seconds * other.seconds / best.seconds
            reason = why_slower(other, best, other.seconds - best.seconds)
            reason = f"{reason} (estimated: the plan is too big to simulate more than one)"
            return (RunnerUp(description=description, step_seconds=seconds, reason=reason),)
    return ()


def _first_reach(chains: Chains, candidate: Candidate, batch: int) -> Candidate:
    """Where micro-batches are few, the step is mostly filling and draining: stages run as far ahead as
    memory allows. Else just far enough, since deeper ones crowd the links."""
    if all(entry.micro_batches <= _FEW * len(entry.chain.stages) for entry in candidate.entries):
        return with_reach(chains, candidate, batch, 2) or candidate
    return candidate


def _affordable(candidates: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
    """As many of the best candidates as can be simulated in a few seconds, at least one."""
    count = actions = 0
    for candidate in candidates:
        actions += _actions(candidate)
        if count and actions > _ACTIONS:
            break
        count += 1
    return candidates[:count]


def _actions(candidate: Candidate) -> int:
    """Actions that are simulated, about: forward, backward and four messages of every micro-batch and rank, or of a big
    plan every group."""
    ranks = groups = 0
    for entry in candidate.entries:
        for stage in entry.chain.stages:
            for seat, _ in stage.seats:
                each = 6 * entry.repeat * entry.micro_batches * seat.replicas
                groups, ranks = groups + each, ranks + each * seat.degree
    return ranks if ranks <= DETAILED_ACTIONS else groups
