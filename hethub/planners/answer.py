"""The whole answer to "how should this cluster train this model": plan, prediction, bounds and baseline
together."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from hethub.cost.bounds import physical_bound
from hethub.cost.measured import NOT_MEASURED, Measured
from hethub.planners.even import EvenPlanner
from hethub.planners.first import FirstPlanner
from hethub.planners.homogeneous import HomogeneousBound, homogeneous_bound
from hethub.planners.interface import Found, Problem
from hethub.program.check import check_plan
from hethub.simulate.modelled import Modelled
from hethub.simulate.report import figures
from hethub.specs.cluster import Cluster
from hethub.specs.plan import Plan
from hethub.specs.workload import Workload

__all__ = ["Answer", "answer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The plan, complete with prediction, bounds and search; what it was found with; and the JSON
    `figures`."""

    plan: Plan
    modelled: Modelled
    homogeneous: HomogeneousBound
    even: Found | None
    figures: dict[str, Any]


def answer(
    cluster: Cluster,
    workload: Workload,
    measured: Measured = NOT_MEASURED,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Answer:
    """Plan, and hold the plan against both bounds and the best even split.

    Raises InfeasibleError when no plan fits and InputError when a needed figure of a device is not known.
    """
    begin = clock()
    problem = Problem.of(cluster, workload, measured)
    planner = FirstPlanner()
    found = planner.plan(problem)
    seconds = clock() - begin
    wrong = check_plan(found.plan)
    if wrong:
        raise AssertionError(f"the planner's plan is not valid: {wrong[0].text}")
    physical = physical_bound(problem.compute)
    homogeneous = homogeneous_bound(planner, problem, physical, whole=found)
    even = EvenPlanner().search(problem)
    tokens = workload.global_batch * workload.sequence_length
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
                "proven_gap": 1.0 - physical.step_seconds / found.step_seconds,
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
