"""Our own runs, predicted: random plans on CPU workers that quotas make really unequal, from measured profiles.

Nothing is fitted to the runs: layer times come from a profile that the workers measure under their quotas, all at once,
since they share the machine in the runs too; memory traffic comes from the same measurement. What is predicted is the
program that ran. Compared are steps behind another.

This machine's speed wanders: CPU time of one and the same layer, over 3 seconds each, was seen to be 9 % apart
(standard deviation) within a minute, on all workers alike, and of two profiles layers were 10 to 20 % apart.
So all is done in rounds, and in turn: a layer is measured, a plan does some steps, the next layer is measured. (With
the whole profile before the plans the error was 5.7 %, at one pace, see below, 4.0 %: a minute's wander made the one
longer and not the other.) Of a layer's times, which a step adds up, the mean counts, on a straight line in the rows,
and of a plan's steps the median. (Of two profiles and the same steps the error was 6.9 % as measured and 5.2 % on
straight lines.) What links and copies reach, which says in which order a plan works, is measured once, before all
else. Beside all this a process takes the machine's pace, in what of the cores is free: a few matrix products, ten
times a second. A second figure is of predictions and steps that are brought to one pace, as are the layers' times: how
much of the error is the machine's.

A core's speed depends on what the other does meanwhile, which no profile tells. Tried against that, and no better: all
workers kept busy while the slowest is measured (predictions 4 to 23 % too long); all on one core, and decoders measured
three in a row (11.8 % on the mean, all too short).
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from hethub.cost.compute import ComputeModel
from hethub.cost.graph import CostGraph
from hethub.cost.profiles.profile import Profile
from hethub.program.compile import compile_program
from hethub.program.schedules import SCHEDULES
from hethub.simulate.comparison import predicted_step_seconds
from hethub.simulate.engine import simulate
from hethub.simulate.validation import OwnRun, RunCheck, check_own_run
from hethub.specs.cluster import Cluster
from hethub.specs.layout import lay_out
from hethub.specs.plan import Pipeline, Plan, Replica, Stage
from hethub.specs.workload import Workload
from hethub.timeline.record import Timeline, TimelineInfo
from hethub.timeline.summary import step_numbers, step_seconds

from .crew import Crew
from .engines import Ours, Training, take, text_of
from .own_profile import (
    CELLS,
    CORES,
    MODEL,
    SEQUENCE,
    Cell,
    Measured,
    Pace,
    Paces,
    Window,
    measuring,
    profile_of,
)
from .plans import rank_of
from .quota import CpuQuotas, check_quotas, core_shares, settled_quotas, why_no_quotas

__all__ = ["in_between", "own_runs"]

BATCH = 36
PLANS = 20
ROUNDS = 3
WANDER = 0.2  # between rounds, of a step's median over the plans; more, and others were using the machine
_WARM_UP = 1  # steps of a round before those that count
_COUNTED = 2


# -- random plans ------------------------------------------------------------------------------------------------


def random_plan(cluster: Cluster, seed: int) -> Plan:
    """All workers in one or two pipelines, cut anywhere: layers, rows, micro-batches, recompute and schedule."""
    draw = random.Random(seed)
    names = [device.name for device in cluster.devices()]
    draw.shuffle(names)
    cut = draw.choice([len(names), len(names), draw.randint(1, len(names) - 1)])
    teams = [team for team in (names[:cut], names[cut:]) if team]
    batches = _split(draw, BATCH // 4, len(teams))
    pipelines = [_pipeline(draw, team, 4 * rows) for team, rows in zip(teams, batches, strict=True)]
    workload = Workload(
        model=MODEL, sequence_length=SEQUENCE, global_batch=BATCH, precision="fp32", optimizer="adamw"
    )
    return Plan(name=f"random-{seed}", pipelines=pipelines, cluster=cluster, workload=workload)


def _pipeline(draw: random.Random, names: Sequence[str], batch: int) -> Pipeline:
    stages = draw.randint(1, len(names))
    least = max(size := _split(draw, len(names), stages))
    rows = draw.choice([n for n in (4, 6, 8, 12) if batch % n == 0 and n >= least] or [batch])
    micro_batches = batch // rows
    found, layer, at = [], 0, 0
    for number, (count, layers) in enumerate(zip(size, _split(draw, MODEL.layers + 2, stages), strict=True)):
        span = (layer, layer + layers)
        replicas = [
            Replica(rows=n, ranks=[rank_of(MODEL, span, name)])
            for n, name in zip(_split(draw, rows, count), names[at : at + count], strict=True)
        ]
        found.append(
            Stage(
                layers=span,
                in_flight=min(micro_batches, stages - number + draw.randint(0, 1)),
                recompute=draw.choice(["none", "none", "selective", "full"]),
                replicas=replicas,
            )
        )
        layer, at = layer + layers, at + count
    schedule = draw.choice([name for name in sorted(SCHEDULES) if name not in ("gpipe", "interleaved")])
    return Pipeline(schedule=schedule, micro_batches=micro_batches, micro_batch_rows=rows, stages=found)


def _split(draw: random.Random, total: int, parts: int) -> list[int]:
    """`total` as that many whole parts of at least 1."""
    cuts = sorted(draw.sample(range(1, total), parts - 1))
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]


# -- runs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Ran:
    """A step of a plan, among the others of its round, which ran within the window."""

    timeline: Timeline
    step: int
    seconds: float
    window: Window


def _run(engine: Ours, plan: Plan) -> list[_Ran]:
    """The steps that count of a plan from its first one."""
    engine.load(plan)
    begin = time.monotonic()
    take(engine, _WARM_UP + _COUNTED)
    window = begin, time.monotonic()
    measured = _measured(engine, plan)
    each = zip(step_numbers(measured).tolist(), step_seconds(measured).tolist(), strict=True)
    return [_Ran(measured, step, seconds, window) for step, seconds in each if step >= _WARM_UP]


def _measured(engine: Ours, plan: Plan) -> Timeline:
    """What the workers recorded since the plan was loaded."""
    devices = plan.cluster.devices()
    info = TimelineInfo(
        origin="measured",
        devices=tuple(device.name for device in devices),
        device_types=tuple(device.type.name for device in devices),
        emulated=False,
    )
    return Timeline(info, np.concatenate(engine.crew.call("records")))


def _predicted(plan: Plan, profile: Profile) -> Timeline:
    """Three steps under what was measured. The plan's cluster, whose figures decide the program's order, is the one
    that the run was loaded with."""
    compute = ComputeModel(CostGraph(plan.cluster), plan.workload, profile)
    timeline = simulate(compile_program(lay_out(plan), compute), compute, steps=3).timeline
    assert timeline is not None
    return timeline


def _check(plan: Plan, profile: Profile, steps: Sequence[_Ran]) -> RunCheck:
    """Hold the prediction of a plan against the median of its steps; where time went is that of the one next to it."""
    predicted = _predicted(plan, profile)
    middle = statistics.median(one.seconds for one in steps)
    ran = min(steps, key=lambda one: abs(one.seconds - middle))
    if not np.array_equal(_actions(predicted, 0), _actions(ran.timeline, ran.step)):
        raise AssertionError(f"{plan.name}: what ran is not the program that was predicted")
    return check_own_run(OwnRun(plan.name, plan, predicted, ran.timeline, ran.step, ran.step, middle))


def _actions(timeline: Timeline, step: int) -> Any:
    """Device, action, kind, stage and micro-batch of all that was done in a step. shape: (actions, 5)"""
    records = timeline.records[timeline.records["step"] == step]
    names = ("device", "action", "kind", "stage", "micro_batch")
    return np.unique(np.stack([records[name].astype(np.int64) for name in names], axis=1), axis=0)


def own_runs(plans: int = PLANS, rounds: int = ROUNDS) -> tuple[dict[str, float], dict[str, Any]]:
    """`own_runs_mean_abs_error` and the largest error, the mean with all at one pace, and every plan's times behind
    them. Without control groups there are no figures, and `skipped` says why."""
    reason = why_no_quotas()
    if reason is not None:
        return {}, {"skipped": reason}
    shares = core_shares(CORES)
    with ExitStack() as stack:
        text = text_of(Path(stack.enter_context(TemporaryDirectory(prefix="hethub-bench-"))))
        quotas = stack.enter_context(CpuQuotas(shares))
        quota_checks = [settled_quotas(quotas, shares)]
        pace = stack.enter_context(Crew([Pace]))
        measurers = stack.enter_context(measuring(quotas))
        cluster, works = measurers.cluster()
        drawn = [random_plan(cluster, seed) for seed in range(plans)]
        engine = stack.enter_context(Ours(drawn[0], Training(workload=drawn[0].workload, tokens_file=text)))
        quotas.place(engine.crew, range(len(shares)))
        ran: list[list[list[_Ran]]] = [[] for _ in drawn]  # by plan and round
        measured: list[Measured] = []
        for number in range(rounds):
            for cells, plan, own in zip(in_between(plans, number / rounds), drawn, ran, strict=True):
                measured += map(measurers.layer, cells)
                own.append(_run(engine, plan))
                print(f"round {number + 1}: {plan.name:10} {_typical(own[-1]):7.3f} s", flush=True)
        paces = Paces(pace.call("taken")[0])
        quota_checks.append(check_quotas(quotas, shares))  # they are to hold to the end
    profile = profile_of(measured, works)
    steps = [[step for one in own for step in one] for own in ran]
    checks = [_check(plan, profile, own) for plan, own in zip(drawn, steps, strict=True)]
    off = [abs(check.time_error) for check in checks]
    usual = profile_of([one.paced(paces) for one in measured], works)
    paced = _paced_errors(drawn, usual, steps, paces)
    figures = {
        "own_runs_mean_abs_error": statistics.mean(off),
        "own_runs_max_abs_error": max(off),
        "own_runs_at_one_pace_mean_abs_error": statistics.mean(map(abs, paced)),
    }
    wander = statistics.median(_wander([_typical(one) for one in own]) for own in ran)
    entries = [_entry(*entry) for entry in zip(drawn, checks, steps, strict=True)]
    return figures, {
        "runs": [entry | {"error_at_one_pace": error} for entry, error in zip(entries, paced, strict=True)],
        "quotas": [asdict(check) for check in quota_checks],
        "wander": wander,
        "valid": all(check.holds for check in quota_checks) and wander <= WANDER,
    }


def in_between(plans: int, turned: float) -> list[list[Cell]]:
    """What is measured before each plan of a round, evenly; the order is turned by a share of itself."""
    start = round(turned * len(CELLS))
    cells = [*CELLS[start:], *CELLS[:start]]
    ends = [number * len(cells) // plans for number in range(plans + 1)]
    return [cells[a:b] for a, b in pairwise(ends)]


def _paced_errors(
    plans: Sequence[Plan], profile: Profile, steps: Sequence[Sequence[_Ran]], paces: Paces
) -> list[float]:
    """Errors of the predictions under a profile of the usual pace, against steps that are brought to it."""
    errors = []
    for plan, own in zip(plans, steps, strict=True):
        predicted = _predicted(plan, profile)
        seconds = predicted_step_seconds(predicted)
        errors.append(seconds / statistics.median(s.seconds / paces.within(s.window) for s in own) - 1)
    return errors


def _typical(steps: Sequence[_Ran]) -> float:
    """Seconds of a step of one round."""
    return statistics.median(one.seconds for one in steps)


def _wander(seconds: Sequence[float]) -> float:
    """How far rounds are apart, over their median."""
    return (max(seconds) - min(seconds)) / statistics.median(seconds)


def _entry(plan: Plan, check: RunCheck, steps: Sequence[_Ran]) -> dict[str, Any]:
    """What the result file keeps of a plan."""
    schedules = "+".join(pipeline.schedule for pipeline in plan.pipelines)
    print(
        f"{plan.name:10} {schedules:16} measured {check.measured_seconds:7.3f} s, predicted "
        f"{check.predicted_seconds:7.3f} s, {100 * check.time_error:6.1f} %, most off: {check.worst_term}"
    )
    return {
        "plan": plan.name,
        "measured_seconds": check.measured_seconds,
        "step_seconds": [ran.seconds for ran in steps],
        "predicted_seconds": check.predicted_seconds,
        "error": check.time_error,
        "terms": dict(check.terms),
        "stages": [[s.layers for s in p.stages] for p in plan.pipelines],
    }
