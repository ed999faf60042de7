"""Our planner: it searches over counts of interchangeable devices with bounds and closed forms (`search.py`), and the
simulator decides between the best few."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hethub.planners.candidate import Candidate
from hethub.planners.chain import Chains
from hethub.planners.finalists import (
    FIRST_SCHEDULE,
    Finalist,
    actions_of,
    describe,
    is_simulated_whole,
    run_off,
    simulate_plan,
    simulate_with_room,
    why_slower,
)
from hethub.planners.interface import Found, Problem, RunnerUp
from hethub.planners.pools import Pools
from hethub.planners.search import Ranking, rank, with_reach
from hethub.planners.seats import SeatCosts
from hethub.planners.space import space_of
from hethub.simulate.modelled import Modelled
from hethub.specs.constraints import FREE
from hethub.specs.plan import Plan

__all__ = ["Choice", "FirstPlanner", "steady_with_room"]

_FINALISTS = 6
_RANKED = 4  # times as many are ranked, so that those are among them which split backwards make the best
_ACTIONS = 350_000  # of all simulated finalists together, about; big plans are simulated less often
_PART_ACTIONS = 120_000  # of a candidate that is simulated in part, as it counts here
_COMPLETED = 2  # finalists whose steady step is simulated, at most
_DEEP = 2  # the reach that is tried first
_SMALL_ACTIONS = 10_000  # about; of programs up to here one depth is simulated
_FAR = 1.2  # times the best step: candidates that are not said to come so near were hardly ever quicker
_LISTED = 2  # finalists that are tried under the list schedule
_WAITS = 1.045  # of the unblocked seconds: steps below have too little to gain under a schedule with less in flight
_UNLIKE_RATIOS = 0.03  # about the most that it was seen to shorten one's step more than another's
_WIDE = 64  # candidates tried when the best few turn out not to fit by the exact count of updates


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A plan chosen: the finalists, best first, how the search went,
    and what it proves."""

    finalists: tuple[Finalist, ...]
    ranking: Ranking
    considered: int
    pools: Pools

    @property
    def plan(self) -> Plan:
        """The winner's."""
        return self.finalists[0].plan

    @property
    def simulated(self) -> int:
        """Finalists that were simulated."""
        return len(self.finalists)

    @property
    def closed_form_seconds(self) -> float:
        """The winner's step by the closed form."""
        return self.finalists[0].candidate.seconds

    @property
    def proven_gap(self) -> float:
        """1 - lower bound / step, both by the closed form."""
        return max(0.0, 1.0 - self.ranking.lower_bound_seconds / self.closed_form_seconds)


class FirstPlanner:
    """Searches the space of `space.py`. Prices are kept between calls with the same `ComputeModel`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._chains: Chains | None = None
        self._clock = clock

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
        choice = self.choose(problem)
        return self._even(problem) if choice is None else self.complete(choice, problem)

    def choose(self, problem: Problem) -> Choice | None:
        """Choose a plan; of a big one only a part is simulated. None when none fits, however little time there is."""
        begin, chains = self._clock(), self.chains(problem)
        pools = chains.costs.pools
        most = _FINALISTS if problem.finalists is None else problem.finalists
        ranking = self._rank(problem, _RANKED * most)
        considered = ranking.considered
        turn = _in_turn(ranking.candidates)
        chosen = _affordable(turn[:most])
        finalists = self._simulated(chosen, problem)
        if most > 1 and all(finalist.candidate.schedule != FIRST_SCHEDULE for finalist in finalists):
            finalists += self._roomy(turn[len(chosen) :], problem, begin + problem.seconds)
            finalists.sort(key=lambda finalist: finalist.step_seconds)
        if not finalists and ranking.candidates:
            finalists = self._any_that_fits(problem)
        if not finalists:
            return None
        late = self._clock() - begin >= problem.seconds
        if finalists[0].modelled is not None and most > 1 and not late:
            others = self._listed(finalists, problem)
            considered += len(others)
            finalists = sorted([*finalists, *others], key=lambda f: f.step_seconds)
        return Choice(finalists=tuple(finalists), ranking=ranking, considered=considered, pools=pools)

    def _simulated(self, chosen: Sequence[Candidate], problem: Problem) -> list[Finalist]:
        """Candidates under split 1F1B, as far ahead as fits, the quickest first. Those of programs that are not small
        are also simulated just as far ahead as links ask for: either was seen to be 8 % the quicker. No more are
        simulated than may be the quickest."""
        chains, batch = self.chains(problem), problem.workload.global_batch
        near = [replace(candidate, schedule=FIRST_SCHEDULE) for candidate in chosen]
        deep = [_with(chains, candidate, batch, _DEEP, FIRST_SCHEDULE) for candidate in chosen]
        if not all(is_simulated_whole(candidate) for candidate in chosen):
            both = {variant.key: variant for pair in zip(near, deep, strict=True) for variant in pair}
            return run_off(both.values(), problem, chains.costs.pools)
        small = all(actions_of(candidate) <= _SMALL_ACTIONS for candidate in chosen)
        found: list[Finalist] = []
        for one, other in zip(near, deep, strict=True):
            reaches = [_DEEP] if small or one.key == other.key else [_DEEP, one.reach]
            for reach in reaches:
                best = min((f.step_seconds for f in found), default=math.inf)
                about = min(one.unblocked_seconds, one.split_backward_seconds)
                if max(one.least_seconds, about / _FAR) >= best:
                    break
                done = _deepest(chains, one, problem, FIRST_SCHEDULE, reach)
                done = done or _deepest(chains, one, problem, "1f1b", reach)  # which takes less memory
                found += done
                if not done or done[0].candidate.key != other.key:  # less deep ones have been tried
                    break
        return sorted(found, key=lambda finalist: finalist.step_seconds)

    def _roomy(self, candidates: Sequence[Candidate], problem: Problem, end: float) -> list[Finalist]:
        """The first of these that has the memory to split backwards, looked for until `end`; of those that are
        simulated whole. The closed form likes others better, but counts no such memory."""
        for candidate in candidates:
            if self._clock() >= end:
                break
            if is_simulated_whole(candidate):
                done = _deepest(self.chains(problem), candidate, problem, FIRST_SCHEDULE)
                if done:
                    return done
        return []

    def _listed(self, finalists: Sequence[Finalist], problem: Problem) -> list[Finalist]:
        """The best few under the list schedule, which takes longer to make, where it may be the quickest."""
        chains, few = self.chains(problem), 1 if problem.finalists is not None else _LISTED
        best = finalists[0].step_seconds
        ratio = 0.0  # of a step under the list schedule to that under split 1F1B
        found = list[Finalist]()
        for finalist in finalists[:few]:
            step, candidate = finalist.step_seconds, finalist.candidate
            split = candidate.schedule == FIRST_SCHEDULE
            ratio = ratio if split else 0.0
            if max(candidate.least_seconds, step * (ratio - _UNLIKE_RATIOS)) >= best:
                continue
            least = 0 if step > _WAITS * candidate.unblocked_seconds else candidate.reach
            done = _deepest(chains, candidate, problem, "list", least=least)
            found += done
            best = min([best, *(f.step_seconds for f in done)])
            # with less in flight it says nothing of the next one
            alike = [f for f in done if split and f.candidate.reach >= candidate.reach]
            ratio = max([ratio, *(f.step_seconds / step for f in alike)])
        return found

    @staticmethod
    def complete(choice: Choice, problem: Problem) -> Found | None:
        """Of the best few finalists that fit the one whose steady step is the shortest; no more of them are simulated
        than may be the quickest. One that was simulated in part so far may turn out longer; of one that was whole a
        following step hides at most the tail."""
        done: list[tuple[Finalist, Modelled]] = []
        others: list[Finalist] = []
        for finalist in choice.finalists:
            hidden = 0.0 if finalist.modelled is None else finalist.candidate.tail_seconds
            least = min((m.simulation.step_seconds for _, m in done), default=math.inf)
            if len(done) == _COMPLETED or finalist.step_seconds - hidden >= least:
                others.append(finalist)
                continue
            steady = _steady(finalist, problem)
            if steady is not None:
                done.append(steady)
        return _found(done, others, choice) if done else None

    def _rank(self, problem: Problem, most: int) -> Ranking:
        chains, batch = self.chains(problem), problem.workload.global_batch
        numbers = chains.costs.pools.of_types(problem.types)
        if problem.available is not None:
            numbers = tuple(n for n in numbers if problem.available.get(n))
        space = space_of(chains.costs, numbers, batch, problem.constraints, problem.available)
        return rank(chains, space, batch, most, seconds=problem.seconds, progress=problem.progress)

    def estimate(self, problem: Problem) -> tuple[float, dict[int, int]] | None:
        """(Seconds of a step by the closed form, devices in use of each pool) of the best candidate, or None."""
        candidates = self._rank(problem, 1).candidates
        if not candidates:
            return None
        used: dict[int, int] = {}
        for entry in candidates[0].entries:
            for stage in entry.chain.stages:
                for seat, _ in stage.seats:
                    used[seat.pool] = used.get(seat.pool, 0) + entry.repeat * seat.replicas * seat.degree
        return candidates[0].seconds, used

    def _any_that_fits(self, problem: Problem) -> list[Finalist]:
        """The first of many candidates whose exact memory is within the devices', however long it takes: the time
        limit may have left few."""
        pools = self.chains(problem).costs.pools
        for candidate in self._rank(replace(problem, seconds=math.inf), _WIDE).candidates:
            finalists = run_off([candidate], problem, pools)
            if finalists:
                return finalists
        return []

    @staticmethod
    def _even(problem: Problem) -> Found | None:
        """The best even split: its groups may join devices of several nodes, which ours never do."""
        if (problem.types, problem.constraints, problem.available) != (None, FREE, None):
            return None
        from hethub.planners.even import EvenPlanner

        return EvenPlanner().search(problem)

    def chains(self, problem: Problem) -> Chains:
        """The prices for this problem's compute model."""
        reserve, known = problem.constraints.memory_reserve_bytes, self._chains
        if known is None or known.costs.compute is not problem.compute:
            known = Chains(SeatCosts(problem.compute, Pools(problem.compute.graph), reserve))
        elif known.costs.reserve_bytes != reserve:
            known = Chains(SeatCosts(problem.compute, known.costs.pools, reserve))
        self._chains = known
        return known


def _found(done: Sequence[tuple[Finalist, Modelled]], others: Sequence[Finalist], choice: Choice) -> Found:
    """The winner, and of every other split its best variant. Steady steps are those of `done`; of `others` the step
    that was simulated is scaled as the winner's."""
    winner, modelled = min(done, key=lambda pair: pair[1].simulation.step_seconds)
    pools, best = choice.pools, modelled.simulation.step_seconds
    losers = [(other, other_modelled.simulation.step_seconds) for other, other_modelled in done]
    scale = best / winner.step_seconds
    losers += [(other, max(best, other.step_seconds * scale)) for other in others]
    shown = describe(winner.candidate, pools)
    lost: dict[str, RunnerUp] = {}
    for loser, seconds in sorted(losers, key=lambda pair: pair[1]):
        description = describe(loser.candidate, pools)
        if description != shown and description not in lost:
            reason = why_slower(loser.candidate, winner.candidate, seconds - best)
            lost[description] = RunnerUp(description=description, step_seconds=seconds, reason=reason)
    return Found(
        plan=winner.plan,
        modelled=modelled,
        considered=choice.considered,
        runners_up=tuple(lost.values()) or _second(winner, modelled, choice.ranking.candidates, pools),
        closed_form_seconds=winner.candidate.seconds,
        lower_bound_seconds=choice.ranking.lower_bound_seconds,
        loose=choice.ranking.loose,
        worth=_by_type(choice.ranking.worth, pools),
    )


def _by_type(worth: dict[int, float], pools: Pools) -> dict[str, float]:
    """Of several pools of a type the one where another device is worth most."""
    found: dict[str, float] = {}
    for pool, share in worth.items():
        name = pools[pool].type.name
        found[name] = max(share, found.get(name, 0.0))
    return found


def _second(
    winner: Finalist, modelled: Modelled, ranked: tuple[Candidate, ...], pools: Pools
) -> tuple[RunnerUp, ...]:
    """The next best by closed form, where only one candidate was simulated; its time is scaled alike."""
    best = winner.candidate
    shown = describe(replace(best, schedule="1f1b"), pools)
    for other in ranked:
        description = describe(other, pools)
        if description != shown and other.seconds >= best.seconds:
            seconds = modelled.simulation.step_seconds * other.seconds / best.seconds
            reason = why_slower(other, best, other.seconds - best.seconds)
            reason = f"{reason} (estimated: the plan is too big to simulate more than one)"
            return (RunnerUp(description=description, step_seconds=seconds, reason=reason),)
    return ()


def _deepest(
    chains: Chains, candidate: Candidate, problem: Problem, schedule: str, most: int = _DEEP, least: int = 0
) -> list[Finalist]:
    """The candidate with stages that run as far ahead as fits, with a reach of at most `most` and at least `least`,
    simulated under the schedule; none where it does not fit."""
    tried = set()
    for reach in range(most, least - 1, -1):
        varied = _with(chains, candidate, problem.workload.global_batch, reach, schedule)
        if varied.key in tried:  # that reach changes nothing
            continue
        tried.add(varied.key)
        done = run_off([varied], problem, chains.costs.pools)
        if done:
            return done
    return []


def _steady(finalist: Finalist, problem: Problem) -> tuple[Finalist, Modelled] | None:
    """A finalist with its steady step; one that was simulated in part as `steady_with_room` mends it. None where it
    does not fit."""
    if finalist.modelled is not None:
        return finalist, finalist.modelled.steady(record=problem.recorded)
    mended = steady_with_room(finalist.plan, problem)
    if mended is None:
        return None
    plan, modelled = mended
    candidate = replace(finalist.candidate, schedule=plan.pipelines[0].schedule)
    return replace(finalist, candidate=candidate, plan=plan), modelled


def steady_with_room(plan: Plan, problem: Problem) -> tuple[Plan, Modelled] | None:
    """The plan with its steady step: where its schedule has not the memory with less in flight, or else under 1F1B.
    None where it does not fit so either."""
    reserve, record = problem.constraints.memory_reserve_bytes, problem.recorded
    roomy = simulate_with_room(plan, problem.compute, reserve_bytes=reserve, steady=True, record=record)
    if roomy is not None:
        return roomy
    pipelines = [pipeline.model_copy(update={"schedule": "1f1b"}) for pipeline in plan.pipelines]
    plan = plan.model_copy(update={"pipelines": pipelines})
    modelled = simulate_plan(plan, problem.compute, reserve_bytes=reserve, steady=True, record=record)
    return None if modelled is None else (plan, modelled)


def _in_turn(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The best by what a good schedule reaches where nothing holds it up, the best by the closed form with split
    backwards, the next, and so on, each once."""
    unblocked = sorted(candidates, key=lambda candidate: candidate.unblocked_seconds)
    split = sorted(candidates, key=lambda candidate: candidate.split_backward_seconds)
    both = (candidate for pair in zip(unblocked, split, strict=True) for candidate in pair)
    return tuple({id(candidate): candidate for candidate in both}.values())


def _with(chains: Chains, candidate: Candidate, batch: int, reach: int, schedule: str) -> Candidate:
    """The candidate with stages that run ahead otherwise, under another schedule."""
    other = candidate if reach == candidate.reach else with_reach(chains, candidate, batch, reach)
    return replace(other or candidate, schedule=schedule)


def _affordable(candidates: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
    """As many of the best candidates as can be simulated in a few seconds, at least one."""
    count = actions = 0
    for candidate in candidates:
        actions += min(_PART_ACTIONS, actions_of(candidate))
        if count and actions > _ACTIONS:
            break
        count += 1
    return candidates[:count]
