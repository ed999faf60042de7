"""Our own runs, predicted: random plans on CPU workers that quotas make really unequal, from measured profiles.

Nothing is fitted to the runs: layer times come from a profile that the workers measure under their quotas before, all
at once, since they share the machine in the runs too; memory traffic comes from the same measurement.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from hethub.cost.compute import ComputeModel
from hethub.cost.graph import CostGraph
from hethub.cost.profiles.profile import LayerRow, Profile
from hethub.launch.profiler import LayerProfiler, copy_bytes_per_second
from hethub.program.schedules import SCHEDULES
from hethub.simulate.modelled import steady_step_seconds
from hethub.specs.cluster import Cluster
from hethub.specs.plan import Pipeline, Plan, Replica, Stage
from hethub.specs.workload import Workload

from .crew import Crew
from .engines import Ours, Training, take, text_of
from .plans import cpu_cluster, llama_model, rank_of
from .quota import CORES, QUOTA_ERROR, CpuQuotas, core_shares, quota_errors, why_no_quotas

__all__ = ["own_runs"]

MODEL = llama_model(hidden=256, layers=6, heads=4)
SEQUENCE = 128
BATCH = 48
PLANS = 20
_STEPS, _WARM_UP = 3, 1
_ROWS = (1, 2, 4, 8)
_BUDGET_SECONDS = 1.5


class _Measurer:
    """One worker's measurement of itself."""

    def __init__(self) -> None:
        torch.set_num_threads(1)

    def measure(self, device_type: str) -> tuple[list[LayerRow], float]:
        """Rows of all kinds of layers, and bytes per second of a copy."""
        device = torch.device("cpu")
        profiler = LayerProfiler(MODEL, device_type, SEQUENCE, "fp32", torch.float32, device)
        rows = [
            profiler.measure(layer, rows, _BUDGET_SECONDS)[0]
            for _, layer in profiler.layers()
            for rows in _ROWS
        ]
        return rows, copy_bytes_per_second(device, _BUDGET_SECONDS, size_bytes=1 << 22)


def measure(quotas: CpuQuotas) -> tuple[Profile, dict[str, float]]:
    """The profile of each type (of the first of its workers), and its memory traffic in bytes per second."""
    names = [name for name, _, count in CORES for _ in range(count)]
    with Crew([_Measurer] * len(names)) as crew:
        quotas.place(crew, range(len(names)))
        for process, name in enumerate(names):
            crew.start_one(process, "measure", name)
        answers = [answer.value for answer in crew.finish()]
    first = [names.index(name) for name, _, _ in CORES]
    rows = [row for number in first for row in answers[number][0]]
    return Profile(tuple(rows), ()), {names[number]: answers[number][1] for number in first}


def measured_cluster(bytes_per_second: dict[str, float]) -> Cluster:
    """The workers' cluster with the memory traffic that they reach."""
    cluster = cpu_cluster(CORES)
    types = {
        name: replace(t, memory_bandwidth_bytes_per_second=bytes_per_second[name], memory_efficiency=1.0)
        for name, t in cluster.device_types.items()
    }
    return replace(cluster, device_types=types)


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


def predict_seconds(plan: Plan, profile: Profile) -> float:
    """A step among others, as the simulator sees it."""
    compute = ComputeModel(CostGraph(plan.cluster), plan.workload, profile)
    return steady_step_seconds(plan, compute)


def own_runs(plans: int = PLANS) -> tuple[dict[str, float], dict[str, Any]]:
    """`own_runs_mean_abs_error`, the largest error and `quota_error`, with every plan's times behind them. Without
    control groups there are no figures, and `skipped` says why."""
    reason = why_no_quotas()
    if reason is not None:
        return {}, {"skipped": reason}
    entries = []
    with ExitStack() as stack:
        text = text_of(Path(stack.enter_context(TemporaryDirectory(prefix="hethub-bench-"))))
        quotas = stack.enter_context(CpuQuotas(core_shares()))
        errors = quota_errors(quotas, core_shares())
        profile, traffic = measure(quotas)
        cluster = measured_cluster(traffic)
        first = random_plan(cluster, 0)
        engine = stack.enter_context(Ours(first, Training(workload=first.workload, tokens_file=text)))
        quotas.place(engine.crew, range(len(core_shares())))
        for seed in range(plans):
            plan = random_plan(cluster, seed)
            engine.load(plan)
            take(engine, _WARM_UP)
            repetition = take(engine, _STEPS)
            measured, predicted = repetition.seconds / _STEPS, predict_seconds(plan, profile)
            entries.append(
                {
                    "seed": seed,
                    "measured_seconds": measured,
                    "predicted_seconds": predicted,
                    "error": predicted / measured - 1,
                    "stages": [[s.layers for s in p.stages] for p in plan.pipelines],
                }
            )
    off = [abs(entry["error"]) for entry in entries]
    figures = {"own_runs_mean_abs_error": statistics.mean(off), "own_runs_max_abs_error": max(off)}
    return figures, {"runs": entries, "quota_errors": errors, "valid": max(map(abs, errors)) <= QUOTA_ERROR}
