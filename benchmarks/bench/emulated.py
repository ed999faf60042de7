"""Runs of plans on emulated devices, one process a device without Ray, and the checks that make their figures count."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.results import ROOT
from bench.splits import compute_of
from hethub.cost.bounds import physical_bound
from hethub.cost.compute import ComputeModel
from hethub.program.actions import Program
from hethub.simulate.engine import Simulation, simulate
from hethub.specs.plan import Plan
from hethub.timeline.record import COMPUTE_KINDS, Kind, Timeline
from hethub.timeline.summary import step_numbers, step_seconds, summarize
from hethub.timeline.waterfall import Waterfall, waterfall

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # a benchmark runs as a file: only its own folder is on the path
from tests.launch.pool import SETTINGS, Pool, Trained

__all__ = ["Pool", "Run", "cheats", "measure", "price_seconds", "problems", "reference_losses"]

MOST_REAL_MATH = 0.05
MOST_OVERRUNS = 0.01
MIN_OF_PREDICTION = 0.96
CLOCK_SECONDS = 1e-6  # two readings of one clock, and sums of floats, may differ by this
LOSSES_DIFFER = 1e-4
PIPELINE_KINDS = (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)


@dataclass(frozen=True)
class Run:
    """A plan that trained on emulated devices; the first `warm` steps do not count."""

    plan: Plan
    trained: Trained
    warm: int

    @property
    def program(self) -> Program:
        """What every worker executed."""
        return self.trained.program

    @property
    def timeline(self) -> Timeline:
        """The measured records of all steps."""
        return self.trained.timeline

    @cached_property
    def compute(self) -> ComputeModel:
        """The prices of its cluster and workload."""
        return compute_of(self.plan)

    @cached_property
    def all_step_seconds(self) -> list[float]:
        """Modelled seconds of every step, those of the warm-up included."""
        return [float(seconds) for seconds in step_seconds(self.timeline)]

    @cached_property
    def measured_step_seconds(self) -> float:
        """Modelled seconds of a step: the median after the warm-up."""
        return float(np.median(self.all_step_seconds[self.warm :]))

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.plan.workload.global_batch * self.plan.workload.sequence_length

    @property
    def tokens_per_second(self) -> float:
        """Modelled."""
        return self.tokens / self.measured_step_seconds

    @cached_property
    def bound_step_seconds(self) -> float:
        """The physical bound of its devices and batch."""
        return physical_bound(self.compute).step_seconds

    @property
    def physical_share(self) -> float:
        """Of the physical bound."""
        return self.bound_step_seconds / self.measured_step_seconds

    @cached_property
    def _simulation(self) -> Simulation:
        return simulate(self.program, self.compute, steps=3)

    @property
    def predicted(self) -> Timeline:
        """The prediction as a launch makes it: a step between two others."""
        assert self._simulation.timeline is not None
        return self._simulation.timeline

    @property
    def predicted_step_seconds(self) -> float:
        """What the simulator says."""
        return self._simulation.step_seconds

    @cached_property
    def losses_of_time(self) -> Waterfall:
        """Where the measured steps' time went, devices weighed by their speed."""
        bound = physical_bound(self.compute)
        names = [device.type.name for device in self.compute.graph.devices]
        speeds = [bound.shares[name] / names.count(name) for name in names]
        numbers = step_numbers(self.timeline)
        return waterfall(self.timeline, int(numbers[self.warm]), int(numbers[-1]), speeds)

    def real_math_ratio(self) -> float:
        """Wall time of real math over the wall time of compute actions, the worst device's."""
        numbers = step_numbers(self.timeline)
        return max(s.real_ratio for s in summarize(self.timeline, int(numbers[self.warm]), int(numbers[-1])))

    def overrun_ratio(self) -> float:
        """Compute actions after the warm-up whose real work passed their deadline."""
        records = self.timeline.records
        first = step_numbers(self.timeline)[self.warm]
        kinds = [int(kind) for kind in COMPUTE_KINDS]
        compute = records[np.isin(records["kind"], kinds) & (records["step"] >= first)]
        return float(np.mean(compute["overrun"] > 0))

    def shortest_action_seconds(self) -> float:
        """Wall seconds of the shortest whole forward or backward action that the plan runs."""
        kinds = {action.kind for actions in self.program.devices for action in actions}
        prices = [
            self.compute.group_price(r.ranks, s.layers, r.rows[1] - r.rows[0], kind).seconds
            for pipeline in self.program.layout.pipelines
            for s in pipeline.stages
            for r in s.replicas
            for kind in PIPELINE_KINDS
            if kind in kinds
        ]
        return min(prices) * self.timeline.info.time_scale

    def as_raw(self) -> dict[str, Any]:
        """Everything behind the figures, as JSON can hold it."""
        return {
            "step_seconds": self.all_step_seconds,
            "warm_up_steps": self.warm,
            "global_batch": self.plan.workload.global_batch,
            "tokens_per_second": self.tokens_per_second,
            "predicted_step_seconds": self.predicted_step_seconds,
            "physical_step_seconds": self.bound_step_seconds,
            "physical_share": self.physical_share,
            # of the mean step, which is what `lost_time` explains
            "mean_physical_share": self.bound_step_seconds
            / float(np.mean(self.all_step_seconds[self.warm :])),
            "real_math_ratio": self.real_math_ratio(),
            "overrun_ratio": self.overrun_ratio(),
            "losses": self.trained.losses,
            "lost_time": self.losses_of_time.as_dict(),
            "pipelines": [p.model_dump(mode="json", exclude_defaults=True) for p in self.plan.pipelines],
        }


def measure(pool: Pool, plan: Plan, *, steps: int, warm: int) -> Run:
    """Train `warm` + `steps` steps on a pool of as many processes as the plan's cluster has devices."""
    scale = plan.cluster.emulated_time_scale
    if not isinstance(scale, float):
        raise ValueError(f"{plan.name}: the cluster has no fixed time_scale")
    return Run(plan, pool.train(plan, warm + steps, held_out_rows=0, time_scale=scale), warm)


def problems(run: Run, *, rival: bool = False) -> list[str]:
    """What makes a run's figures worthless; each line names a way to look fast without being it.

    A rival must not be slowed by its emulation, so it is held to MIN_OF_PREDICTION instead of to its real work, which
    in a tensor-parallel group holds waits of the members for each other.
    """
    return cheats(run) + [f"{run.plan.name}: {text}" for text in (_slowed(run) if rival else _unreal(run))]


def cheats(run: Run) -> list[str]:
    """What a run did not do: actions left out, or quicker than their price or their link, or other math."""
    return [f"{run.plan.name}: {text}" for text in _cheats(run)]


def _unreal(run: Run) -> Iterator[str]:
    if (ratio := run.real_math_ratio()) > MOST_REAL_MATH:
        yield f"real math takes {ratio:.3f} of the compute time, more than {MOST_REAL_MATH}"
    if (ratio := run.overrun_ratio()) > MOST_OVERRUNS:
        yield f"{ratio:.4f} of the actions overran, more than {MOST_OVERRUNS}"


def _slowed(run: Run) -> Iterator[str]:
    if (share := run.predicted_step_seconds / run.measured_step_seconds) < MIN_OF_PREDICTION:
        yield f"reaches {share:.4f} of its prediction, less than {MIN_OF_PREDICTION}"


def _cheats(run: Run) -> Iterator[str]:
    listed = [action for actions in run.program.devices for action in actions]
    carried = sum(map(run.program.carried, listed))
    records = run.timeline.records
    actions = records[records["kind"] != Kind.COLLECTIVE]
    for place, step in enumerate(step_numbers(run.timeline)):
        expected = len(listed) - (0 if place else carried)  # the first step has no step before it
        if (done := int(np.sum(actions["step"] == step))) != expected:
            yield f"step {step} ran {done} actions of {expected}"
    if (early := _earliest(actions["end"] - actions["start"] - price_seconds(run.program, actions))) < 0:
        yield f"a compute action ended {-early:g} s before its price"
    if (early := _earliest(actions["end"] - _arrivals(run, actions))) < 0:
        yield f"a message was there {-early:g} s before its link could carry it"
    losses = reference_losses(run)
    if not np.allclose(run.trained.losses, losses, rtol=LOSSES_DIFFER, atol=0.0):
        yield f"losses {run.trained.losses} are not those of one process, {losses}"


def _earliest(spare: npt.NDArray[np.float64]) -> float:
    """The smallest of the numbers where it is below 0 by more than rounding, else 0; NaN counts as 0."""
    least = float(np.nanmin(spare, initial=0.0))
    return least if least < -CLOCK_SECONDS else 0.0


def price_seconds(program: Program, actions: npt.NDArray[np.void]) -> npt.NDArray[np.float64]:
    """The predicted seconds of every compute record; 0 for sends and receives. shape: (records,)"""
    table = [
        np.array([_price(program, device, number) for number in range(len(listed))])
        for device, listed in enumerate(program.devices)
    ]
    return np.array(
        [table[d][a] for d, a in zip(actions["device"], actions["action"], strict=True)], dtype=np.float64
    )


def _price(program: Program, device: int, number: int) -> float:
    action = program.devices[device][number]
    return program.price(device, action).price.seconds if action.kind in COMPUTE_KINDS else 0.0


def _arrivals(run: Run, actions: npt.NDArray[np.void]) -> npt.NDArray[np.float64]:
    """The earliest moment at which the message of every receive can be there; NaN elsewhere. shape: (records,)"""
    sends = actions[actions["kind"] == Kind.SEND]
    sent = {(int(r["step"]), int(r["message"])): float(r["start"]) for r in sends}
    found = np.full(len(actions), np.nan)
    for place in np.flatnonzero(actions["kind"] == Kind.RECEIVE):
        record = actions[place]
        message = int(record["message"])
        carried = run.program.carried(run.program.devices[record["device"]][record["action"]])
        start = sent.get((int(record["step"]) - carried, message))
        if start is not None:
            transfer = run.program.transfer(message)
            path = run.compute.graph.path(transfer.source, transfer.destination)
            found[place] = start + path.seconds(transfer.bytes)
    return found


def reference_losses(run: Run) -> list[float]:
    """The losses of the same training in one process without HetHub's program."""
    import torch

    from hethub.launch.reference import train_reference
    from hethub.launch.worker import make_batches

    steps = len(run.trained.losses)
    workload = run.plan.workload
    reference = train_reference(
        workload,
        make_batches(run.trained.task),
        SETTINGS,
        steps=steps,
        seed=run.trained.task.seed,
        dtype=torch.float32,
        total_steps=run.trained.task.total_steps,
    )
    return list(reference.losses)
