"""What a plan will do: its program, its simulation, and the figures that `--json` prints.

`plan`, `simulate` and `launch` share this, so that a figure means the same wherever it stands.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hethub.cost.bounds import physical_step_seconds
from hethub.cost.compute import ComputeModel
from hethub.cost.memory import usable_bytes
from hethub.simulate.energy import egress_usd, joules_of
from hethub.simulate.modelled import Modelled
from hethub.specs.layout import PipelinePlace, Span, StagePlace
from hethub.specs.plan import Plan, plan_to_spec
from hethub.timeline.record import Kind
from hethub.timeline.summary import by_type

__all__ = ["StageRow", "figures", "joules_per_token", "stage_rows", "usd_per_million_tokens"]


def figures(
    plan: Plan, modelled: Modelled, ratio_interval: tuple[float, float] | None = None
) -> dict[str, Any]:
    """The JSON figures of a plan whose simulation kept its timeline; measured over predicted lies in `ratio_interval`
    with 95 %, where that is known. The homogeneous bound and
    the even split are searches of their own: they are taken from `plan.bounds`, and null with a reason
    under `missing` where the plan does not hold them.
    """
    compute = modelled.compute
    seconds = modelled.simulation.step_seconds
    tokens = plan.workload.global_batch * plan.workload.sequence_length
    speed = tokens / seconds
    stored = plan.bounds or {}
    missing: dict[str, str] = {}
    homogeneous = stored.get("homogeneous_tokens_per_second")
    physical = tokens / physical_step_seconds(compute)
    even = stored.get("even_tokens_per_second")
    if homogeneous is None:
        reason = "the plan holds no bounds; `hethub plan` computes them"
        missing["bounds.homogeneous_tokens_per_second"] = missing["share.homogeneous_bound"] = reason
        missing["share.not_a_bound"] = reason
    elif homogeneous == 0:
        missing["share.homogeneous_bound"] = "no device type can hold the model alone"
    if even is None:
        why = (
            "no even split fits on these devices"
            if stored
            else "the plan holds no bounds; `hethub plan` computes them"
        )
        missing["baselines.even_tokens_per_second"] = why
    if ratio_interval is None:
        reason = "no --calibration is given, and no --profiles that say how repeatable they are"
        missing["step_seconds_interval_95"] = reason
    return {
        "step_seconds": seconds,
        "step_seconds_interval_95": (
            None if ratio_interval is None else [seconds * ratio for ratio in ratio_interval]
        ),
        "tokens_per_second": speed,
        "bounds": {"homogeneous_tokens_per_second": homogeneous, "physical_tokens_per_second": physical},
        "share": {
            "homogeneous_bound": speed / homogeneous if homogeneous else None,
            "physical_bound": speed / physical,
            "not_a_bound": stored.get("not_a_bound"),
        },
        "device_types": _device_types(modelled),
        "joules_per_token": joules_per_token(modelled, tokens, missing),
        "usd_per_million_tokens": usd_per_million_tokens(modelled, seconds, tokens, missing),
        "baselines": {"even_tokens_per_second": even},
        "emulated": plan.cluster.emulated_time_scale is not None,
        "missing": missing,
        "plan": plan_to_spec(plan),
    }


def _device_types(modelled: Modelled) -> list[dict[str, Any]]:
    """One entry a type; ratios are means over all its devices, those left out included (they are idle)."""
    devices = modelled.compute.graph.devices
    types = {device.type.name: device.type for device in devices}
    used = Counter(devices[d].type.name for d in modelled.layout.used)
    peak: dict[str, int] = {}
    for device, size in modelled.peak_bytes.items():
        name = devices[device].type.name
        peak[name] = max(peak.get(name, 0), size)
    return [
        {
            "name": entry.device_type,
            "count": entry.devices,
            "used": used[entry.device_type],
            "busy_ratio": entry.busy_ratio,
            "exposed_communication_ratio": entry.exposed_communication_ratio,
            "bubble_ratio": entry.bubble_ratio,
            "peak_memory_bytes": peak.get(entry.device_type, 0),
            "memory_bytes": types[entry.device_type].memory_bytes,
        }
        for entry in by_type(modelled.summaries)
    ]


def joules_per_token(modelled: Modelled, tokens: int, missing: dict[str, str]) -> float | None:
    """Energy of the devices in use (`energy.joules_of`); None, with the reason in `missing`, where it is not known."""
    joules = 0.0
    for device in modelled.layout.used:
        device_type = modelled.compute.graph.devices[device].type
        own = joules_of(device_type, modelled.summaries[device])
        if own is None:
            missing["joules_per_token"] = f"power_watts of {device_type.name} is not known"
            return None
        joules += own
    return joules / tokens


def usd_per_million_tokens(
    modelled: Modelled, seconds: float, tokens: int, missing: dict[str, str]
) -> float | None:
    """Rent of the devices in use, and what their messages over priced links cost; None, with the reason in `missing`,
    where that is not known."""
    usd_per_hour = 0.0
    for device in modelled.layout.used:
        device_type = modelled.compute.graph.devices[device].type
        price = device_type.usd_per_hour
        if price is None:
            missing["usd_per_million_tokens"] = f"usd_per_hour of {device_type.name} is not known"
            return None
        usd_per_hour += price
    usd = usd_per_hour / 3600 * seconds + egress_usd(modelled.program, modelled.compute.graph)
    return usd / tokens * 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRow:
    """One stage of the split, as a table shows it; alike pipelines are one (`repeat`).

    `replicas` are (number, device type, tensor-parallel degree, rows). Memory is the fullest device's, with
    what its type can use; `seconds` is forward and backward of one micro-batch on the slowest replica,
    recomputation included; `busy_ratio` the mean over the stage's devices in all alike pipelines.
    """

    pipeline: int
    repeat: int
    stage: int
    replicas: tuple[tuple[int, str, int, int], ...]
    layers: Span
    recompute: str
    micro_batches: int
    micro_batch_rows: int
    memory_bytes: int
    usable_bytes: int
    seconds: float
    busy_ratio: float


def stage_rows(plan: Plan, modelled: Modelled) -> list[StageRow]:
    """The split in rows for people, pipeline entry by pipeline entry."""
    busy = [summary.busy_ratio for summary in modelled.summaries]
    rows = []
    first = 0
    for entry in plan.pipelines:
        alike = modelled.layout.pipelines[first : first + entry.repeat]
        for stage in range(len(entry.stages)):
            rows.append(_stage_row(modelled.compute, modelled.peak_bytes, busy, alike, stage))
        first += entry.repeat
    return rows


def _stage_row(
    compute: ComputeModel,
    memory: Mapping[int, int],
    busy: list[float],
    alike: tuple[PipelinePlace, ...],
    number: int,
) -> StageRow:
    pipeline, stage = alike[0], alike[0].stages[number]
    devices = compute.graph.devices
    members = [device for copy in alike for device in copy.stages[number].devices()]

    def fullness(device: int) -> float:
        return memory[device] / usable_bytes(devices[device].type)

    fullest = max(members, key=fullness)
    return StageRow(
        pipeline=pipeline.index,
        repeat=len(alike),
        stage=number,
        replicas=_replicas(compute, stage),
        layers=stage.layers,
        recompute=stage.recompute,
        micro_batches=pipeline.micro_batches,
        micro_batch_rows=pipeline.micro_batch_rows,
        memory_bytes=memory[fullest],
        usable_bytes=usable_bytes(devices[fullest].type),
        seconds=max(_replica_seconds(compute, stage, place) for place in range(len(stage.replicas))),
        busy_ratio=sum(busy[device] for device in members) / len(members),
    )


def _replicas(compute: ComputeModel, stage: StagePlace) -> tuple[tuple[int, str, int, int], ...]:
    kinds: Counter[tuple[str, int, int]] = Counter()
    for replica in stage.replicas:
        names = dict.fromkeys(compute.graph.devices[rank.device].type.name for rank in replica.ranks)
        kinds["+".join(names), len(replica.ranks), replica.rows[1] - replica.rows[0]] += 1
    return tuple((count, *kind) for kind, count in kinds.items())


def _replica_seconds(compute: ComputeModel, stage: StagePlace, place: int) -> float:
    replica = stage.replicas[place]
    rows = replica.rows[1] - replica.rows[0]
    return sum(
        compute.group_price(replica.ranks, stage.layers, rows, kind, recompute=stage.recompute).seconds
        for kind in (Kind.FORWARD, Kind.RECOMPUTE, Kind.BACKWARD)
    )
