"""How fast devices and links were in a measured step, each against its own prediction; and what a plan would take at
such a pace.

A device's pace is the time of its compute actions over what is predicted for the same ones. A link's is that of its
large messages, from sending to arrival, over what they would take as all messages were sent: others on the same link
keep them, in a queue or by sharing it, so the links are played through with the measured times of sending. Only a
message that the receiver stood waiting for shows when it arrived. It counts for the slowest link of its path; where two
alike networks are joined, for both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from hethub.cost.compute import ComputeModel, ComputePrice, PricedSegment
from hethub.cost.graph import CostGraph, reserve
from hethub.program.actions import Price, Program
from hethub.program.compile import compile_program
from hethub.simulate.engine import simulate
from hethub.simulate.what_if import Change, changed_graph, with_links
from hethub.specs.layout import lay_out
from hethub.specs.plan import Plan
from hethub.timeline.record import COMPUTE_KINDS, Kind, Timeline
from hethub.timeline.summary import is_kind, sent_seconds

__all__ = ["MOVED", "Expected", "Pace", "at_pace", "median_pace", "paced_graph", "paced_step_seconds"]

Records = npt.NDArray[np.void]
Floats = npt.NDArray[np.float64]

MOVED = 1.25
"""Times as long (or short) as expected: less is not worth a word."""

_WAITED = 0.05  # of a message's time: a shorter wait may have ended long after it arrived
_LARGE = 0.5  # of the largest message over a link: smaller ones are mostly latency
_LEAST_SHARE = 0.05  # of a link's bandwidth, however late its messages were
_HALVINGS = 9  # of the interval in which a link's share of its bandwidth is looked for
# By how much of the wall's time a message must be late to count: a host with more processes than cores wakes late.
_LATE_SECONDS, _LATE_EMULATED_SECONDS = 0.001, 0.01
_EXACT = 0.02  # a figure closer to its prediction is taken as predicted


@dataclass(frozen=True, slots=True)
class Pace:
    """Measured over predicted seconds, by name; what a step did not show is left out. `bandwidth` is what is left of
    the bandwidth of links that moved, where that has been fitted."""

    devices: Mapping[str, float] = field(default_factory=dict)
    links: Mapping[str, float] = field(default_factory=dict)
    bandwidth: Mapping[str, float] = field(default_factory=dict)


class Expected:
    """What a plan's prediction (its step 0) says of devices and links, to hold measured steps against."""

    def __init__(self, predicted: Timeline, graph: CostGraph) -> None:
        self._graph = graph
        self._late = _LATE_EMULATED_SECONDS if predicted.info.emulated else _LATE_SECONDS
        self._names = predicted.info.devices
        self._slowest_links: dict[tuple[int, int], tuple[str, ...]] = {}
        records = predicted.records[predicted.records["step"] <= 0]
        step = records[records["step"] == 0]
        compute = step[is_kind(step, COMPUTE_KINDS)]
        self._keys, self._busy = _sorted(_key(compute), compute["busy"])
        self._large: dict[str, float] = {}
        sends = step[(step["kind"] == Kind.SEND) & (step["peer"] >= 0)]
        for source, destination, size in _unique(sends, ("device", "peer", "bytes")):
            for link in self._slowest(source, destination):
                self._large[link] = max(self._large.get(link, 0.0), _LARGE * size)
        # Real links are shared, not queued for: what that makes of the prediction itself is no drift.
        self._usual: dict[str, float] = {}
        self._usual = self._links(records, 0, graph)

    def pace(self, records: Records, step: int, time_scale: float = 1.0) -> Pace:
        """The pace of a measured step, by its records of all devices. Those of the step before, where they are given
        too, tell of messages that were still on their way. `time_scale` is wall seconds per modelled second."""
        own = records[records["step"] == step]
        compute = own[is_kind(own, COMPUTE_KINDS)]
        keys, busy = _sorted(_key(compute), _modelled(own, compute, time_scale))
        _, mine, theirs = np.intersect1d(self._keys, keys, assume_unique=True, return_indices=True)
        device = self._keys[mine] >> 32
        expected = np.bincount(device, weights=self._busy[mine], minlength=len(self._names))
        measured = np.bincount(device, weights=busy[theirs], minlength=len(self._names))
        devices = {
            self._names[d]: float(measured[d] / expected[d]) for d in np.flatnonzero(expected > 0).tolist()
        }
        late = self._late / time_scale
        return Pace(devices, self._links(_near(records, step), step, self._graph, late))

    def bandwidth_share(self, records: Records, steps: Sequence[int], link: str) -> float:
        """The share of its bandwidth at which a link's messages arrive as they were measured in these steps."""
        low, high = _LEAST_SHARE, 1.0
        for _ in range(_HALVINGS):
            share = math.sqrt(low * high)
            graph = CostGraph(with_links(self._graph.cluster, {link: share}))
            found = [self._links(_near(records, step), step, graph).get(link) for step in steps]
            ratios = [ratio for ratio in found if ratio is not None]
            if ratios and float(np.median(ratios)) > 1.0:
                high = share
            else:
                low = share
        return math.sqrt(low * high)

    def _links(
        self, records: Records, step: int, graph: CostGraph, late_seconds: float = 0.0
    ) -> dict[str, float]:
        """Link -> seconds of the large messages that arrived in a step over those expected of them; the median."""
        sent = sent_seconds(records)
        waits = (records["kind"] == Kind.RECEIVE) & (records["step"] == step) & np.isfinite(sent)
        waits &= records["peer"] >= 0  # of a collective nobody can tell which link was slow
        flight = records["end"] - sent
        waits &= records["end"] - records["start"] > _WAITED * flight
        expected = _played(records, graph)
        ratios: dict[str, list[float]] = {}
        for source, destination, message, size, start, seconds in zip(
            records["peer"][waits].tolist(),
            records["device"][waits].tolist(),
            records["message"][waits].tolist(),
            records["bytes"][waits].tolist(),
            sent[waits].tolist(),
            flight[waits].tolist(),
            strict=True,
        ):
            if message not in expected or seconds <= 0:
                continue
            # The sender's own record of when that was may differ by what a call takes.
            usual = min(expected[message], key=lambda send: abs(send[0] - start))[1]
            ratio = 1.0 if 0 < seconds - usual < late_seconds else seconds / usual
            for link in self._slowest(source, destination):
                if size >= self._large.get(link, np.inf):
                    ratios.setdefault(link, []).append(ratio / self._usual.get(link, 1.0))
        return {link: float(np.median(found)) for link, found in ratios.items()}

    def _slowest(self, source: int, destination: int) -> tuple[str, ...]:
        key = (source, destination)
        if key not in self._slowest_links:
            self._slowest_links[key] = self._graph.slowest_links(source, destination)
        return self._slowest_links[key]


def median_pace(paces: list[Pace]) -> Pace:
    """Of several steps, each figure's median over those that show it."""

    def medians(of: list[Mapping[str, float]]) -> dict[str, float]:
        names = dict.fromkeys(name for figures in of for name in figures)
        return {n: float(np.median([figures[n] for figures in of if n in figures])) for n in names}

    return Pace(
        medians([p.devices for p in paces]),
        medians([p.links for p in paces]),
    )


def at_pace(program: Program, devices: Mapping[int, float]) -> Program:
    """The program with each device's own compute so many times as long."""
    prices: dict[tuple[int, int, Kind, int], Price] = {}
    for (device, stage, kind, part), price in program.prices.items():
        alone = stage < 0 or price.alone
        members = (device,) if alone else program.groups[device, stage]
        factors = [devices.get(member, 1.0) for member in members]
        changed = price.price if all(f == 1.0 for f in factors) else _slowed(price.price, factors)
        prices[device, stage, kind, part] = Price(changed, price.member)
    return replace(program, prices=prices)


def _slowed(price: ComputePrice, factors: list[float]) -> ComputePrice:
    segments = tuple(
        PricedSegment(
            tuple(s * f for s, f in zip(segment.member_seconds, factors, strict=True)),
            segment.collective_seconds,
        )
        for segment in price.segments
    )
    seconds = sum(max(segment.member_seconds) + segment.collective_seconds for segment in segments)
    return ComputePrice(
        segments, seconds, tuple(b * f for b, f in zip(price.busy_seconds, factors, strict=True))
    )


def paced_graph(graph: CostGraph, pace: Pace) -> CostGraph:
    """The cluster as it was measured: devices of their own speed, links of their own bandwidth. What is within 2 % of
    its prediction stays; speeds are rounded to 2 %, so that alike devices are one kind to a planner."""
    changes = []
    for name, ratio in pace.devices.items():
        if abs(ratio - 1.0) > _EXACT:
            changes.append(Change("device", name, 1.0 / _rounded(ratio)))
    changes += [Change("link", name, share) for name, share in pace.bandwidth.items()]
    return changed_graph(graph.cluster, changes)


def _rounded(ratio: float) -> float:
    return max(_EXACT, round(ratio / _EXACT) * _EXACT)


def paced_step_seconds(plan: Plan, pace: Pace) -> float:
    """A step of the plan, between two others, as it would be launched now: its program is made for the devices and
    links that the plan knows, and they have the measured pace."""
    known = ComputeModel(CostGraph(plan.cluster), plan.workload)
    measured = ComputeModel(paced_graph(known.graph, pace), plan.workload)
    names = {device.name: d for d, device in enumerate(known.graph.devices)}
    factors = {names[n]: _rounded(r) for n, r in pace.devices.items() if abs(r - 1.0) > _EXACT}
    program = at_pace(compile_program(lay_out(plan), known), factors)
    return simulate(program, measured, record=False, steps=3).step_seconds


def _modelled(step: Records, compute: Records, time_scale: float) -> Floats:
    """Own compute of a step's compute records, without what an emulated device's host came too late with: that is the
    emulation's, and counted only where a device works alone (a group's action has collectives)."""
    grouped = np.isin(_key(compute), _key(step[step["kind"] == Kind.COLLECTIVE]))
    late = np.where(grouped, 0.0, compute["overrun"] / time_scale)
    return np.asarray(compute["busy"] - late, dtype=np.float64)


def _near(records: Records, step: int) -> Records:
    """Those of a step and of the one before it."""
    return np.asarray(records[(records["step"] == step) | (records["step"] == step - 1)])


def _played(records: Records, graph: CostGraph) -> dict[int, list[tuple[float, float]]]:
    """Message -> when it was sent, and the seconds that it would take as all messages were sent; of every step."""
    sends = records[(records["kind"] == Kind.SEND) & (records["bytes"] > 0) & (records["peer"] >= 0)]
    sends = sends[np.argsort(sends["start"], kind="stable")]
    free_at = [0.0] * graph.cell_count
    began = float(sends["start"][0]) if len(sends) else 0.0
    found: dict[int, list[tuple[float, float]]] = {}
    for source, destination, message, start, size in zip(
        sends["device"].tolist(),
        sends["peer"].tolist(),
        sends["message"].tolist(),
        sends["start"].tolist(),
        sends["bytes"].tolist(),
        strict=True,
    ):
        now = start - began
        arrival = reserve(free_at, graph.path(source, destination), size, now)
        found.setdefault(message, []).append((start, arrival - now))
    return found


def _key(records: Records) -> npt.NDArray[np.int64]:
    """Device and action as one number."""
    return np.asarray((records["device"].astype(np.int64) << 32) | records["action"].astype(np.int64))


def _sorted(keys: npt.NDArray[np.int64], values: Floats) -> tuple[npt.NDArray[np.int64], Floats]:
    """Each key once (a step does an action once), ascending, with its value."""
    unique, first = np.unique(keys, return_index=True)
    return unique, np.asarray(values[first], dtype=np.float64)


def _unique(records: Records, columns: tuple[str, ...]) -> list[tuple[int, ...]]:
    rows = np.unique(np.stack([records[column].astype(np.int64) for column in columns], axis=1), axis=0)
    return [tuple(row) for row in rows.tolist()]
