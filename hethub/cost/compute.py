"""Compute and collective times: a roofline per operator.

Time of an operator = max(flops / achievable flop/s, bytes / achievable bytes/s), as in Williams et al.,
"Roofline" (CACM 2009); achievable = peak x the device type's measured share. Operators of one device follow
each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from types import MappingProxyType
from typing import TYPE_CHECKING

from hethub.cost.footprint import rank_share
from hethub.cost.graph import CostGraph, is_host
from hethub.cost.shapes import (
    BYTES,
    LayerKind,
    Segment,
    Work,
    held_elements,
    layer_kind,
    layer_segments,
)
from hethub.specs.cluster import DeviceType
from hethub.specs.layout import RankPlace, Share, Span
from hethub.specs.workload import Workload
from hethub.timeline.record import Kind

if TYPE_CHECKING:  # loaded where there is a profile
    from hethub.cost.profiles.curve import LinkFit
    from hethub.cost.profiles.profile import Profile

__all__ = [
    "ComputeModel",
    "ComputePrice",
    "PricedSegment",
    "exchange_seconds",
    "gradient_bytes",
    "state_bytes",
]


@dataclass(frozen=True, slots=True)
class PricedSegment:
    """One segment of a tensor-parallel group's action: every member's seconds and its collectives' together."""

    member_seconds: tuple[float, ...]
    collective_seconds: float


@dataclass(frozen=True, slots=True)
class ComputePrice:
    """An action of a tensor-parallel group: all members start together and end together.

    `seconds` = sum over segments of the slowest member + the collectives; a member's own compute is busy time, the
    rest exposed communication. Weight gradients (BACKWARD_WEIGHT) are one segment without a collective: nobody waits
    for the others there, and `alone` is what a member really does.
    """

    segments: tuple[PricedSegment, ...]
    seconds: float
    busy_seconds: tuple[float, ...]

    def alone(self, member: int) -> ComputePrice:
        """The action as this member would do it without waiting for the others: its own compute only."""
        busy = self.busy_seconds[member]
        return ComputePrice((PricedSegment((busy,), 0.0),), busy, (busy,))


def exchange_seconds(graph: CostGraph, devices: Sequence[int], shard_bytes: float) -> float:
    """Ring all-gather or reduce-scatter over the group's actual paths: n - 1 steps in which everyone passes a shard
    on, each of latency + shard / bandwidth, the worst hop counting (Patarasuk and Yuan, "Bandwidth optimal all-reduce",
    JPDC 2009, of which they are the halves)."""
    count = len(devices)
    if count < 2 or shard_bytes == 0:
        return 0.0
    hops = [graph.path(devices[i], devices[(i + 1) % count]) for i in range(count)]
    return (count - 1) * max(hop.seconds(shard_bytes) for hop in hops)


def gradient_bytes(precision: str) -> int:
    """Bytes of one accumulated gradient element: fp32, or fp64 when the job computes in fp64."""
    return 8 if precision == "fp64" else 4


def state_bytes(precision: str) -> int:
    """Bytes of one owned element's optimizer state: two moments, and a master copy of 16-bit weights."""
    width = gradient_bytes(precision)
    return 2 * width + (width if BYTES[precision] < width else 0)


class ComputeModel:
    """Prices compute on a cluster for one workload; results are kept, since few shapes repeat very often.

    A `profile` sets the level where it has the layer: on one rank, or on an even group of a measured tensor-parallel
    degree, it takes what was measured, and the roofline only shares that out over segments, halves of a backward,
    uneven ranks, and degrees that were not measured.
    `slow_down` by device type says how much longer a device works than its figures or its profile say.
    """

    def __init__(
        self,
        graph: CostGraph,
        workload: Workload,
        profile: Profile | None = None,
        *,
        slow_down: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self.graph = graph
        self.workload = workload
        self.profile = profile
        self.slow_down = slow_down
        self._seconds: dict[tuple[str, LayerKind, Share, int, Work], tuple[float, ...]] = {}
        self._exchange: dict[tuple[tuple[int, ...], int], float] = {}
        self._prices: dict[tuple[object, ...], ComputePrice] = {}
        self._rates: dict[str, tuple[float, float, int]] = {}
        self._nodes: dict[tuple[str, int], tuple[int, ...] | None] = {}

    def on(self, graph: CostGraph) -> ComputeModel:
        """The same workload on another cluster, under what was measured."""
        return ComputeModel(graph, self.workload, self.profile, slow_down=self.slow_down)

    @cached_property
    def by_figures(self) -> ComputeModel:
        """The same cluster by its figures alone: what decides a program's order, so that a plan that was made with what
        was measured runs the very lists that were predicted, wherever those measurements are not at hand."""
        if self.profile is None and not self.slow_down:
            return self
        return ComputeModel(self.graph, self.workload)

    def _rate(self, device_type: DeviceType) -> tuple[float, float, int]:
        """Achievable flop/s and bytes/s, and bytes per element, of a device type in this job's precision."""
        rate = self._rates.get(device_type.name)
        if rate is None:
            precision = self.workload.precision
            rate = self._rates[device_type.name] = (
                device_type.flops_per_second(precision),
                device_type.memory_bandwidth_bytes_per_second * device_type.memory_efficiency,
                BYTES[device_type.dtype_for(precision)],
            )
        return rate

    def segments(
        self, device_type: DeviceType, kind: LayerKind, share: Share, rows: int, work: Work
    ) -> tuple[Segment, ...]:
        """The work of one layer on one rank (see `shapes.layer_segments`)."""
        size, seq = self._rate(device_type)[2], self.workload.sequence_length
        return layer_segments(self.workload.model, kind, share, rows, seq=seq, size=size, work=work)

    def segment_seconds(
        self, device_type: DeviceType, kind: LayerKind, share: Share, rows: int, work: Work
    ) -> tuple[float, ...]:
        """Seconds of each segment of one layer on one rank, collectives not counted."""
        key = (device_type.name, kind, share, rows, work)
        found = self._seconds.get(key)
        if found is None:
            level = self._slow(device_type)
            if self.profile is not None:
                level *= self._level(self.profile, device_type, kind, rows, work)
            roofline = self._roofline(device_type, kind, share, rows, work)
            found = self._seconds[key] = tuple(level * seconds for seconds in roofline)
        return found

    def _slow(self, device_type: DeviceType) -> float:
        return self.slow_down.get(self.graph.as_known(device_type).name, 1.0)

    def _roofline(
        self, device_type: DeviceType, kind: LayerKind, share: Share, rows: int, work: Work
    ) -> tuple[float, ...]:
        flops, bandwidth, _ = self._rate(device_type)
        return tuple(
            sum(max(o.flops / flops, o.bytes / bandwidth) for o in segment.operations)
            for segment in self.segments(device_type, kind, share, rows, work)
        )

    def _level(
        self, profile: Profile, device_type: DeviceType, kind: LayerKind, rows: int, work: Work
    ) -> float:
        """Measured over roofline seconds at this tensor-parallel degree; where that was not measured, of a whole layer
        on one rank; 1 where neither was."""
        for degree in dict.fromkeys((work.members, 1)):
            found = self._level_at(profile, device_type, kind, rows, work.kind, degree)
            if found is not None:
                return found
        return 1.0

    def _level_at(
        self, profile: Profile, device_type: DeviceType, kind: LayerKind, rows: int, work: Kind, degree: int
    ) -> float | None:
        """Of a rank of an even group on one node, less the group's collectives, which are priced apart. Where these
        alone would take more than was measured, all took less than is priced, in the same proportion."""
        from hethub.cost.profiles.profile import LayerKey

        model, device_type = self.workload.model, self.graph.as_known(device_type)
        group = self._neighbours(device_type, degree)
        if group is None or degree > model.kv_heads:
            return None
        key = LayerKey(
            model.name, device_type.name, kind, degree, self.workload.sequence_length, self.workload.precision
        )
        kind_of = {Kind.RECOMPUTE: Kind.FORWARD}.get(work, work)
        measured = profile.seconds(key, kind_of.name.lower(), rows)
        if measured is None and kind_of in (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT):
            kind_of = Kind.BACKWARD
            measured = profile.seconds(key, "backward", rows)
        if measured is None:
            return None
        share = rank_share(model, degree)
        whole = Work(kind_of, members=degree, largest_vocab=share.vocab[1])
        roofline = sum(self._roofline(device_type, kind, share, rows, whole))
        segments = self.segments(device_type, kind, share, rows, whole)
        collectives = sum(self.collective_seconds(group, segment) for segment in segments)
        if not roofline:
            return 1.0
        return max(measured - collectives, measured * roofline / (roofline + collectives)) / roofline

    def _neighbours(self, device_type: DeviceType, degree: int) -> tuple[int, ...] | None:
        """As many devices known by the type on one node, or None where no node has them."""
        key = (device_type.name, degree)
        if key not in self._nodes:
            nodes: dict[tuple[str, int], list[int]] = {}
            for number, device in enumerate(self.graph.devices):
                if self.graph.as_known(device.type).name == device_type.name:
                    nodes.setdefault((device.group, device.node), []).append(number)
            wide = (tuple(node[:degree]) for node in nodes.values() if len(node) >= degree)
            self._nodes[key] = next(wide, None)
        return self._nodes[key]

    def layer_seconds(self, device_type: DeviceType, kind: LayerKind, share: Share, rows: int) -> float:
        """Forward and backward of one layer on one device alone, nothing recomputed."""
        return sum(
            sum(self.segment_seconds(device_type, kind, share, rows, Work(work)))
            for work in (Kind.FORWARD, Kind.BACKWARD)
        )

    def least_layer_seconds(self, device_type: DeviceType, kind: LayerKind, rows: int) -> float:
        """The least device-seconds of forward and backward of a layer's `rows` rows, nothing recomputed, collectives
        left out. By the roofline one device with all rows at once takes least; where layers were measured, the number
        of rows at a time, the size of the group and a backward in halves may take less."""
        profile, model = self.profile, self.workload.model
        if profile is None:
            return self.layer_seconds(device_type, kind, Share.whole(model), rows)
        counts = {rows, *(n for n in profile.micro_batches if n < rows)}
        known = self.graph.as_known(device_type)
        wider = takewhile(lambda n: self._neighbours(known, n) is not None, range(2, model.kv_heads + 1))
        degrees = (1, *wider)
        return rows * min(
            self._device_seconds(profile, device_type, kind, n, degree) / n
            for n in sorted(counts)
            for degree in degrees
        )

    def _device_seconds(
        self, profile: Profile, device_type: DeviceType, kind: LayerKind, rows: int, degree: int
    ) -> float:
        """What the ranks of a group of this degree take at least, added up, whatever their shares: parts of a layer are
        no less work than all of it on one device, and go at the group's level."""
        share = Share.whole(self.workload.model)

        def seconds(what: Kind) -> float:
            level = self._level(profile, device_type, kind, rows, Work(what, members=degree))
            return level * sum(self._roofline(device_type, kind, share, rows, Work(what)))

        halves = seconds(Kind.BACKWARD_INPUT) + seconds(Kind.BACKWARD_WEIGHT)
        backward = min(seconds(Kind.BACKWARD), halves)
        return self._slow(device_type) * (seconds(Kind.FORWARD) + backward)

    def collective_seconds(self, devices: tuple[int, ...], segment: Segment) -> float:
        """All collectives of a segment among a tensor-parallel group, one after the other."""
        exchange = segment.exchanges * self._exchange_seconds(devices, segment.shard_bytes)
        return exchange + segment.chunks * self._exchange_seconds(devices, segment.chunk_bytes)

    def _exchange_seconds(self, devices: tuple[int, ...], shard_bytes: int) -> float:
        key = (devices, shard_bytes)
        found = self._exchange.get(key)
        if found is None:
            found = self._exchange[key] = exchange_seconds(self.graph, devices, shard_bytes)
        return found

    def group_price(
        self,
        ranks: tuple[RankPlace, ...],
        layers: Span,
        rows: int,
        work: Kind,
        *,
        recompute: str = "none",
        training: bool = True,
    ) -> ComputePrice:
        """The action of kind `work` of one replica over `layers` (half-open) and `rows` sequences.

        `recompute` is the stage's mode: it says what RECOMPUTE does again, and with "full" the head's gradients move
        from FORWARD to there. Without `training` FORWARD is an evaluation's.
        """
        # Decoders are alike: their number and the ends tell all. So are devices of a type that work alone.
        ends = (layers[0] == 0, layers[1] == self.workload.model.layers + 2)
        who: object = ranks
        if len(ranks) == 1:
            who = self.graph.devices[ranks[0].device].type.name, ranks[0].share
        key = (who, layers[1] - layers[0], ends, rows, work, recompute, training)
        found = self._prices.get(key)
        if found is None:
            largest = max(rank.share.vocab[1] - rank.share.vocab[0] for rank in ranks)
            found = self._prices[key] = self._group_price(
                ranks, layers, rows, Work(work, recompute, len(ranks), largest, training)
            )
        return found

    def _group_price(self, ranks: tuple[RankPlace, ...], layers: Span, rows: int, work: Work) -> ComputePrice:
        model = self.workload.model
        segments: list[PricedSegment] = []
        forward = work.kind in (Kind.FORWARD, Kind.RECOMPUTE)
        order = range(*layers) if forward else range(layers[1] - 1, layers[0] - 1, -1)
        by_kind: dict[LayerKind, list[PricedSegment]] = {}
        for layer in order:
            kind = layer_kind(model, layer)
            if kind not in by_kind:
                by_kind[kind] = self._layer_segments(ranks, kind, rows, work)
            segments.extend(by_kind[kind])
        busy = tuple(sum(s.member_seconds[i] for s in segments) for i in range(len(ranks)))
        if work.kind == Kind.BACKWARD_WEIGHT:
            return ComputePrice((PricedSegment(busy, 0.0),), max(busy), busy)
        return ComputePrice(
            tuple(segments), sum(max(s.member_seconds) + s.collective_seconds for s in segments), busy
        )

    def _layer_segments(
        self, ranks: tuple[RankPlace, ...], kind: LayerKind, rows: int, work: Work
    ) -> list[PricedSegment]:
        devices = tuple(rank.device for rank in ranks)
        types = [self.graph.devices[device].type for device in devices]
        members = [
            self.segment_seconds(t, kind, rank.share, rows, work)
            for t, rank in zip(types, ranks, strict=True)
        ]
        segments = self.segments(types[0], kind, ranks[0].share, rows, work)
        return [
            PricedSegment(tuple(m[i] for m in members), self.collective_seconds(devices, segment))
            for i, segment in enumerate(segments)
        ]

    def message_work(self, device: int) -> tuple[LinkFit, LinkFit] | None:
        """What a message takes of the device itself, sent and received, where that was measured: a real CPU moves its
        messages in the time in which it would compute."""
        device_type = self.graph.as_known(self.graph.devices[device].type)
        if self.profile is None or not self.graph.shares_memory or not is_host(device_type):
            return None
        return self.profile.message_work(device_type.name)

    def stage_parameters(self, share: Share, layers: Span) -> int:
        """Parameter elements that a rank holds of `layers`; a tied table that stands twice counts once."""
        return held_elements(self.workload.model, share, layers)[0]

    def touch_seconds(self, device_type: DeviceType, size_bytes: float) -> float:
        """An action bound by memory traffic (reduce, norm, update, gather)."""
        return self._slow(device_type) * size_bytes / self._rate(device_type)[1]
