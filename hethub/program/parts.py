"""Parts: a stage cut into layer ranges, so that gradients leave and new weights come while other layers compute."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from hethub.cost.compute import ComputeModel, gradient_bytes
from hethub.program.ownership import Ownership
from hethub.specs.layout import Layout, Span, StagePlace
from hethub.timeline.record import Kind

__all__ = ["Parts", "cut_stages"]

Parts = Mapping[tuple[int, int], tuple[Span, ...]]  # (pipeline, stage) -> layer ranges

_LATENCIES = 4  # a bucket's transfer is at least so many latencies of its path, so that few are wasted
_LEAST_SECONDS = 5e-4  # of a part's backward: what starting an action may cost
_MOST_PARTS = 32
_MOST_MESSAGES = (
    20_000  # of gradients in a step, beyond which a program would take long to make and to simulate
)


class _Traffic:
    """Per device: bytes of gradients that each layer sends or takes, the slowest way that they go, and how many devices
    in use its node's link serves."""

    def __init__(self, layout: Layout, compute: ComputeModel, ownership: Ownership) -> None:
        width = gradient_bytes(compute.workload.precision)
        self.bytes: dict[tuple[int, int], int] = defaultdict(int)  # (device, layer)
        for entry in ownership.slices:
            layer = ownership.parameters[entry.parameter].layers[0]
            if len(entry.holders) > 1:
                for device in entry.holders:
                    others = len(entry.holders) - 1 if device == entry.updater else 1
                    self.bytes[device, layer] += entry.elements * width * others
        routes = max(1, len(ownership.gradient_routes))
        self.most_parts = max(1, min(_MOST_PARTS, _MOST_MESSAGES // routes))
        self.least: dict[int, float] = defaultdict(float)  # device -> bytes of a bucket worth sending
        self.slowest: dict[int, float] = {}  # device -> bytes per second
        for source, destination in ownership.gradient_routes:
            path = compute.graph.path(source, destination)
            speed = path.bandwidth_bytes_per_second
            worth = _LATENCIES * path.latency_seconds * speed
            for device in (source, destination):
                self.least[device] = max(self.least[device], worth)
                self.slowest[device] = min(self.slowest.get(device, speed), speed)
        places = [(d.group, d.node) for d in compute.graph.devices]
        beside = Counter(places[d] for d in layout.used)
        self.sharing = {d: beside[places[d]] for d in layout.used}

    def seconds(self, devices: Iterable[int], layers: Span) -> float:
        """Until these layers' gradients are exchanged, both ways at once, every device of a node doing the same."""
        worst = 0.0
        for device in devices:
            if device in self.slowest:
                both = sum(self.bytes.get((device, layer), 0) for layer in range(*layers))
                worst = max(worst, both / 2 * self.sharing[device] / self.slowest[device])
        return worst


def cut_stages(
    layout: Layout, compute: ComputeModel, ownership: Ownership, margins: Mapping[tuple[int, int], float]
) -> Parts:
    """Cut every stage whose gradients others need into parts, each worth a message and an action of its own.

    A stage whose exchange is done within its margin (pipeline, stage -> seconds that the pipeline goes on without the
    stage at either end of the step) stays whole: parts would hide nothing that is not hidden.
    Buckets are filled from the last layer on, in the order of backward; what is left at the front joins the last one.
    """
    traffic = _Traffic(layout, compute, ownership)
    return {
        (pipeline.index, stage.index): _cut(stage, compute, traffic, margins[pipeline.index, stage.index])
        for pipeline in layout.pipelines
        for stage in pipeline.stages
    }


def _cut(stage: StagePlace, compute: ComputeModel, traffic: _Traffic, margin: float) -> tuple[Span, ...]:
    devices = list(stage.devices())
    if traffic.seconds(devices, stage.layers) <= margin:
        return (stage.layers,)
    # A layer's weight: the share of a worthwhile bucket and of a worthwhile action that it fills.
    fills = [_fill(stage, layer, devices, compute, traffic) for layer in range(*stage.layers)]
    least = 1.0
    while len(spans := _merge(stage.layers, fills, least)) > traffic.most_parts:
        least *= 1.25
    return spans


def _fill(
    stage: StagePlace, layer: int, devices: Sequence[int], compute: ComputeModel, traffic: _Traffic
) -> float:
    sent = min(
        traffic.bytes.get((d, layer), 0) / traffic.least[d] if traffic.least[d] else 1.0 for d in devices
    )
    replica = stage.replicas[0]
    rows = replica.rows[1] - replica.rows[0]
    backward = compute.group_price(replica.ranks, (layer, layer + 1), rows, Kind.BACKWARD).seconds
    return min(sent, backward / _LEAST_SECONDS)


def _merge(layers: Span, fills: Sequence[float], least: float) -> tuple[Span, ...]:
    spans: list[Span] = []
    stop, filled = layers[1], 0.0
    for layer in range(layers[1] - 1, layers[0] - 1, -1):
        filled += fills[layer - layers[0]]
        if filled >= least:
            spans.append((layer, stop))
            stop, filled = layer, 0.0
    if stop > layers[0]:
        if spans:
            spans[-1] = (layers[0], spans[-1][1])
        else:
            spans.append((layers[0], stop))
    return tuple(reversed(spans))
