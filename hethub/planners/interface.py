"""The one interface of planners, so that a baseline, a search and a user's own plug in alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from hethub.cost.compute import ComputeModel
from hethub.cost.graph import CostGraph
from hethub.cost.measured import NOT_MEASURED, Measured
from hethub.simulate.modelled import Modelled
from hethub.specs.cluster import Cluster
from hethub.specs.plan import Plan
from hethub.specs.workload import Workload

__all__ = ["Found", "Planner", "Problem", "RunnerUp"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What to plan. `types` limits the device types in use (None: all); `finalists` is how many candidates
    the simulator decides between (None: the planner's own choice).

    `workload` may differ from `compute.workload` in its global batch only, so that prices are shared between
    problems.
    """

    cluster: Cluster
    workload: Workload
    compute: ComputeModel
    types: frozenset[str] | None = None
    finalists: int | None = None

    @classmethod
    def of(cls, cluster: Cluster, workload: Workload, measured: Measured = NOT_MEASURED) -> Problem:
        """The whole cluster and the whole batch."""
        compute = measured.compute(CostGraph(cluster), workload)
        return cls(cluster=cluster, workload=workload, compute=compute)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerUp:
    """A finalist that lost: what it was, its simulated step time, and why it is slower."""

    description: str
    step_seconds: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The plan chosen, its program as it was simulated, how many candidates were considered, and the finalists that
    lost, best first. The simulation has a timeline where the planner had reason to keep one."""

    plan: Plan
    modelled: Modelled
    considered: int
    runners_up: tuple[RunnerUp, ...]

    @property
    def step_seconds(self) -> float:
        """Simulated seconds of a step."""
        return self.modelled.simulation.step_seconds


class Planner(Protocol):
    """Anything that finds a plan."""

    def plan(self, problem: Problem) -> Found:
        """Find a plan. Raises InfeasibleError when none fits: what is short, by how much, what would fit."""
        ...
