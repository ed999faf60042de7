"""How much of the promise of `hethub replan` trainings of its plan keep.

Five emulated devices of three types train under the plan for what their figures say, with one device at half its
speed, and again with the link between its zones at a quarter. Each time the run's own records are calibrated and a plan
is made anew. *Promised* is that plan's gain in speed by the calibrated simulation, before it has trained. *Kept* is its
measured gain under the same fault: the old plan and the new one train in turns, and the median over the pairs counts.

The cheapest cheats, and what makes them fail:
- a new plan that promises little, so that noise keeps it: the promise must be MIN_PROMISE or more;
- a slow first plan: it must reach MIN_OF_PREDICTION of its prediction in a training without the fault, and that
  prediction MIN_OF_BOUND of the physical bound;
- a calibration that is told the fault: the device's pace and the link's share of its bandwidth, measured, must be
  within MOST_OFF of what the fault does;
- a fault that is weaker for the new plan, or an old plan that its emulation slows: every training must reach
  MIN_OF_PREDICTION of a step that is simulated under the fault itself, and the pace of all devices and links must be
  within MOST_OFF of that step's;
- a new plan that does less: every training runs every action of its program, none quicker than its price, and its
  losses must be those of one process without HetHub's program.

    .venv/bin/python benchmarks/replan.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.results import print_figures, write_result
from hethub.cost.compute import ComputeModel
from hethub.cost.graph import CostGraph
from hethub.planners.first import FirstPlanner
from hethub.planners.interface import Problem
from hethub.planners.replan import Replanned, pace_of_run, replan
from hethub.simulate.engine import Simulation, simulate
from hethub.simulate.pace import Expected, Pace, at_pace
from hethub.simulate.what_if import with_links
from hethub.specs.cluster import load_cluster
from hethub.specs.job import COMPUTE, Fault
from hethub.specs.plan import Plan

if TYPE_CHECKING:
    from bench.emulated import Pool, Run

SPEC = Path(__file__).parent / "specs" / "replan.yaml"
STEPS, WARM_UP, PAIRS = 3, 1, 3
DEVICE, SLOWER = "a/0/0", 2.0
LINK, NARROWER = "desk-shelf", 4.0
MIN_PROMISE, MIN_OF_PREDICTION, MIN_OF_BOUND, MOST_OFF = 0.05, 0.95, 0.6, 0.1


@dataclass(frozen=True)
class Case:
    """A fault, the plan made for it, and the trainings of the old plan and of the new one in turns."""

    found: Replanned
    old: tuple[Run, ...]
    new: tuple[Run, ...]

    @property
    def gains(self) -> list[float]:
        """How much more the new plan did in the same time, of each pair."""
        return [a.measured_step_seconds / b.measured_step_seconds - 1.0 for a, b in self._pairs]

    @property
    def kept_ratio(self) -> float:
        """The share of the promise that was kept."""
        return float(np.median(self.gains)) / self.found.gain if self.found.gain > 0 else 0.0

    @property
    def _pairs(self) -> list[tuple[Run, Run]]:
        return list(zip(self.old, self.new, strict=True))

    def as_raw(self) -> dict[str, Any]:
        """Everything behind the figures, as JSON can hold it."""
        return {
            "promised_gain": self.found.gain,
            "measured_gains": self.gains,
            "calibrated_step_seconds": (self.found.old_step_seconds, self.found.new_step_seconds),
            "devices": dict(self.found.pace.devices),
            "links": dict(self.found.pace.links),
            "bandwidth": dict(self.found.pace.bandwidth),
            "old": [run.as_raw() for run in self.old],
            "new": [run.as_raw() for run in self.new],
        }


def main() -> int:
    """Train, plan anew, train both in turns; write the result file."""
    # Loaded here: a process that a pool starts reads this file too and has no need of it.
    from bench.emulated import Pool, cheats

    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--steps", type=int, default=STEPS, help="of each training, after the warm-up")
    arguments.add_argument("--pairs", type=int, default=PAIRS, help="of trainings, for each fault")
    asked = arguments.parse_args()
    plan = first_plan()
    with closing(Pool(len(plan.cluster.devices()))) as pool:
        plain = train(pool, plan, asked.steps, None)
        device = case(pool, plan, asked, _fault(device=_index(plan, DEVICE), factor=SLOWER))
        link = case(pool, plan, asked, _fault(link=LINK, factor=NARROWER))
        runs = (plain, *device.old, *device.new, *link.old, *link.new)
        wrong = list(dict.fromkeys(text for run in runs for text in cheats(run)))
    for name, found in (("device", device), ("link", link)):
        print(
            f"  {name}: calibrated {found.found.old_step_seconds:.4f} s, promised {found.found.new_step_seconds:.4f} s"
        )
        for word, runs in (("old", found.old), ("new", found.new)):
            print(f"    {word} plan trained {[round(run.measured_step_seconds, 4) for run in runs]} s")
    figures = {
        "kept_ratio": min(device.kept_ratio, link.kept_ratio),
        "device_kept_ratio": device.kept_ratio,
        "device_promised_gain": device.found.gain,
        "link_kept_ratio": link.kept_ratio,
        "link_promised_gain": link.found.gain,
    }
    print_figures(figures)
    wrong += _unfit_first(plain)
    wrong += _unfit(device, "device", DEVICE, SLOWER)
    wrong += _unfit(link, "link", LINK, 1.0 / NARROWER)
    for text in wrong:
        print(f"NOT VALID {text}", file=sys.stderr)
    if not wrong and (asked.steps, asked.pairs) == (STEPS, PAIRS):
        raw = {"plain": plain.as_raw(), "device": device.as_raw(), "link": link.as_raw()}
        print(f"wrote {write_result(Path(__file__).stem, figures, raw, emulated=True)}")
    return 1 if wrong else 0


def first_plan() -> Plan:
    """The plan for the cluster as its figures say."""
    cluster, workload = load_cluster(SPEC)
    assert workload is not None
    return FirstPlanner().plan(Problem.of(cluster, workload)).plan


def case(pool: Pool, plan: Plan, asked: argparse.Namespace, fault: Fault) -> Case:
    """Train under the fault, plan anew from that training's records, and train both plans in turns."""
    old, new = [train(pool, plan, asked.steps, fault)], []
    found = replan(plan, pace_of(old[0]))
    for pair in range(asked.pairs):
        if pair:
            old.append(train(pool, plan, asked.steps, fault))
        new.append(train(pool, found.plan, asked.steps, fault))
    return Case(found, tuple(old), tuple(new))


def train(pool: Pool, plan: Plan, steps: int, fault: Fault | None) -> Run:
    """A training, under a fault from its first step on."""
    from bench.emulated import Run

    faults = [] if fault is None else [fault]
    scale = plan.cluster.emulated_time_scale
    assert isinstance(scale, float)
    trained = pool.train(plan, WARM_UP + steps, held_out_rows=0, time_scale=scale, faults=faults)
    return Run(plan, trained, WARM_UP)


def pace_of(run: Run) -> Pace:
    """As `hethub replan` finds it, after the warm-up."""
    steps = range(WARM_UP, len(run.all_step_seconds))
    return pace_of_run(run.plan, run.predicted, run.timeline, steps)[0]


def _fault(*, factor: float, device: int = -1, link: str = "") -> Fault:
    return Fault(
        device=device, link=link, step=0, steps=1 << 20, action=COMPUTE, phase="before", do="slow", factor=factor,
        place="",
    )  # fmt: skip


def _index(plan: Plan, name: str) -> int:
    return next(d for d, device in enumerate(plan.cluster.devices()) if device.name == name)


def _unfit_first(run: Run) -> Iterator[str]:
    reached = run.predicted_step_seconds / run.measured_step_seconds
    if reached < MIN_OF_PREDICTION:
        yield f"without a fault the plan reaches {reached:.3f} of its prediction"
    share = run.bound_step_seconds / run.predicted_step_seconds
    if share < MIN_OF_BOUND:
        yield f"the plan for the cluster is no good one: {share:.3f} of the physical bound"


def _unfit(case: Case, what: str, name: str, wanted: float) -> Iterator[str]:
    if case.found.gain < MIN_PROMISE:
        yield f"{what}: only {case.found.gain:.3f} is promised, less than {MIN_PROMISE}"
    told = (case.found.pace.devices if what == "device" else case.found.pace.bandwidth).get(name)
    if told is None or abs(told / wanted - 1.0) > MOST_OFF:
        yield f"{what}: {name} was measured as {told}, the fault is {wanted:g}"
    for word, run in (*(("old", run) for run in case.old), *(("new", run) for run in case.new)):
        due = _under(run, what, name, wanted)
        reached = due.step_seconds / run.measured_step_seconds
        if reached < MIN_OF_PREDICTION:
            yield f"{what}, {word} plan: a step reaches {reached:.3f} of what the fault allows"
        assert due.timeline is not None
        scale = run.timeline.info.time_scale
        expected = Expected(run.predicted, run.compute.graph).pace(due.timeline.records, 0, scale)
        pace = pace_of(run)
        for found, allowed in ((pace.devices, expected.devices), (pace.links, expected.links)):
            for other in found.keys() & allowed.keys():
                if abs(found[other] / allowed[other] - 1.0) > MOST_OFF:
                    told = f"{found[other]:.3f}, the fault makes it {allowed[other]:.3f}"
                    yield f"{what}, {word} plan: {other} was measured as {told}"


def _under(run: Run, what: str, name: str, wanted: float) -> Simulation:
    """A step of the run's plan under the fault."""
    slow = {_index(run.plan, name): wanted} if what == "device" else {}
    graph = CostGraph(with_links(run.plan.cluster, {name: wanted} if what == "link" else {}))
    return simulate(at_pace(run.program, slow), ComputeModel(graph, run.plan.workload), steps=3)


if __name__ == "__main__":
    sys.exit(main())
