"""The agent of a machine: serves the counters of its devices to Prometheus.

A small process of its own, so that a scrape never waits for training. It ends when its parent does, however that ends.

    python -m hethub.telemetry.agent --folder RUN/telemetry --nodes a/0,b/0 --name NAME --listen 127.0.0.1 --parent PID
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client import start_http_server
from prometheus_client.core import Metric as Family

from hethub import __version__
from hethub.files import write_json
from hethub.telemetry.counters import FIELDS, LINK_FIELDS, CountersFile
from hethub.telemetry.families import Series, registry_of
from hethub.telemetry.folder import COUNTERS, address, agent_file, node_file
from hethub.telemetry.metrics import ACTIVITY_OF_KIND
from hethub.telemetry.sensors import Reading, Sensors

__all__ = ["Agent", "main"]

_PAUSE_SECONDS = 5e-5
_AT = {name: number for number, name in enumerate(FIELDS)}
_COUNTERS = {
    "hethub_device_compute_seconds_total": "compute_seconds",
    "hethub_device_predicted_compute_seconds_total": "predicted_compute_seconds",
    "hethub_device_flops_total": "flops",
    "hethub_device_memory_used_bytes": "memory_used_bytes",
    "hethub_device_memory_peak_bytes": "memory_peak_bytes",
}
_LINK_COUNTERS = tuple(zip(("hethub_link_bytes_total", "hethub_link_transfer_seconds_total",
                            "hethub_link_predicted_transfer_seconds_total"), LINK_FIELDS, strict=True))  # fmt: skip


@dataclass(slots=True)
class _Node:
    """A node's file as it was read last, with its devices' counters mapped."""

    file: Path
    read_at: tuple[int, int] | None = None  # of the file: when it was changed, and its inode
    content: Mapping[str, Any] = field(default_factory=dict)
    counters: list[CountersFile | None] = field(default_factory=list)

    def refresh(self) -> None:
        """Read the file again if it is another one now; nothing to serve where there is none."""
        try:
            status = self.file.stat()
        except OSError:
            self._forget()
            return
        if self.read_at == (status.st_mtime_ns, status.st_ino):
            return
        self._forget()
        with contextlib.suppress(OSError, ValueError):  # it is being replaced: the next scrape has it
            self.content = json.loads(self.file.read_text(encoding="utf-8"))
            folder = self.file.parent.parent / COUNTERS
            self.counters = [_mapped(folder / device["file"]) for device in self.content["devices"]]
            self.read_at = (status.st_mtime_ns, status.st_ino)

    def _forget(self) -> None:
        for counters in self.counters:
            if counters is not None:
                counters.close()
        self.counters, self.content, self.read_at = [], {}, None


def _mapped(file: Path) -> CountersFile | None:
    try:
        return CountersFile(file)
    except (OSError, ValueError):
        return None


class Agent:
    """The series of some nodes of a run, as of the moment that they are asked for."""

    def __init__(self, folder: Path, nodes: Sequence[str], sensors: Sensors | None = None) -> None:
        self._nodes = [_Node(node_file(folder, node)) for node in nodes]
        self._sensors = Sensors() if sensors is None else sensors

    def series(self) -> Series:
        """Everything that a scrape returns now."""
        found = Series()
        found.set("hethub_build_info", 1.0, {"version": __version__, "role": "agent"})
        for node in self._nodes:
            node.refresh()
            if node.content:
                self._add_node(found, node)
        return found

    def families(self) -> Iterable[Family]:
        """The same as families of prometheus-client."""
        return self.series().families()

    def _add_node(self, found: Series, node: _Node) -> None:
        where = {"run": node.content["run"], "node": node.content["node"]}
        served = 0
        for device, counters in zip(node.content["devices"], node.counters, strict=True):
            if counters is None:
                continue
            served += 1
            numbers = counters.read(lambda: time.sleep(_PAUSE_SECONDS))
            labels = {**where, **device["labels"]}
            reading = self._sensors.of(labels["vendor"], int(labels["device"]), emulated=device["emulated"])
            _add_device(found, labels, device, numbers, reading)
            _add_links(found, where, device["links"], numbers[len(FIELDS) :])
        found.set("hethub_node_devices", float(served), where)


def _add_device(
    found: Series,
    labels: Mapping[str, str],
    device: Mapping[str, Any],
    numbers: Sequence[float],
    reading: Reading | None,
) -> None:
    about = {"rank": str(device["rank"]), "emulated": str(device["emulated"]).lower()}
    uuid = "" if reading is None else reading.uuid
    found.set("hethub_device_info", 1.0, {**labels, **about, "uuid": uuid})
    for kind, activity in ACTIVITY_OF_KIND.items():
        found.set(
            "hethub_device_seconds_total",
            numbers[_AT[f"seconds.{kind}"]],
            {**labels, "activity": activity, "kind": kind},
        )
    for name, counter in _COUNTERS.items():
        if not math.isnan(numbers[_AT[counter]]):
            found.set(name, numbers[_AT[counter]], labels)
    for name, value in device["constants"].items():
        found.set(name, value, labels)
    heartbeat = numbers[_AT["heartbeat_unix_seconds"]]
    if heartbeat > 0:  # else nothing has been counted yet
        found.set("hethub_device_heartbeat_timestamp_seconds", heartbeat, labels)
    _add_sensed(found, labels, numbers[_AT["energy_joules"]], reading)


def _add_sensed(found: Series, labels: Mapping[str, str], estimate: float, reading: Reading | None) -> None:
    """What a sensor tells; the estimate only where none tells of energy, so that sums count no device twice."""
    joules, source = estimate, {**labels, "source": "estimate"}
    if reading is not None:
        sensed = {**labels, "source": reading.source}
        if reading.joules is not None:
            joules, source = reading.joules, sensed
        if reading.watts is not None:
            found.set("hethub_device_power_watts", reading.watts, sensed)
        if reading.celsius is not None:
            found.set("hethub_device_temperature_celsius", reading.celsius, sensed)
    if not math.isnan(joules):
        found.set("hethub_device_energy_joules_total", joules, source)


def _add_links(
    found: Series, where: Mapping[str, str], links: Sequence[Mapping[str, Any]], numbers: Sequence[float]
) -> None:
    """Sums over the node's devices."""
    for place, link in enumerate(links):
        labels = {**where, **{name: link[name] for name in ("link", "transport", "src_type", "dst_type")}}
        for number, (name, _) in enumerate(_LINK_COUNTERS):
            found.add(name, numbers[place * len(LINK_FIELDS) + number], labels)
        found.set("hethub_link_capacity_bytes_per_second", link["capacity_bytes_per_second"], labels)


def _until_parent_ends(parent: int, stopped: Callable[[], bool]) -> None:
    """Return when the process `parent`, which started this one, has ended, or a signal asked for the end."""
    try:
        descriptor = os.pidfd_open(parent)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        # Until its number could be reused the parent's place had been taken by another's child already.
        while os.getppid() == parent and not stopped():
            if poll.poll(1000):
                return
    finally:
        os.close(descriptor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until the parent ends or SIGTERM comes. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="hethub.telemetry.agent", description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="telemetry folder of the run")
    parser.add_argument("--nodes", required=True, help="nodes to serve, such as a/0,b/0")
    parser.add_argument(
        "--name", required=True, help="name of the agent, for the file that tells its address"
    )
    parser.add_argument("--listen", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--parent", type=int, required=True, help="process that started this one")
    given = parser.parse_args(arguments)
    ends: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda caught, frame: ends.append(caught))
    agent = Agent(given.folder, given.nodes.split(","))
    try:
        server, _ = start_http_server(0, addr=given.listen, registry=registry_of(agent.families))
    except OSError as error:
        sys.stderr.write(f"{given.listen}: cannot listen there ({error.strerror}). Set telemetry.listen.\n")
        return 4
    file = agent_file(given.folder, given.name)
    told = {"address": address(given.listen, server.server_port), "process": os.getpid()}
    write_json(file, told)
    try:
        _until_parent_ends(given.parent, lambda: bool(ends))
    finally:
        server.shutdown()
        _take_back(file, told)
    return 0


def _take_back(file: Path, told: Mapping[str, object]) -> None:
    """Remove what an agent has told, unless another one of its name has told something else since."""
    with contextlib.suppress(OSError, ValueError):
        if json.loads(file.read_text(encoding="utf-8")) == told:
            file.unlink()


if __name__ == "__main__":
    sys.exit(main())
