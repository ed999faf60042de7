"""What changes from one plan to another of the same model: devices, layers, bytes that have to move, the prediction."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cache

from hethub.cost.compute import state_bytes
from hethub.cost.graph import CostGraph
from hethub.cost.measured import NOT_MEASURED, Measured
from hethub.cost.shapes import BYTES, layer_parameters, parameter_span
from hethub.errors import InputError
from hethub.program.ownership import Ownership
from hethub.program.updaters import own_by_strength
from hethub.specs.layout import Layout, Share, Span, lay_out
from hethub.specs.plan import Plan

__all__ = ["PlanDiff", "diff_plans"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanDiff:
    """`moved_layers` counts layers that a device holds in the new plan and did not in the old one, over all devices;
    `weight_bytes` are the weights that those devices need (of a device a tied table once), `state_bytes` masters and
    optimizer state of all elements that another device updates. Decoders are means over a type's devices in use;
    seconds None where a plan holds no prediction."""

    shapes: tuple[str, str]
    joined: tuple[str, ...]
    left: tuple[str, ...]
    decoders: dict[str, tuple[float, float]]
    changed_devices: int
    moved_layers: int
    weight_bytes: int
    state_bytes: int
    step_seconds: tuple[float | None, float | None]


def diff_plans(old: Plan, new: Plan, measured: Measured = NOT_MEASURED) -> PlanDiff:
    """Compare two plans; who updates what goes by the devices' speed, as `measured`. Raises InputError where they are
    not of one model and precision."""
    if old.workload.model != new.workload.model or old.workload.precision != new.workload.precision:
        raise InputError(
            f"the plans are of {old.workload.model.name} in {old.workload.precision} and of "
            f"{new.workload.model.name} in {new.workload.precision}. Give two plans of one model and precision."
        )
    layouts = lay_out(old), lay_out(new)
    names = [[device.name for device in plan.cluster.devices()] for plan in (old, new)]
    held = [_held(layout, own) for layout, own in zip(layouts, names, strict=True)]
    moved, weights = _moved(held[0], held[1], new)
    return PlanDiff(
        shapes=(_shape(old), _shape(new)),
        joined=tuple(sorted(held[1].keys() - held[0].keys())),
        left=tuple(sorted(held[0].keys() - held[1].keys())),
        decoders=_decoders(held, (old, new)),
        changed_devices=sum(held[0].get(name) != found for name, found in held[1].items()),
        moved_layers=moved,
        weight_bytes=weights,
        state_bytes=_moved_state((old, new), layouts, measured),
        step_seconds=(_predicted(old), _predicted(new)),
    )


_Held = dict[str, dict[int, Share]]  # device -> layer -> share
_Shares = tuple[tuple[int, Share], ...]  # of layers


def _held(layout: Layout, names: list[str]) -> _Held:
    found: _Held = defaultdict(dict)
    for pipeline in layout.pipelines:
        for stage in pipeline.stages:
            for replica in stage.replicas:
                for rank in replica.ranks:
                    found[names[rank.device]].update(dict.fromkeys(range(*stage.layers), rank.share))
    return dict(found)


def _moved(before: _Held, after: _Held, plan: Plan) -> tuple[int, int]:
    """(Layers, bytes of weights) that devices hold after and not before. A tied table that stands in two layers of a
    device lies there once."""
    model = plan.workload.model
    types = {device.name: device.type for device in plan.cluster.devices()}
    ends = (0, model.layers + 1)

    def at_ends(held: dict[int, Share]) -> _Shares:
        return tuple((end, held[end]) for end in ends if end in held)

    @cache
    def elements(now: _Shares, was: _Shares) -> int:
        spans, kept = (
            {p: parameter_span(p, share) for layer, share in held for p in layer_parameters(model, layer)}
            for held in (now, was)
        )
        return sum(
            (stop - start - _overlap((start, stop), kept.get(p, (0, 0)))) * p.elements_per_index
            for p, (start, stop) in spans.items()
        )

    layers = size = 0
    for name, own in after.items():
        was = before.get(name, {})
        layers += len(own.keys() - was.keys())
        missing = elements(at_ends(own), at_ends(was))
        for layer, share in own.items():
            if layer not in ends:  # decoders are alike
                missing += elements(((1, share),), ((1, was[layer]),) if layer in was else ())
        size += BYTES[types[name].dtype_for(plan.workload.precision)] * missing
    return layers, size


def _overlap(one: Span, other: Span) -> int:
    return max(0, min(one[1], other[1]) - max(one[0], other[0]))


def _moved_state(plans: tuple[Plan, Plan], layouts: tuple[Layout, Layout], measured: Measured) -> int:
    """Bytes of masters and moments of elements that another device updates."""
    owners = []
    for plan, layout in zip(plans, layouts, strict=True):
        compute = measured.compute(CostGraph(plan.cluster), plan.workload)
        names = [device.name for device in plan.cluster.devices()]
        owners.append(_updaters(own_by_strength(layout, compute), names))
    moved = 0
    for parameter, after in owners[1].items():
        before = owners[0].get(parameter, [])
        at = 0
        for start, stop, each, updater in after:
            while at < len(before) and before[at][1] <= start:
                at += 1
            kept, place = 0, at
            while place < len(before) and before[place][0] < stop:
                if before[place][3] == updater:
                    kept += _overlap((start, stop), before[place][:2])
                place += 1
            moved += (stop - start - kept) * each
    return moved * state_bytes(plans[1].workload.precision)


def _updaters(ownership: Ownership, names: list[str]) -> dict[str, list[tuple[int, int, int, str]]]:
    """Parameter -> (start, stop, elements an index, updater), in order."""
    found: dict[str, list[tuple[int, int, int, str]]] = defaultdict(list)
    for entry in ownership.slices:
        parameter = ownership.parameters[entry.parameter]
        each = entry.elements // (entry.stop - entry.start)
        found[parameter.name].append((entry.start, entry.stop, each, names[entry.updater]))
    return {name: sorted(entries) for name, entries in found.items()}


def _shape(plan: Plan) -> str:
    """Such as `26 x 3 stages, 58-60 x 1 rows`, entry by entry, alike ones joined."""
    found: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for entry in plan.pipelines:
        found[len(entry.stages), entry.micro_batch_rows].append((entry.repeat, entry.micro_batches))
    return "; ".join(_entry(stages, rows, found[stages, rows]) for stages, rows in sorted(found))


def _entry(stages: int, rows: int, entries: list[tuple[int, int]]) -> str:
    counts = sorted(count for _, count in entries)
    many = str(counts[0]) if counts[0] == counts[-1] else f"{counts[0]}-{counts[-1]}"
    return f"{sum(repeat for repeat, _ in entries)} x {stages} stages, {many} micro-batches of {rows}"


def _decoders(held: list[_Held], plans: tuple[Plan, Plan]) -> dict[str, tuple[float, float]]:
    """Mean decoders of a device in use, by type, of both plans."""
    means: list[dict[str, float]] = []
    for own, plan in zip(held, plans, strict=True):
        types = {device.name: device.type.name for device in plan.cluster.devices()}
        devices: Counter[str] = Counter()
        decoders: Counter[str] = Counter()
        for name, layers in own.items():
            devices[types[name]] += 1
            decoders[types[name]] += sum(1 <= layer <= plan.workload.model.layers for layer in layers)
        means.append({name: decoders[name] / count for name, count in devices.items()})
    names = dict.fromkeys(name for own in means for name in own)
    return {name: (means[0].get(name, 0.0), means[1].get(name, 0.0)) for name in names}


def _predicted(plan: Plan) -> float | None:
    return None if plan.prediction is None else plan.prediction.get("step_seconds")
