"""A plan made anew for the devices and links as a run measured them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hethub.cost.compute import ComputeModel
from hethub.cost.graph import CostGraph
from hethub.errors import InfeasibleError, InputError
from hethub.planners.finalists import fits
from hethub.planners.first import FirstPlanner, steady_with_room
from hethub.planners.interface import Problem
from hethub.planners.objective import best_plan
from hethub.program.check import check_plan
from hethub.program.updaters import own_by_strength
from hethub.simulate.pace import MOVED, Expected, Pace, median_pace, paced_graph, paced_step_seconds
from hethub.specs.constraints import FASTEST, FREE, Constraints, Objective
from hethub.specs.layout import lay_out
from hethub.specs.plan import Plan
from hethub.timeline.record import Timeline
from hethub.timeline.summary import step_numbers

__all__ = ["Replanned", "pace_of_run", "replan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replanned:
    """The plan at hand and a new one under the measured pace. Both steps are simulated at it, as they would be launched
    now; `plan` is the old one where the new one is no faster. The plan keeps the cluster file's figures, so that a job
    of that cluster takes it."""

    plan: Plan
    pace: Pace
    old_step_seconds: float
    new_step_seconds: float

    @property
    def gain(self) -> float:
        """How much more the new plan does in the same time: 0.1 is a tenth more."""
        return self.old_step_seconds / self.new_step_seconds - 1.0


def _candidates(problem: Problem, objective: Objective) -> list[Plan]:
    """The planner's finalists: it orders their actions by the measured pace, a launch by the cluster file's figures, so
    the best of the one need not be that of the other."""
    planner = FirstPlanner()
    if not (objective.plain and problem.constraints == FREE):
        return [best_plan(planner, problem, objective).plan]
    choice = planner.choose(problem)
    return [planner.plan(problem).plan] if choice is None else [one.plan for one in choice.finalists]


def _with_room(plan: Plan, problem: Problem) -> Plan | None:
    """A candidate as it fits when it is launched, by the cluster file's figures: its search shared out updates at the
    measured pace, and did not look at the memory of a big one at all. None where it does not fit."""
    layout = lay_out(plan)
    ownership = own_by_strength(layout, problem.compute)
    if fits(problem.compute, layout, ownership, problem.constraints.memory_reserve_bytes):
        return plan
    mended = steady_with_room(plan, problem)
    return None if mended is None else mended[0]


def _fitting(problem: Problem, objective: Objective) -> list[Plan]:
    """The candidates that fit when they are launched, so mended. Raises InfeasibleError where none does."""
    as_launched = replace(problem, compute=ComputeModel(CostGraph(problem.cluster), problem.workload))
    mended = (_with_room(found, as_launched) for found in _candidates(problem, objective))
    found = [plan for plan in mended if plan is not None]
    if not found:
        raise InfeasibleError(
            f"{problem.cluster.name}: of the plans found for the measured pace none fits the devices' memory. "
            "Keep the plan at hand, or add devices."
        )
    return found


def pace_of_run(
    plan: Plan, predicted: Timeline, measured: Timeline, steps: Sequence[int]
) -> tuple[Pace, list[int]]:
    """The median pace of those of `steps` that were measured, with what is left of the bandwidth of links that moved;
    and which steps they are. Raises InputError without any."""
    chosen = [step for step in step_numbers(measured).tolist() if step in set(steps)]
    if not chosen:
        raise InputError("replan: no such step was measured. Choose others.")
    expected = Expected(predicted, CostGraph(plan.cluster))
    records, scale = measured.records, measured.info.time_scale
    pace = median_pace([expected.pace(records, step, scale) for step in chosen])
    moved = [link for link, ratio in pace.links.items() if ratio > MOVED]
    shares = {link: expected.bandwidth_share(records, chosen, link) for link in moved}
    return replace(pace, bandwidth=shares), chosen


def replan(
    plan: Plan, pace: Pace, *, constraints: Constraints = FREE, objective: Objective = FASTEST
) -> Replanned:
    """Search a plan for the cluster at a measured pace. Raises InfeasibleError as planning does, and where what
    was found does not fit by the cluster file's figures."""
    graph = paced_graph(CostGraph(plan.cluster), pace)
    problem = Problem(
        cluster=plan.cluster,
        workload=plan.workload,
        compute=ComputeModel(graph, plan.workload),
        constraints=constraints,
    )
    old_seconds = paced_step_seconds(plan, pace)
    new, new_seconds = plan, old_seconds
    for found in _fitting(problem, objective):
        other = found.model_copy(
            update={"name": plan.name, "cluster": plan.cluster, "bounds": plan.bounds, "search": None}
        )
        wrong = check_plan(other)
        if wrong:
            raise AssertionError(f"the planner's plan is not valid: {wrong[0].text}")
        seconds = paced_step_seconds(other, pace)
        if seconds < new_seconds:
            new, new_seconds = other, seconds
    tokens = plan.workload.global_batch * plan.workload.sequence_length
    prediction = {"step_seconds": new_seconds, "tokens_per_second": tokens / new_seconds}
    return Replanned(
        plan=new if new is plan else new.model_copy(update={"prediction": prediction}),
        pace=pace,
        old_step_seconds=old_seconds,
        new_step_seconds=new_seconds,
    )
