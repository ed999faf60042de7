"""A plan as the driver uses it: its programs, proven, and what the simulator says of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hethub.cost.compute import ComputeModel
from hethub.cost.graph import CostGraph
from hethub.planners.answer import answer
from hethub.planners.even import EvenPlanner
from hethub.planners.interface import Problem
from hethub.program.actions import Program
from hethub.program.check import require_valid, same_cluster
from hethub.program.compile import compile_program
from hethub.program.memory import program_memory
from hethub.program.prove import prove
from hethub.simulate.comparison import MEASURED, PREDICTED
from hethub.simulate.engine import seconds_by_action, simulate
from hethub.simulate.modelled import Modelled
from hethub.simulate.report import figures
from hethub.specs.document import dump_yaml
from hethub.specs.job import Job
from hethub.specs.layout import lay_out
from hethub.specs.plan import Plan, load_plan, plan_to_spec, save_plan
from hethub.timeline.record import Timeline

__all__ = ["Compiled", "choose_plans", "compile_plan", "read_plan"]

_STEADY_ACTIONS = 50_000  # up to this many per step, the step between two others is predicted


@dataclass(frozen=True)
class Compiled:
    """A plan, its programs, and what the simulator says of it."""

    plan: Plan
    graph: CostGraph
    program: Program
    evaluation: Program
    predicted: Timeline
    predicted_step_seconds: float
    figures: dict[str, Any]

    @cached_property
    def action_seconds(self) -> Mapping[tuple[int, int], float]:
        """(device, action) -> predicted seconds; of a receive: from the message's sending to its arrival."""
        return seconds_by_action(self.predicted)

    def seconds(self, device: int, action: int) -> float:
        """Predicted seconds of an action of the training program."""
        return self.action_seconds.get((device, action), 0.0)

    def longest_seconds(self, device: int, action: int) -> float:
        """Predicted seconds of any action, at most: for evaluation, which has no prediction of its own."""
        return max(self.action_seconds.values())

    @cached_property
    def peak_bytes(self) -> Mapping[int, int]:
        """Predicted peak memory by device."""
        compute = ComputeModel(CostGraph(self.plan.cluster), self.plan.workload)
        return {device: peak.total for device, peak in program_memory(self.program, compute).items()}

    @cached_property
    def digest(self) -> str:
        """Digest of the plan: of what decides the bits, so not of its name, prediction or search."""
        spec = plan_to_spec(self.plan)
        decisive = {key: spec[key] for key in ("pipelines", "workload", "cluster")}
        return hashlib.sha256(dump_yaml(decisive).encode()).hexdigest()

    def names(self) -> tuple[str, ...]:
        """Names of the devices in use, by their index."""
        devices = self.plan.cluster.devices()
        return tuple(devices[d].name for d in self.program.layout.used)

    def measured(self, records: npt.NDArray[np.void], scale: float) -> Timeline:
        """Records of a run of the program, at `scale` wall seconds per modelled second."""
        return Timeline(replace(self.predicted.info, origin=MEASURED, time_scale=scale), records)

    def save(self, folder: Path) -> None:
        """Write plan and prediction into a run folder, where steps that were measured under another are forgotten."""
        (folder / f"{MEASURED}.npz").unlink(missing_ok=True)
        save_plan(self.plan, folder / "plan.yaml")
        self.predicted.save(folder / f"{PREDICTED}.npz")


def compile_plan(plan: Plan) -> Compiled:
    """Compile, prove and simulate a plan."""
    compute = ComputeModel(CostGraph(plan.cluster), plan.workload)
    program = compile_program(lay_out(plan), compute)
    prove(program)
    small = sum(len(actions) for actions in program.devices) <= _STEADY_ACTIONS
    simulation = simulate(program, compute, steps=3 if small else 1)
    modelled = Modelled(
        layout=program.layout,
        compute=compute,
        ownership=program.ownership,
        program=program,
        simulation=simulation,
    )
    evaluation = compile_program(program.layout, compute, ownership=program.ownership, training=False)
    prove(evaluation)
    assert simulation.timeline is not None
    return Compiled(
        plan,
        compute.graph,
        program,
        evaluation,
        simulation.timeline,
        simulation.step_seconds,
        figures(plan, modelled),
    )


def choose_plans(job: Job) -> tuple[Plan, Plan | None]:
    """The plan to train with, searched or read and checked, and the even one where the job compares.

    Raises InputError for a plan file that is not valid or not of the job's cluster and workload, InfeasibleError when
    nothing fits.
    """
    if job.plan is None:
        found = answer(job.cluster, job.workload, constraints=job.constraints, objective=job.objective)
        return found.plan, found.even.plan if found.even and job.compare_even_steps else None
    plan = read_plan(job.plan, job)
    even = EvenPlanner().search(Problem.of(job.cluster, job.workload)) if job.compare_even_steps else None
    return plan, even.plan if even else None


def read_plan(path: Path, job: Job) -> Plan:
    """A plan file, checked. Raises InputError where it is not valid or not of the job's cluster and workload."""
    plan, document = load_plan(path)
    differences = same_cluster(plan, job.cluster)
    if plan.workload != job.workload:
        differences.append("its workload is another one")
    if differences:
        raise document.error(
            ("cluster",),
            f"the plan is not for {job.cluster_path}: {'; '.join(differences)}. Run `hethub plan` again.",
        )
    require_valid(plan, document, str(path))
    return plan
