"""How much of the promise of `hethub replan` a launch of its plan keeps.

Five emulated devices of three types train under the plan for what their figures say, with one device at half its
speed, and again with the link between its zones at a quarter. Each time the run's own records are calibrated, a plan is
made anew, and trained under the same fault. *Promised* is the new plan's gain in speed by the calibrated simulation,
before the second training; *kept* is the measured gain over it, both trainings in this process's one pool.

The cheapest cheats, and what makes them fail:
- a new plan that promises little, so that noise keeps it: the promise must be MIN_PROMISE or more;
- a slow first plan: it must reach MIN_OF_PREDICTION of its prediction in a training without the fault;
- a calibration that is told the fault: the device's pace and the link's share of its bandwidth, measured, must be
  within MOST_OFF of what the fault does, and all others as predicted;
- a fault that is weaker in the second training: its pace is measured too, and held to the same.

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
from bench.splits import compute_of
from hethub.planners.first import FirstPlanner
from hethub.planners.interface import Problem
from hethub.planners.replan import pace_of_run, replan
from hethub.program.compile import compile_program
from hethub.simulate.engine import simulate
from hethub.simulate.pace import Pace
from hethub.specs.cluster import load_cluster
from hethub.specs.job import COMPUTE, Fault
from hethub.specs.layout import lay_out
from hethub.specs.plan import Plan
from hethub.timeline.record import Timeline
from hethub.timeline.summary import step_seconds

if TYPE_CHECKING:
    from bench.emulated import Pool

SPEC = Path(__file__).parent / "specs" / "replan.yaml"
TIME_SCALE = 20.0  # of the spec
STEPS, WARM_UP = 14, 4
DEVICE, SLOWER = "a/0/0", 2.0
LINK, NARROWER = "desk-shelf", 4.0
MIN_PROMISE, MIN_OF_PREDICTION, MOST_OFF = 0.05, 0.95, 0.1


@dataclass(frozen=True)
class Kept:
    """A fault's two trainings."""

    promised: float
    measured: float
    paces: tuple[Pace, Pace]
    raw: dict[str, Any]

    @property
    def ratio(self) -> float:
        """The share of the promise that was kept."""
        return self.measured / self.promised if self.promised > 0 else 0.0


def main() -> int:
    """Train, plan anew, train again; write the result file."""
    # Loaded here: a process that a pool starts reads this file too and has no need of it.
    from bench.emulated import Pool

    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--steps", type=int, default=STEPS, help="of each training, after the warm-up")
    steps = arguments.parse_args().steps + WARM_UP
    plan = first_plan()
    with closing(Pool(len(plan.cluster.devices()))) as pool:
        plain = seconds_of(train(pool, plan, steps, None))
        device = kept(pool, plan, steps, _fault(device=_index(plan, DEVICE), factor=SLOWER))
        link = kept(pool, plan, steps, _fault(link=LINK, factor=NARROWER))
    predicted = predicted_timeline(plan)[1]
    for name, found in (("device", device), ("link", link)):
        print(
            f"  {name}: {found.raw['step_seconds']} s measured, {found.raw['calibrated_step_seconds']} s promised"
        )
    figures = {
        "kept_ratio": min(device.ratio, link.ratio),
        "device_kept_ratio": device.ratio,
        "device_promised_gain": device.promised,
        "link_kept_ratio": link.ratio,
        "link_promised_gain": link.promised,
    }
    print_figures(figures)
    wrong = [*_unfit(device, "device", DEVICE, SLOWER), *_unfit(link, "link", LINK, 1.0 / NARROWER)]
    if predicted / plain < MIN_OF_PREDICTION:
        wrong.append(f"without a fault the plan reaches {predicted / plain:.3f} of its prediction")
    for text in wrong:
        print(f"NOT VALID {text}", file=sys.stderr)
    if not wrong and steps == STEPS + WARM_UP:
        raw = {"plain_step_seconds": plain, "device": device.raw, "link": link.raw}
        print(f"wrote {write_result(Path(__file__).stem, figures, raw, emulated=True)}")
    return 1 if wrong else 0


def first_plan() -> Plan:
    """The plan for the cluster as its figures say."""
    cluster, workload = load_cluster(SPEC)
    assert workload is not None
    return FirstPlanner().plan(Problem.of(cluster, workload)).plan


def kept(pool: Pool, plan: Plan, steps: int, fault: Fault) -> Kept:
    """Train under the fault, plan anew from that training's records, train the new plan."""
    before = train(pool, plan, steps, fault)
    pace, _ = pace_of_run(plan, predicted_timeline(plan)[0], before, range(WARM_UP, steps))
    found = replan(plan, pace)
    after = train(pool, found.plan, steps, fault)
    again, _ = pace_of_run(found.plan, predicted_timeline(found.plan)[0], after, range(WARM_UP, steps))
    seconds = (seconds_of(before), seconds_of(after))
    raw = {
        "step_seconds": seconds,
        "calibrated_step_seconds": (found.old_step_seconds, found.new_step_seconds),
        "devices": dict(pace.devices),
        "bandwidth": dict(pace.bandwidth),
        "links": dict(pace.links),
        "pipelines": [p.model_dump(mode="json", exclude_defaults=True) for p in found.plan.pipelines],
    }
    return Kept(found.gain, seconds[0] / seconds[1] - 1.0, (pace, again), raw)


def train(pool: Pool, plan: Plan, steps: int, fault: Fault | None) -> Timeline:
    """The records of a training."""
    faults = [] if fault is None else [fault]
    return pool.train(plan, steps, held_out_rows=0, time_scale=TIME_SCALE, faults=faults).timeline


def predicted_timeline(plan: Plan) -> tuple[Timeline, float]:
    """The prediction as a launch makes it, and its step."""
    compute = compute_of(plan)
    found = simulate(compile_program(lay_out(plan), compute), compute, steps=3)
    assert found.timeline is not None
    return found.timeline, found.step_seconds


def seconds_of(timeline: Timeline) -> float:
    """The median step after the warm-up."""
    return float(np.median(step_seconds(timeline)[WARM_UP:]))


def _fault(*, factor: float, device: int = -1, link: str = "") -> Fault:
    return Fault(
        device=device, link=link, step=0, steps=1 << 20, action=COMPUTE, phase="before", do="slow", factor=factor,
        place="",
    )  # fmt: skip


def _index(plan: Plan, name: str) -> int:
    return next(d for d, device in enumerate(plan.cluster.devices()) if device.name == name)


def _unfit(kept: Kept, what: str, name: str, wanted: float) -> Iterator[str]:
    if kept.promised < MIN_PROMISE:
        yield f"{what}: only {kept.promised:.3f} is promised, less than {MIN_PROMISE}"
    for number, pace in enumerate(kept.paces):
        told = pace.devices if what == "device" else pace.bandwidth
        if number and name not in told and name not in pace.links and what == "link":
            continue  # nobody waits for it any more
        if name not in told or abs(told[name] / wanted - 1.0) > MOST_OFF:
            yield f"{what}: {name} was measured as {told.get(name)}, the fault is {wanted:g}"
        others = {n: r for n, r in pace.devices.items() if (what, n) != ("device", name)}
        others |= {n: r for n, r in pace.links.items() if (what, n) != ("link", name)}
        for other, ratio in others.items():
            if abs(ratio - 1.0) > MOST_OFF:
                yield f"{what}: {other} was measured as {ratio:.3f}, and nothing was done to it"


if __name__ == "__main__":
    sys.exit(main())
