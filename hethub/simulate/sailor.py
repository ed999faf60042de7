"""Sailor's published cost assumptions (SOSP 2025, arXiv 2504.17096), for comparing planners like with like.

Formulas are those of its simulator as its artifact ships it; code and structure are ours. They differ from what we
believe: layer times edited by hand, transfers added to a stage's time by the number of stages, gradients reduced over a
bandwidth of one device, memory with a constant that fits GH200.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

from hethub.cost.engines import EngineRun
from hethub.cost.shapes import layer_kind
from hethub.errors import InputError
from hethub.specs.workload import Model

__all__ = [
    "BYTES_PER_PARAMETER",
    "FLOAT_BYTES",
    "LARGEST_AVERAGED_DEGREE",
    "SailorCosts",
    "chain_seconds",
    "load_sailor_costs",
    "moving_seconds",
    "ring_seconds",
    "sailor_peak_bytes",
    "sailor_step_seconds",
]

_Row = dict[str, str]
FLOAT_BYTES = 4
BYTES_PER_PARAMETER = 24  # weight, gradient, Adam 8, bucket 4, a copy of DeepSpeed's 4
_RUNTIME_BYTES = 4.76e9 + 300e6
LARGEST_AVERAGED_DEGREE = 4  # it divides a stage's gradients by the tensor-parallel degree, but by 4 at most
_FEW_STAGES = 3  # of so many stages the first one's transfer counts once, else twice
_BUCKET_BYTES = 500_000_000  # gradients are reduced in buckets of so many bytes


@dataclass(frozen=True)
class SailorCosts:
    """Its tables: (forward, backward, update) seconds by layer, bandwidth polynomials, (elements, kept bytes, output
    elements) by layer."""

    times: dict[tuple[str, int, int, str], tuple[float, float, float]]
    links: dict[tuple[str, str, int], tuple[float, float, float]]
    memory: dict[tuple[int, str], tuple[float, float, float]]


def load_sailor_costs(folder: Path) -> SailorCosts:
    """Read layer_profiles, link_bandwidth and layer_memory, the rows that its simulator reads.

    Raises InputError where a table cannot be read.
    """
    times: dict[tuple[str, int, int, str], tuple[float, float, float]] = {}
    for row in _rows(folder / "layer_profiles.csv"):
        # Its simulator reads set S, in which rows may be edited; where set S repeats set P only P is in the table.
        place = (row["device_type"], int(row["tensor_parallel"]), int(row["micro_batch"]), row["layer_kind"])
        if row["source"] == "S" or place not in times:
            step = float(row["optimizer_step_ms"] or 0) / 1e3
            times[place] = (float(row["forward_ms"]) / 1e3, float(row["backward_ms"]) / 1e3, step)
    links = {
        (row["sender_device_type"], row["receiver_device_type"], int(row["sender_gpus"])): (
            float(row["coef_log2_squared"]),
            float(row["coef_log2"]),
            float(row["coef_constant"]),
        )
        for row in _rows(folder / "link_bandwidth.csv")
        if row["scope"] == "inter_node" and row["cluster"] in ("alps-clariden", "mit")
    }
    memory = {
        (int(row["tensor_parallel"]), row["layer_kind"]): (
            float(row["parameters"]),
            float(row["activation_bytes"]),
            float(row["output_elements"]),
        )
        for row in _rows(folder / "layer_memory.csv")
    }
    return SailorCosts(times, links, memory)


def sailor_step_seconds(run: EngineRun, costs: SailorCosts) -> float:
    """The pipeline + update + reduction.

    Raises InputError where its tables lack what the run uses.
    """
    stages = range(len(run.stages))
    compute = [_compute(run, n, costs) for n in stages]
    forth = [_between(run, n, n + 1, run.stages[n].layers[1] - 1, costs) for n in stages[:-1]]
    back = [_between(run, n, n - 1, run.stages[n].layers[0], costs) for n in stages[1:]]
    update = max(_update(run, n, costs) for n in stages)
    reduction = max(_reduction(run, n, costs) for n in stages)
    return chain_seconds(compute, moving_seconds(forth, back), run.micro_batches) + update + reduction


def chain_seconds(compute: Sequence[float], moving: Sequence[float], micro_batches: int) -> float:
    """Of a pipeline: (micro-batches - 1) x the slowest stage with its messages + all stages + all messages."""
    slowest = max(c + m for c, m in zip(compute, moving, strict=True))
    return (micro_batches - 1) * slowest + sum(compute) + sum(moving)


def moving_seconds(forth: Sequence[float], back: Sequence[float]) -> list[float]:
    """What it adds to the time of each stage for messages, from what an activation takes over each boundary (`forth`)
    and a gradient (`back`): the last stage's counts twice, the first one's too where there are more than three."""
    count = len(forth) + 1
    if count == 1:
        return [0.0]
    first = forth[0] if count <= _FEW_STAGES else 2 * forth[0]
    between = [back[stage - 1] + forth[stage] for stage in range(1, count - 1)]
    return [first, *between, 2 * back[-1]]


def ring_seconds(size: float, count: int, seconds: Callable[[float], float]) -> float:
    """An all-reduce among `count`, bucket by bucket: 2 (n - 1) passes of a part, each `seconds` of its bytes."""
    if count < 2:
        return 0.0
    whole, rest = divmod(size, _BUCKET_BYTES)
    buckets = [(whole, _BUCKET_BYTES), (1.0, rest)]
    return sum(2 * (count - 1) * times * seconds(part / count) for times, part in buckets if times * part > 0)


def sailor_peak_bytes(run: EngineRun, costs: SailorCosts) -> float:
    """Of the fullest stage: 24 bytes a parameter, what is kept x micro-batches in flight, a constant."""

    def stage_bytes(stage: int) -> float:
        known = [costs.memory[run.tensor_parallel, kind] for kind in _kinds(run, stage)]
        kept = sum(activation for _, activation, _ in known) * run.micro_batch
        parameters = sum(elements for elements, _, _ in known)
        return parameters * BYTES_PER_PARAMETER + kept * (len(run.stages) - stage) + _RUNTIME_BYTES

    return max(map(stage_bytes, range(len(run.stages))))


def _rows(path: Path) -> Iterator[_Row]:
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            yield from csv.DictReader(stream)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Name the data's folder.") from None


def _kind(model: Model, layer: int) -> str:
    return "decoder_first" if layer == 1 else layer_kind(model, layer)


def _kinds(run: EngineRun, stage: int) -> list[str]:
    return [_kind(run.model, layer) for layer in range(*run.stages[stage].layers)]


def _times(run: EngineRun, device_type: str, kind: str, costs: SailorCosts) -> tuple[float, float, float]:
    found = costs.times.get((device_type, run.tensor_parallel, run.micro_batch, kind))
    if found is None:
        raise InputError(
            f"Sailor's profiles have no {kind} on {device_type}, degree {run.tensor_parallel}, micro-batch "
            f"{run.micro_batch}. It does not interpolate: leave the run out."
        )
    return found


def _compute(run: EngineRun, stage: int, costs: SailorCosts) -> float:
    """Of the slowest replica."""
    return max(
        sum(sum(_times(run, group.device_type, kind, costs)[:2]) for kind in _kinds(run, stage))
        for group in set(run.stages[stage].replicas)
    )


def _update(run: EngineRun, stage: int, costs: SailorCosts) -> float:
    """The step that was timed for the small profiled model, whatever the stage holds."""
    kind = _kinds(run, stage)[0]
    return max(_times(run, group.device_type, kind, costs)[2] for group in set(run.stages[stage].replicas))


def _seconds(size: float, coefficients: tuple[float, float, float]) -> float:
    a, b, c = coefficients
    x = math.log2(size / 1e6)
    return size / ((a * x * x + b * x + c) * 1e9)


def _link(costs: SailorCosts, sender: str, receiver: str, devices: int) -> tuple[float, float, float]:
    found = costs.links.get((sender, receiver, devices))
    if found is None:
        raise InputError(
            f"Sailor has no link from {sender} to {receiver} for {devices} devices. Leave it out."
        )
    return found


def _between(run: EngineRun, stage: int, other: int, layer: int, costs: SailorCosts) -> float:
    """The slowest replica's send of `layer`'s whole output from `stage` to `other`."""
    size = costs.memory[1, _kind(run.model, layer)][2] * FLOAT_BYTES * run.micro_batch
    pairs = zip(run.stages[stage].replicas, run.stages[other].replicas, strict=True)
    return max(
        _seconds(size, _link(costs, one.device_type, two.device_type, run.tensor_parallel))
        for one, two in pairs
    )


def _reduction(run: EngineRun, stage: int, costs: SailorCosts) -> float:
    """Over the slowest neighbouring pair, at the bandwidth of one device each."""
    replicas = run.stages[stage].replicas
    elements = sum(costs.memory[1, kind][0] for kind in _kinds(run, stage))
    size = elements * FLOAT_BYTES / min(LARGEST_AVERAGED_DEGREE, run.tensor_parallel)
    links = {(one.device_type, two.device_type) for one, two in pairwise(replicas)}
    return max(
        (
            ring_seconds(size, len(replicas), partial(_seconds, coefficients=_link(costs, *ends, 1)))
            for ends in links
        ),
        default=0.0,
    )
