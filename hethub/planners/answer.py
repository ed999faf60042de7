"""The whole answer to "how should this cluster train this model": plan, prediction, bounds and baseline
together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from hethub.cost.bounds import PhysicalBound, physical_bound
from hethub.cost.measured import NOT_MEASURED, Measured
from hethub.errors import InfeasibleError
from hethub.planners.beside import beside
from hethub.planners.even import EvenPlanner
from hethub.planners.first import FirstPlanner
from hethub.planners.homogeneous import HomogeneousBound, only_type, type_alone
from hethub.planners.interface import Found, Problem, Progress
from hethub.program.check import check_plan
from hethub.simulate.modelled import Modelled
from hethub.simulate.report import figures
from hethub.specs.cluster import Cluster
from hethub.specs.constraints import FASTEST, FREE, Constraints, Objective
from hethub.specs.plan import Plan
from hethub.specs.workload import Workload

__all__ = ["Answer", "EvenSplit", "answer"]


class EvenSplit(NamedTuple):
    """The best even split, and its steady step."""

    plan: Plan
    step_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The plan, complete with prediction, bounds and search; what it was found with; and the JSON
    `figures`."""

    plan: Plan
    modelled: Modelled
    homogeneous: HomogeneousBound
    even: EvenSplit | None
    figures: dict[str, Any]


def answer(
    cluster: Cluster,
    workload: Workload,
    measured: Measured = NOT_MEASURED,
    *,
    constraints: Constraints = FREE,
    objective: Objective = FASTEST,
    time_limit_seconds: float = math.inf,
    progress: Callable[[Progress], None] | None = None,
    may_fork: bool = False,
    whole_batches: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Answer:
    """Plan, and hold the plan against both bounds and the best even split; `progress` is told how far the search is.
    A process that `may_fork` searches for the plan and for what it is held against at the same time. With
    `whole_batches` the homogeneous bound also says what each type reaches with all of the batch.

    Raises InfeasibleError when no plan fits, or none within the objective's limits, and InputError when a needed figure
    of a device is not known or the constraints contradict each other.
    """
    begin = clock()
    problem = Problem.of(cluster, workload, measured, constraints=constraints, seconds=time_limit_seconds)
    physical = physical_bound(problem.compute)
    planner = FirstPlanner()
    names = list(dict.fromkeys(device.type.name for device in problem.compute.graph.devices))
    is_own = len(names) == 1 and _is_free(problem, objective)  # the plan is the only type's own
    tasks = _held_against(planner, problem, physical, [] if is_own else names, whole_batches)
    with beside(tasks, allowed=may_fork) as held_against:
        found = _planned(planner, replace(problem, progress=progress, recorded=True), objective)
        seconds = clock() - begin
        wrong = check_plan(found.plan)
        if wrong:
            raise AssertionError(f"the planner's plan is not valid: {wrong[0].text}")
        *types, even = held_against()
    homogeneous = HomogeneousBound.of([only_type(problem, found)] if is_own else types)
    tokens = workload.global_batch * workload.sequence_length
    gap, by = found.proven_gap, "the closed form over the plan space"
    if gap is None:
        gap, by = 1.0 - physical.step_seconds / found.step_seconds, "the physical bound"
    plan = found.plan.model_copy(
        update={
            "bounds": {
                "homogeneous_tokens_per_second": homogeneous.tokens_per_second,
                "physical_tokens_per_second": tokens / physical.step_seconds,
                "not_a_bound": list(homogeneous.not_a_bound),
                "homogeneous_types": [asdict(entry) for entry in homogeneous.types],
                "even_tokens_per_second": None if even is None else tokens / even.step_seconds,
            },
            "search": {
                "seconds": seconds,
                "considered": found.considered,
                "proven_gap": gap,
                "proven_by": by,
                "loose": found.loose,
                "closed_form_seconds": found.closed_form_seconds,
                "lower_bound_seconds": found.lower_bound_seconds,
                "worth": dict(found.worth),
                "runners_up": [asdict(loser) for loser in found.runners_up],
            },
        }
    )
    modelled = found.modelled.recorded()
    told = figures(plan, modelled, measured.ratio_interval)
    return Answer(
        plan=plan.model_copy(update={"prediction": _prediction(told)}),
        modelled=modelled,
        homogeneous=homogeneous,
        even=even,
        figures=_with_search(told, plan),
    )


def _held_against(
    planner: FirstPlanner,
    problem: Problem,
    physical: PhysicalBound,
    types: Sequence[str],
    whole_batches: bool,
) -> list[Callable[[], Any]]:
    """Tasks that find what a plan is held against, whatever the user fixes of it: each of these types alone, and last
    the best even split."""
    free = replace(problem, constraints=FREE)
    alone = [partial(type_alone, planner, free, physical, name, whole_batch=whole_batches) for name in types]
    return [*alone, partial(_even_split, free)]


def _even_split(problem: Problem) -> EvenSplit | None:
    even = EvenPlanner().search(problem)
    return None if even is None else EvenSplit(even.plan, even.step_seconds)


def _is_free(problem: Problem, objective: Objective) -> bool:
    return objective.plain and problem.constraints == FREE


def _planned(planner: FirstPlanner, problem: Problem, objective: Objective) -> Found:
    if _is_free(problem, objective):
        return planner.plan(problem)
    # Loaded here: most problems have neither, and start-up counts.
    from hethub.planners.conflicts import conflict
    from hethub.planners.objective import best_plan

    try:
        return best_plan(planner, problem, objective)
    except InfeasibleError:
        contradiction = conflict(planner, problem)
        if contradiction is not None:
            raise contradiction from None
        raise


def _prediction(figures: dict[str, Any]) -> dict[str, Any]:
    """What the plan file keeps of the figures."""
    kept = (
        "step_seconds",
        "step_seconds_interval_95",
        "tokens_per_second",
        "share",
        "device_types",
        "joules_per_token",
        "usd_per_million_tokens",
    )
    return {key: figures[key] for key in kept}


def _with_search(figures: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """The figures of `plan`: those of a prediction and how the plan was found, the plan itself last."""
    content = {key: value for key, value in figures.items() if key != "plan"}
    content["search"] = plan.search
    content["plan"] = {**figures["plan"], "prediction": _prediction(figures)}
    return content
