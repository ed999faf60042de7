"""Counts while the run goes on: between steps a worker adds up what its device did, for its node's agent to serve."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from hethub.cost.graph import CostGraph
from hethub.launch.clock import Clock
from hethub.launch.moments import Moments
from hethub.program.actions import Program
from hethub.simulate.energy import joules
from hethub.specs.workload import Workload
from hethub.telemetry.activity import KINDS, Activity, own_compute_seconds
from hethub.telemetry.counters import FIELDS, LINK_FIELDS, CountersFile
from hethub.telemetry.describe import (
    counters_file,
    describe,
    inbound_links,
    model_flops,
    node_of,
    predicted_compute_seconds,
    write_nodes,
)
from hethub.telemetry.folder import MOMENTS
from hethub.telemetry.metrics import ACTIVITY_OF_KIND, STEP_BUCKETS_SECONDS
from hethub.timeline.record import Kind

__all__ = ["Meter", "MeterSettings", "ready_to_count"]

Floats = npt.NDArray[np.float64]
Records = npt.NDArray[np.void]

_AT = {name: number for number, name in enumerate(FIELDS)}
_SECONDS = slice(_AT[f"seconds.{KINDS[0]}"], _AT[f"seconds.{KINDS[-1]}"] + 1)
_FIRST_BUCKET = _AT[f"step_bucket.{STEP_BUCKETS_SECONDS[0]}"]
_COUNT_EVERY_SECONDS = 1.0  # short steps are counted several at once: that takes no longer than one
# To know when a message came, a device must have stood still for it so long, of its predicted time and at least: a
# receive that finds its message there takes a moment by itself.
_WAITED_SHARE, _WAITED_SECONDS = 0.1, 2e-4
_ON = {activity: np.array([ACTIVITY_OF_KIND[kind] == activity for kind in KINDS]) for activity in (
    "busy", "recompute", "exposed_communication", "evaluation"
)}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class MeterSettings:
    """`folder` is the run's telemetry folder, `moments_file` where senders say when; with `one_clock` the clocks of all
    devices are one machine's, else only those of a node are taken to be."""

    folder: Path
    moments_file: Path
    one_clock: bool


def ready_to_count(
    folder: Path,
    program: Program,
    graph: CostGraph,
    workload: Workload,
    *,
    run: str,
    time_scale: float,
    peak_bytes: Mapping[int, int],
    predicted_seconds: Mapping[int, float] = MappingProxyType({}),
    one_clock: bool,
) -> MeterSettings:
    """Make a run's telemetry folder ready for the workers of a plan.

    `peak_bytes` is the predicted peak by device, `predicted_seconds` the modelled seconds from a message's sending to
    its arrival; those that are not given are taken to cross an idle path.
    """
    nodes = describe(program, graph, workload, run=run, time_scale=time_scale, peak_bytes=peak_bytes)
    write_nodes(folder, nodes)
    moments = folder / MOMENTS
    transfers = [program.transfer(message) for message in range(len(program.messages))]
    seconds = [
        predicted_seconds[m]
        if m in predicted_seconds
        else graph.way(t.source, t.destination, t.members).seconds(t.bytes)
        for m, t in enumerate(transfers)
    ]
    Moments.create(moments, np.array(seconds), len(graph.devices))
    return MeterSettings(folder=folder, moments_file=moments, one_clock=one_clock)


class Meter:
    """One device's counters. Times given are modelled; what it writes is of the wall clock.

    Raises OSError or ValueError where the counters cannot be opened.
    """

    def __init__(
        self, settings: MeterSettings, program: Program, graph: CostGraph, workload: Workload, device: int
    ) -> None:
        own = graph.devices[device]
        self._device, self._type = device, own.type
        self._file = CountersFile(counters_file(settings.folder, own), write=True)
        self._moments = Moments(settings.moments_file, len(program.messages), len(graph.devices))
        self._numbers: Floats = np.array(self._file.read())
        links, of_source, _ = inbound_links(graph, program, device)
        # By source, which is the peer of a receive.
        self._link_of = np.zeros(len(graph.devices), dtype=np.int64)
        for source, place in of_source.items():
            self._link_of[source] = place
        self._links = self._numbers[len(FIELDS) :].reshape(len(links), len(LINK_FIELDS))
        self._links[:] = 0.0  # another plan may have other links
        self._untold = frozenset(  # messages whose senders go by another clock
            action.message
            for action in program.devices[device]
            if action.kind == Kind.RECEIVE and not settings.one_clock
            if any(
                node_of(graph.devices[d]) != node_of(own) for d in program.transfer(action.message).senders
            )
        )
        self._flops = model_flops(program.layout, workload, device)
        self._predicted_compute = predicted_compute_seconds(program, device)
        self._clock = Clock(time.monotonic())
        self._activity = Activity()
        self._counts = False  # whether a step of this attempt has been counted
        self._checkpoint_seconds = 0.0
        self._ends_before: dict[
            int, float
        ] = {}  # by step that has not been counted: when the one before ended
        self._last_end = 0.0
        self._counted_at = 0.0

    # -- asked by the executor ---------------------------------------------------------------------------------------

    def send(self, message: int, now: float) -> None:
        """A message leaves."""
        self._moments.send(message, now)

    def received(self, message: int) -> float:
        """When a message that has just come was sent; NaN where its sender's clock is another."""
        return math.nan if message in self._untold else self._moments.sent(message)

    # -- asked by the worker -----------------------------------------------------------------------------------------

    def start(self, clock: Clock) -> None:
        """The clock (re)starts: what passed since the last counted moment was no training."""
        self._clock = clock
        heartbeat, now = self._numbers[_AT["heartbeat_unix_seconds"]], self._unix(self._activity.until)
        if heartbeat > 0:
            kind = "evaluation" if self._counts else "stalled"
            lost = np.zeros(len(KINDS))
            lost[KINDS.index(kind)] = max(0.0, now - heartbeat)
            self._add(lost)
        self._numbers[_AT["heartbeat_unix_seconds"]] = now
        self._file.write(self._numbers)  # type: ignore[arg-type]

    def stood_for_checkpoint(self, seconds: float) -> None:
        """The device stood still so many wall seconds after its last step."""
        self._checkpoint_seconds += seconds

    def step(self, step: int, end: float) -> bool:
        """A step has ended here; returns whether it is time to `count`."""
        self._ends_before[step] = self._moments.ended(step - 1)
        self._moments.end(step, self._device, end)
        took = (end - self._last_end) * self._clock.time_scale
        self._last_end = end
        self._numbers[_AT["steps"]] += 1
        self._numbers[_AT["step_seconds"]] += took
        self._numbers[_FIRST_BUCKET + bisect_left(STEP_BUCKETS_SECONDS, took)] += 1
        return time.monotonic() - self._counted_at >= _COUNT_EVERY_SECONDS

    def count(self, records: Records, memory: tuple[float, float]) -> None:
        """Count the steps that have ended since the last time, by their records; `memory` is what is in use and was at
        most, in bytes."""
        if not self._ends_before:
            return
        numbers, scale = self._numbers, self._clock.time_scale
        seconds = self._activity.add(records, self._ends_before, self._checkpoint_seconds / scale)
        steps, self._ends_before = len(self._ends_before), {}
        self._checkpoint_seconds, self._counts, self._counted_at = 0.0, True, time.monotonic()
        self._add(seconds * scale)
        numbers[_AT["compute_seconds"]] += own_compute_seconds(seconds) * scale
        numbers[_AT["predicted_compute_seconds"]] += steps * self._predicted_compute * scale
        numbers[_AT["flops"]] += steps * self._flops
        self._count_links(records)
        numbers[_AT["memory_used_bytes"]], numbers[_AT["memory_peak_bytes"]] = memory
        numbers[_AT["heartbeat_unix_seconds"]] = self._unix(self._activity.until)
        self._file.write(numbers)  # type: ignore[arg-type]

    def close(self) -> None:
        """Let go of the counters, which stay."""
        self._file.close()

    # -- adding up ---------------------------------------------------------------------------------------------------

    def _unix(self, moment: float) -> float:
        """Unix time of a modelled moment."""
        wall = self._clock.epoch_seconds + moment * self._clock.time_scale
        return time.time() - (time.monotonic() - wall)

    def _add(self, wall_seconds: Floats) -> None:
        """Add seconds by kind, and what energy they are estimated to take."""
        self._numbers[_SECONDS] += wall_seconds
        modelled = wall_seconds / self._clock.time_scale
        computing = float(modelled[_ON["busy"] | _ON["recompute"] | _ON["evaluation"]].sum())
        exposed = float(modelled[_ON["exposed_communication"]].sum())
        spent = joules(self._type, float(modelled.sum()), computing, exposed)
        self._numbers[_AT["energy_joules"]] += math.nan if spent is None else spent

    def _count_links(self, records: Records) -> None:
        """Bytes of all messages that came; and how long it took, of what the device stood waiting for when it came."""
        if not len(self._links):
            return
        received = records[(records["kind"] == Kind.RECEIVE) & (records["peer"] >= 0)]
        place = self._link_of[received["peer"]]
        predicted = self._moments.predicted_seconds[received["message"]]
        least = np.maximum(_WAITED_SHARE * predicted, _WAITED_SECONDS / self._clock.time_scale)
        # NaN, where it is not known when the message was sent, is not less.
        seen = (received["end"] - received["start"] >= least) & (received["sent"] < received["end"])
        taken = np.where(seen, received["end"] - received["sent"], 0.0)
        columns = (
            received["bytes"],
            taken * self._clock.time_scale,
            predicted * seen * self._clock.time_scale,
        )
        for number, column in enumerate(columns):
            self._links[:, number] += np.bincount(place, weights=column, minlength=len(self._links))
