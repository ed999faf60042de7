"""The one interface of planners, so that a baseline, a search and a user's own plug in alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from hethub.cost.compute import ComputeModel
from hethub.cost.graph import CostGraph
from hethub.cost.measured import NOT_MEASURED, Measured
from hethub.simulate.modelled import Modelled
from hethub.specs.cluster import Cluster
from hethub.specs.constraints import FREE, Constraints
from hethub.specs.plan import Plan
from hethub.specs.workload import Workload

__all__ = ["Found", "Planner", "Problem", "Progress", "RunnerUp"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a search is: pipelines bounded and plans priced, the best step so far by the closed form (None: none
    yet), and what no plan can have (0 until all bounds are known)."""

    considered: int
    best_seconds: float | None
    lower_bound_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What to plan. `types` limits the device types in use (None: all); `finalists` is how many candidates
    the simulator decides between (None: the planner's own choice). `constraints` are what the user fixes, and a planner
    has about `seconds` for its search. `available` limits the devices in use of each pool (None: all). `progress` is
    told now and then how far the search is. Where it is `recorded`, the answer's simulation has a timeline.

    `workload` may differ from `compute.workload` in its global batch only, so that prices are shared between
    problems.
    """

    cluster: Cluster
    workload: Workload
    compute: ComputeModel
    types: frozenset[str] | None = None
    finalists: int | None = None
    constraints: Constraints = FREE
    seconds: float = math.inf
    available: Mapping[int, int] | None = None
    progress: Callable[[Progress], None] | None = None
    recorded: bool = False

    @classmethod
    def of(
        cls,
        cluster: Cluster,
        workload: Workload,
        measured: Measured = NOT_MEASURED,
        *,
        constraints: Constraints = FREE,
        seconds: float = math.inf,
    ) -> Problem:
        """The whole cluster and the whole batch."""
        return cls(
            cluster=cluster,
            workload=workload,
            compute=measured.compute(CostGraph(cluster), workload),
            constraints=constraints,
            seconds=seconds,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerUp:
    """A finalist that lost: what it was, its simulated step time, and why it is slower."""

    description: str
    step_seconds: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The plan chosen, its program as it was simulated, how many candidates were considered, and the finalists that
    lost, best first. The simulation has a timeline where the planner had reason to keep one.

    `closed_form_seconds` is the step by the closed form that ranked the plan, and `lower_bound_seconds` what no plan of
    the planner's space can have by it (None: the planner proves nothing); `loose` names the plans that the bound is of
    (None: of the best candidate itself). `worth` is what one more device of a type
    would take off that bound, as a share of it.
    """

    plan: Plan
    modelled: Modelled
    considered: int
    runners_up: tuple[RunnerUp, ...]
    closed_form_seconds: float | None = None
    lower_bound_seconds: float | None = None
    loose: str | None = None
    worth: Mapping[str, float] = field(default_factory=dict)

    @property
    def step_seconds(self) -> float:
        """Simulated seconds of a step."""
        return self.modelled.simulation.step_seconds

    @property
    def proven_gap(self) -> float | None:
        """1 - lower bound / step, both by the closed form: how far the plan can be from the best of its space."""
        if self.closed_form_seconds is None or self.lower_bound_seconds is None:
            return None
        return max(0.0, 1.0 - self.lower_bound_seconds / self.closed_form_seconds)


class Planner(Protocol):
    """Anything that finds a plan."""

    def plan(self, problem: Problem) -> Found:
        """Find a plan. Raises InfeasibleError when none fits: what is short, by how much, what would fit."""
        ...
