"""Counts while the run goes on: once a step a worker adds up what its device did, for its node's agent to serve."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

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
    inbound_links,
    model_flops,
    node_of,
    predicted_compute_seconds,
)
from hethub.telemetry.metrics import ACTIVITY_OF_KIND, STEP_BUCKETS_SECONDS
from hethub.timeline.record import Kind

__all__ = ["Meter", "MeterSettings"]

Floats = npt.NDArray[np.float64]
Records = npt.NDArray[np.void]

_AT = {name: number for number, name in enumerate(FIELDS)}
_SECONDS = slice(_AT[f"seconds.{KINDS[0]}"], _AT[f"seconds.{KINDS[-1]}"] + 1)
_FIRST_BUCKET = _AT[f"step_bucket.{STEP_BUCKETS_SECONDS[0]}"]
_WAITED_SHARE = (
    0.1  # of its predicted time that a device must stand still for a message, to know when that came
)
_WAITED_SECONDS = (
    2e-4  # and at least so long: a receive that finds its message there takes this long by itself
)
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
        self._tells = np.array(
            [settings.one_clock or node_of(other) == node_of(own) for other in graph.devices]
        )
        self._sources = [program.transfer(m).source for m in range(len(program.messages))]
        self._flops = model_flops(program.layout, workload, device)
        self._predicted_compute = predicted_compute_seconds(program, device)
        self._clock = Clock(time.monotonic())
        self._activity = Activity()
        self._counts = False  # whether a step of this attempt has been counted
        self._checkpoint_seconds = 0.0

    # -- asked by the executor ---------------------------------------------------------------------------------------

    def send(self, message: int, now: float) -> None:
        """A message leaves."""
        self._moments.send(message, now)

    def received(self, message: int) -> float:
        """When a message that has just come was sent; NaN where its sender's clock is another."""
        return self._moments.sent(message) if self._tells[self._sources[message]] else math.nan

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

    def step(self, step: int, records: Records, memory: tuple[float, float]) -> None:
        """Count a step that has ended, by its records; `memory` is what is in use and was at most, in bytes."""
        numbers, scale = self._numbers, self._clock.time_scale
        since = self._activity.until
        seconds = self._activity.step(
            records, self._moments.ended(step - 1), self._checkpoint_seconds / scale
        )
        end = self._activity.until
        self._moments.end(step, self._device, end)
        self._checkpoint_seconds, self._counts = 0.0, True
        self._add(seconds * scale)
        numbers[_AT["compute_seconds"]] += own_compute_seconds(records, scale) * scale
        numbers[_AT["predicted_compute_seconds"]] += self._predicted_compute * scale
        numbers[_AT["flops"]] += self._flops
        self._count_links(records)
        numbers[_AT["memory_used_bytes"]], numbers[_AT["memory_peak_bytes"]] = memory
        numbers[_AT["heartbeat_unix_seconds"]] = self._unix(end)
        numbers[_AT["steps"]] += 1
        took = (end - since) * scale
        numbers[_AT["step_seconds"]] += took
        numbers[_FIRST_BUCKET + sum(took > bound for bound in STEP_BUCKETS_SECONDS)] += 1
        self._file.write(numbers)  # type: ignore[arg-type]

    def close(self) -> None:
        """Let go of the counters, which stay."""
        self._file.close()

    # -- ---------------------------------------------------------------------------------------------------------------

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
        """Bytes of all that came; and how long it took, of what the device stood waiting for when it came."""
        if not len(self._links):
            return
        received = records[records["kind"] == Kind.RECEIVE]
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
