"""Our own runs, predicted: random plans on CPU workers that quotas make really unequal, from measured profiles.

Nothing is fitted to the runs: layer times come from a profile that the workers measure under their quotas before, all
at once, since they share the machine in the runs too; memory traffic comes from the same measurement. What is predicted
is the program that runs: the same compute model compiles both. Compared is the step between two others.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hethub.cost.compute import ComputeModel
from hethub.cost.graph import CostGraph
from hethub.cost.profiles.curve import Curve, LinkFit, fit_link
from hethub.cost.profiles.profile import LayerRow, Profile, TransferRow, host_class
from hethub.launch.link_profiler import Exchange, measure_exchanges
from hethub.launch.profiler import LayerProfiler, copy_bytes_per_second
from hethub.program.compile import compile_program
from hethub.program.schedules import SCHEDULES
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
from .plans import cpu_cluster, llama_model, rank_of
from .quota import CORES, CpuQuotas, check_quotas, core_shares, settled_quotas, why_no_quotas

__all__ = ["own_runs"]

MODEL = llama_model(hidden=256, layers=6, heads=4)
SEQUENCE = 128
BATCH = 48
PLANS = 20
_STEPS, _WARM_UP = 3, 1
_ROWS = (1, 2, 4, 8)
_BUDGET_SECONDS = 2.0
_EXCHANGES = [
    Exchange(operation, 1 << bits)
    for operation in ("send", "send_work", "receive_work")
    for bits in (10, 18, 22)
]
_EXCHANGE_SECONDS = 0.5


class _Measurer:
    """One worker's measurement of itself."""

    def __init__(self, rank: int, count: int, port: int) -> None:
        """Join a group as workers do, whose threads take CPU time while nothing is sent."""
        torch.set_num_threads(1)
        self._device = torch.device("cpu")
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count)

    def layer(self, device_type: str, layer: int, rows: int) -> tuple[LayerRow, float]:
        """A layer's row, and the wall seconds that a second of CPU time took meanwhile."""
        profiler = LayerProfiler(MODEL, device_type, SEQUENCE, "fp32", torch.float32, self._device)
        begin, spent = time.perf_counter(), time.process_time()
        row, _ = profiler.measure(layer, rows, _BUDGET_SECONDS)
        return row, (time.perf_counter() - begin) / (time.process_time() - spent)

    def copy(self) -> float:
        """Bytes per second of a copy that no cache holds."""
        return copy_bytes_per_second(self._device, _BUDGET_SECONDS)


@dataclass(frozen=True)
class _Measurement:
    """What all workers measured at once, by type (of the first worker of each): a profile, bytes per second of memory
    traffic, wall seconds of a CPU second; and a link between two workers that have a core each."""

    profile: Profile
    bytes_per_second: dict[str, float]
    stretch: dict[str, float]
    link: LinkFit

    def cluster(self) -> Cluster:
        """The workers' cluster with what they reach. A message is moved by the CPUs of its ends, so a link is slower
        than between whole cores by as much as they are."""
        cluster = cpu_cluster(CORES)
        types = {
            name: replace(
                t, memory_bandwidth_bytes_per_second=self.bytes_per_second[name], memory_efficiency=1.0
            )
            for name, t in cluster.device_types.items()
        }
        groups = []
        for group in cluster.node_groups:
            link = replace(
                group.intra_link,
                bandwidth_bytes_per_second=self.link.bandwidth_bytes_per_second
                / self.stretch[group.device_type],
                latency_seconds=self.link.latency_seconds,
            )
            groups.append(replace(group, intra_link=link, inter_link=link))
        return replace(cluster, device_types=types, node_groups=tuple(groups))


def measure(quotas: CpuQuotas) -> _Measurement:
    """Layer by layer, all workers at the same and busy until the slowest has it."""
    names = [name for name, _, count in CORES for _ in range(count)]
    rows: list[LayerRow] = []
    stretches: dict[str, list[float]] = defaultdict(list)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    makers = [partial(_Measurer, rank, len(names), store.port) for rank in range(len(names))]
    with Crew(makers) as crew:
        quotas.place(crew, range(len(names)))
        for layer in (0, 1, MODEL.layers + 1):
            for count in _ROWS:
                for process, name in enumerate(names):
                    crew.start_one(process, "layer", name, layer, count)
                answers = dict(
                    zip(reversed(names), reversed(crew.finish()), strict=True)
                )  # of the first of a type
                for name, answer in answers.items():
                    rows.append(answer.value[0])
                    stretches[name].append(answer.value[1])
        copies = dict(zip(reversed(names), reversed(crew.call("copy")), strict=True))
    stretch = {name: statistics.median(found) for name, found in stretches.items()}
    moved = dict(zip(_EXCHANGES, measure_exchanges(_EXCHANGES, _EXCHANGE_SECONDS), strict=True))
    works = [
        TransferRow(
            operation=exchange.operation,
            link_class=host_class(name),
            group_size=1,
            message_bytes=exchange.message_bytes,
            time_seconds=spread.seconds * stretch[name],
        )
        for exchange, spread in moved.items()
        if exchange.operation != "send"
        for name in stretch
    ]
    sends = Curve.through(
        {float(e.message_bytes): s.seconds for e, s in moved.items() if e.operation == "send"}
    )
    link = fit_link(dict(zip(sends.sizes, sends.seconds, strict=True)))
    return _Measurement(Profile(tuple(rows), tuple(works)), copies, stretch, link)


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


def _predicted(plan: Plan, compute: ComputeModel) -> Timeline:
    """Three steps that follow each other, as the simulator sees them."""
    timeline = simulate(compile_program(lay_out(plan), compute), compute, steps=3).timeline
    assert timeline is not None
    return timeline


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


def _check(engine: Ours, plan: Plan, profile: Profile) -> RunCheck:
    """Run a plan and hold its prediction against the median of its steps, the warm-up not counted."""
    engine.load(plan, profile)
    take(engine, _WARM_UP + _STEPS)
    measured = _measured(engine, plan)
    seconds = float(np.median(step_seconds(measured)[step_numbers(measured) >= _WARM_UP]))
    predicted = _predicted(plan, ComputeModel(CostGraph(plan.cluster), plan.workload, profile))
    if not np.array_equal(_actions(predicted, 0), _actions(measured, _WARM_UP)):
        raise AssertionError(f"{plan.name}: what ran is not the program that was predicted")
    last = _WARM_UP + _STEPS - 1
    return check_own_run(OwnRun(plan.name, plan, predicted, measured, _WARM_UP, last, seconds))


def _actions(timeline: Timeline, step: int) -> Any:
    """Device, action, kind, stage and micro-batch of all that was done in a step. shape: (actions, 5)"""
    records = timeline.records[timeline.records["step"] == step]
    names = ("device", "action", "kind", "stage", "micro_batch")
    return np.unique(np.stack([records[name].astype(np.int64) for name in names], axis=1), axis=0)


def own_runs(plans: int = PLANS) -> tuple[dict[str, float], dict[str, Any]]:
    """`own_runs_mean_abs_error`, the largest error and `quota_error`, with every plan's times behind them. Without
    control groups there are no figures, and `skipped` says why."""
    reason = why_no_quotas()
    if reason is not None:
        return {}, {"skipped": reason}
    checks = []
    with ExitStack() as stack:
        text = text_of(Path(stack.enter_context(TemporaryDirectory(prefix="hethub-bench-"))))
        quotas = stack.enter_context(CpuQuotas(core_shares()))
        quota_checks = [settled_quotas(quotas, core_shares())]
        measured = measure(quotas)
        cluster = measured.cluster()
        first = random_plan(cluster, 0)
        engine = stack.enter_context(Ours(first, Training(workload=first.workload, tokens_file=text)))
        quotas.place(engine.crew, range(len(core_shares())))
        for seed in range(plans):
            plan = random_plan(cluster, seed)
            checks.append((plan, _check(engine, plan, measured.profile)))
            print(_line(*checks[-1]), flush=True)
        quota_checks.append(check_quotas(quotas, core_shares()))  # they are to hold to the end
    off = [abs(check.time_error) for _, check in checks]
    figures = {"own_runs_mean_abs_error": statistics.mean(off), "own_runs_max_abs_error": max(off)}
    return figures, {
        "runs": [_entry(*entry) for entry in checks],
        "quotas": [asdict(check) for check in quota_checks],
        "valid": all(check.holds for check in quota_checks),
    }


def _entry(plan: Plan, check: RunCheck) -> dict[str, Any]:
    """What the result file keeps of a plan."""
    return {
        "plan": plan.name,
        "measured_seconds": check.measured_seconds,
        "predicted_seconds": check.predicted_seconds,
        "error": check.time_error,
        "terms": dict(check.terms),
        "stages": [[s.layers for s in p.stages] for p in plan.pipelines],
    }


def _line(plan: Plan, check: RunCheck) -> str:
    schedules = "+".join(pipeline.schedule for pipeline in plan.pipelines)
    return (
        f"{plan.name:10} {schedules:16} measured {check.measured_seconds:7.3f} s, predicted "
        f"{check.predicted_seconds:7.3f} s, {100 * check.time_error:6.1f} %, most off: {check.worst_term}"
    )
