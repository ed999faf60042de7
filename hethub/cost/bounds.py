"""The physical bound: a step time that no plan can beat."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hethub.cost.compute import ComputeModel
from hethub.cost.linear_program import minimize
from hethub.cost.shapes import LayerKind

__all__ = ["PhysicalBound", "physical_bound", "physical_step_seconds"]

_KINDS: tuple[LayerKind, ...] = ("embedding", "decoder", "head")


@dataclass(frozen=True, slots=True, kw_only=True)
class PhysicalBound:
    """The smallest conceivable step time, and each device type's share of the throughput (adds up to 1).

    The linear program may give one type all of the head and another none, so shares are taken from what
    each type would reach by itself under the same bound. `layer_seconds[type][kind]` are seconds of the whole batch on
    one device of the type, a layer; `split[type][kind]` is what the program gives the type of that kind's work.
    """

    step_seconds: float
    shares: dict[str, float]
    layer_seconds: dict[str, dict[str, float]]
    split: dict[str, dict[str, float]]


def physical_bound(compute: ComputeModel) -> PhysicalBound:
    """Solve the linear program: split each layer kind's work over all devices fractionally, communication
    free.

    Minimize T with sum over types of x[kind, type] = 1 for each kind, and for each type
    sum over kinds of x[kind, type] * layers[kind] * device-seconds[kind, type] <= T * devices of the type.

    The lowest device-seconds per row over all micro-batches and tensor-parallel degrees are those of one
    device that takes the whole batch at once. An operator's time is max(flops / F, bytes / B). Flops are
    proportional to the rows and to the share; bytes are those of the weights, the same for any number of
    rows, plus those of the activations, proportional to the rows: so the time per row never rises with the
    rows. The ranks of a tensor-parallel group read all activations each and together all weights, so their
    flops add up to the whole's and their bytes to no less; and a sum of maxima is at least the maximum of
    the sums. Recomputation, reduction, norm and update only add. Of measured layers the best of all measured
    micro-batches and degrees counts, the seconds of a group's ranks added up, and of whole and split backwards.

    Raises InputError when a device type lacks a needed figure.
    """
    workload = compute.workload
    types = {device.type.name: device.type for device in compute.graph.devices}
    counts = Counter(device.type.name for device in compute.graph.devices)
    layers = {"embedding": 1, "decoder": workload.model.layers, "head": 1}
    work = [
        [
            layers[kind]
            * compute.least_layer_seconds(types[name], kind, workload.global_batch)
            / counts[name]
            for kind in _KINDS
        ]
        for name in types
    ]
    # In units of the time that the slowest type alone would take, so that all coefficients are at most 1.
    unit = max(sum(row) for row in work)
    width = len(_KINDS) * len(work)
    at_most = []
    for number, row in enumerate(work):
        line = [0.0] * (width + 1)
        line[number * len(_KINDS) : (number + 1) * len(_KINDS)] = [seconds / unit for seconds in row]
        line[width] = -1.0
        at_most.append((line, 0.0))
    equal = []
    for kind in range(len(_KINDS)):
        line = [1.0 if i % len(_KINDS) == kind else 0.0 for i in range(width)] + [0.0]
        equal.append((line, 1.0))
    solution = minimize([0.0] * width + [1.0], at_most=at_most, equal=equal)
    speeds = [1.0 / sum(row) for row in work]
    shares = {name: speed / sum(speeds) for name, speed in zip(types, speeds, strict=True)}
    return PhysicalBound(
        step_seconds=solution.value * unit,
        shares=shares,
        layer_seconds={
            name: {kind: row[place] * counts[name] / layers[kind] for place, kind in enumerate(_KINDS)}
            for name, row in zip(types, work, strict=True)
        },
        split={
            name: {kind: solution.x[number * len(_KINDS) + place] for place, kind in enumerate(_KINDS)}
            for number, name in enumerate(types)
        },
    )


def physical_step_seconds(compute: ComputeModel) -> float:
    """The physical bound's step time for the workload's own batch, in seconds."""
    return physical_bound(compute).step_seconds
