"""Plans that are cheapest or need least energy, and plans within limits of time, money and power.

Money and energy depend on which devices work at all. So device types are put in the order of what a row costs on them
alone, and every beginning of that order, whole and in halves down to an eighth of its devices, is planned for speed.
Of these plans the best one within the limits is taken; the closed form chooses a few, the simulator between them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from hethub.cost.compute import ComputeModel
from hethub.errors import InfeasibleError
from hethub.planners.first import FirstPlanner
from hethub.planners.interface import Found, Problem
from hethub.planners.kept import excess_watts
from hethub.planners.pools import Pools
from hethub.simulate.energy import job_of
from hethub.simulate.report import joules_per_token, usd_per_million_tokens
from hethub.specs.constraints import Objective
from hethub.specs.layout import Share
from hethub.specs.resolved import DeviceType

__all__ = ["ObjectiveFigures", "best_plan", "objective_figures"]

_PARTS = (1, 2, 4, 8)  # of the devices: all, a half, ...
_SIMULATED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveFigures:
    """What an objective looks at, of one plan; None where a price or power is not known."""

    step_seconds: float
    tokens: int
    usd_per_million_tokens: float | None
    joules_per_token: float | None

    def of(self, objective: Objective) -> float:
        """What is to be small."""
        if objective.best == "throughput":
            return self.step_seconds
        found = (
            self.usd_per_million_tokens
            if objective.best == "usd_per_million_tokens"
            else self.joules_per_token
        )
        assert found is not None  # refused when the objective was read
        return found

    def job(self, objective: Objective) -> dict[str, tuple[float, float]]:
        """(limit, figure) of each limit of the whole job, by its key."""
        found: dict[str, tuple[float, float]] = {}
        speed = self.tokens / self.step_seconds
        job = job_of(objective.tokens or 0.0, speed, self.joules_per_token, self.usd_per_million_tokens)
        if objective.deadline_hours is not None:
            found["deadline_hours"] = (objective.deadline_hours, job.hours)
        if objective.budget_usd is not None and job.usd is not None:
            found["budget_usd"] = (objective.budget_usd, job.usd)
        return found

    def missed(self, objective: Objective) -> dict[str, tuple[float, float]]:
        """(limit, figure) of each limit of the whole job that is not kept."""
        return {name: pair for name, pair in self.job(objective).items() if pair[1] > pair[0]}

    def excess(self, objective: Objective) -> float:
        """By how much the worst limit is missed, as a share of it; 0 where all hold."""
        return max((figure / limit - 1 for limit, figure in self.job(objective).values()), default=0.0)


def best_plan(
    planner: FirstPlanner,
    problem: Problem,
    objective: Objective,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> Found:
    """The plan that is best by `objective` within its limits. All searches together have about `problem.seconds`.

    Raises InfeasibleError where no plan fits, or none that was found keeps the limits: which one, and the nearest.
    """
    if objective.plain:
        return planner.plan(problem)
    end = clock() + problem.seconds

    def with_time(own: Problem, searches: int) -> Problem:
        """With an even share of what is left, of this and the later searches."""
        return replace(own, seconds=max(0.0, end - clock()) / searches)

    pools = planner.chains(problem).costs.pools
    choices = list(_choices(problem, pools, objective))
    estimated = []
    for number, available in enumerate(choices):
        own = replace(problem, available=available)
        estimate = planner.estimate(with_time(own, len(choices) - number + _SIMULATED))
        if estimate is not None:
            seconds, used = estimate
            figures = _estimated(problem, pools, seconds, used)
            estimated.append((max(0.0, figures.excess(objective)), figures.of(objective), own))
    ranked = sorted(range(len(estimated)), key=lambda i: (estimated[i][:2], i))[:_SIMULATED]
    found: list[tuple[float, float, int, Found, ObjectiveFigures]] = []
    for number, place in enumerate(ranked):
        plan = planner.search(with_time(estimated[place][2], len(ranked) - number))
        if plan is not None:
            figures = objective_figures(plan, problem)
            found.append((max(0.0, figures.excess(objective)), figures.of(objective), place, plan, figures))
    if not found:
        return _fastest(planner, with_time(problem, 1), objective)
    excess, _, _, plan, figures = min(found, key=lambda entry: entry[:3])
    if excess > 0:
        raise InfeasibleError(_unmet(figures.missed(objective), "nearest", objective))
    return plan


def _fastest(planner: FirstPlanner, problem: Problem, objective: Objective) -> Found:
    """The fastest plan on all devices, where no choice of them has one. Raises InfeasibleError where there is none
    either, which says what is short, or where it does not keep the limits."""
    found = planner.plan(problem)
    missed = objective_figures(found, problem).missed(objective)
    missed |= excess_watts(found.modelled.layout, problem.compute.graph, objective)
    if missed:
        raise InfeasibleError(_unmet(missed, "fastest", objective))
    return found


def _unmet(missed: Mapping[str, tuple[float, float]], which: str, objective: Objective) -> str:
    """What is said of the limits that the nearest plan, or the fastest, misses."""
    limits = " and ".join(f"objective.{name}: {limit:,.6g}" for name, (limit, _) in missed.items())
    taken = " and ".join(f"{figure:,.6g} {_unit(name)}" for name, (_, figure) in missed.items())
    job = "" if objective.tokens is None else f" for {objective.tokens:.6g} tokens"
    less = "Raise the limit, lower tokens, or give more devices."
    if any(name.startswith("site_watts") for name in missed):
        less = "Raise the limit, or give devices that need less power or hold more."
    return f"{limits}: no plan that was found keeps to that{job}; the {which} takes {taken}. {less}"


def _unit(limit: str) -> str:
    """Such as `hours`, or `watts in hall-1`."""
    name, _, zone = limit.partition(".")
    unit = name.partition("_")[2]
    return f"{unit} in {zone}" if zone else unit


def _choices(problem: Problem, pools: Pools, objective: Objective) -> Iterator[dict[int, int]]:
    """Devices of each pool that may work; where all must, no fewer."""
    numbers = pools.of_types(problem.types)
    least = sum(pools[n].count for n in numbers) if problem.constraints.use_all else 1
    by_price = sorted(numbers, key=lambda n: (_row_price(problem.compute, pools[n].type, objective), n))
    seen = set()
    cheap = objective.best != "throughput" or objective.budget_usd is not None
    for count in range(1 if cheap else len(by_price), len(by_price) + 1):
        for part in _PARTS if cheap else (1,):
            wanted = {n: max(1, pools[n].count // part) for n in by_price[:count]}
            available = _within_sites(problem, pools, by_price, wanted, objective)
            key = tuple(sorted(available.items()))
            if sum(available.values()) >= least and key not in seen:
                seen.add(key)
                yield available


def _within_sites(
    problem: Problem, pools: Pools, order: list[int], wanted: dict[int, int], objective: Objective
) -> dict[int, int]:
    """As many of the wanted devices as each zone has power for, in order."""
    left = dict(objective.site_watts)
    zones = {group.name: group.zone for group in problem.cluster.node_groups}
    devices = problem.compute.graph.devices
    found = {}
    for n in order:
        number, pool = wanted.get(n, 0), pools[n]
        zone = zones[devices[pool.nodes[0][0]].group]
        if zone in left and pool.type.power_watts:
            number = min(number, int(left[zone] // pool.type.power_watts))
            left[zone] -= number * pool.type.power_watts
        if number:
            found[n] = number
    return found


def _row_price(compute: ComputeModel, device_type: DeviceType, objective: Objective) -> float:
    """What a row costs on a device type alone: seconds of one device, times money or power."""
    workload = compute.workload
    share, rows = Share.whole(workload.model), workload.global_batch
    seconds = workload.model.layers * compute.layer_seconds(device_type, "decoder", share, rows)
    seconds += compute.layer_seconds(device_type, "head", share, rows)
    money = objective.best == "usd_per_million_tokens" or objective.budget_usd is not None
    each = device_type.usd_per_hour if money else device_type.power_watts
    return seconds * (1.0 if each is None else each)


def _estimated(problem: Problem, pools: Pools, seconds: float, used: dict[int, int]) -> ObjectiveFigures:
    """By the closed form, every device in use at full power."""
    tokens = problem.workload.global_batch * problem.workload.sequence_length
    usd = [_times(pools[n].type.usd_per_hour, count) for n, count in used.items()]
    watts = [_times(pools[n].type.power_watts, count) for n, count in used.items()]
    return ObjectiveFigures(
        step_seconds=seconds,
        tokens=tokens,
        usd_per_million_tokens=_times(_sum(usd), seconds / 3600 / tokens * 1e6),
        joules_per_token=_times(_sum(watts), seconds / tokens),
    )


def objective_figures(found: Found, problem: Problem) -> ObjectiveFigures:
    """Of a plan, by its simulation."""
    tokens = problem.workload.global_batch * problem.workload.sequence_length
    modelled, missing = found.modelled.recorded(), dict[str, str]()
    return ObjectiveFigures(
        step_seconds=found.step_seconds,
        tokens=tokens,
        usd_per_million_tokens=usd_per_million_tokens(modelled, found.step_seconds, tokens, missing),
        joules_per_token=joules_per_token(modelled, tokens, missing),
    )


def _times(figure: float | None, factor: float) -> float | None:
    return None if figure is None else figure * factor


def _sum(figures: list[float | None]) -> float | None:
    known = [figure for figure in figures if figure is not None]
    return sum(known) if len(known) == len(figures) else None
