"""What the plan says of every device and link that a node's agent serves: labels, constants, and the price of a step.

The driver writes one small file a node; the worker finds the same links in the same order by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hethub.cost.graph import CostGraph
from hethub.cost.memory import usable_bytes
from hethub.cost.shapes import BYTES, Work, layer_kind, layer_segments
from hethub.files import write_json
from hethub.program.actions import Program
from hethub.specs.cluster import Device
from hethub.specs.layout import Layout, Share
from hethub.specs.workload import Model, Workload
from hethub.telemetry.counters import create_counters
from hethub.telemetry.folder import COUNTERS, NODES, node_file
from hethub.timeline.record import COMPUTE_KINDS, Kind

__all__ = [
    "LinkLabels",
    "counters_file",
    "describe",
    "inbound_links",
    "model_flops",
    "node_of",
    "predicted_compute_seconds",
    "used_nodes",
    "write_nodes",
]


@dataclass(frozen=True, slots=True)
class LinkLabels:
    """A kind of link as its receiver's node sees it; fields as the labels of `Scope.LINK`."""

    link: str
    transport: str
    src_type: str
    dst_type: str


def _link(graph: CostGraph, source: int, destination: int) -> LinkLabels:
    one, other = graph.devices[source], graph.devices[destination]
    if (one.group, one.node) == (other.group, other.node):
        where = f"intra {one.group}"
    elif one.group == other.group:
        where = f"inter {one.group}"
    else:
        where = f"{one.group}-{other.group}"
    return LinkLabels(where, graph.path(source, destination).transport, one.type.name, other.type.name)


def inbound_links(
    graph: CostGraph, program: Program, device: int
) -> tuple[tuple[LinkLabels, ...], Mapping[int, int], tuple[float, ...]]:
    """The kinds of link by which a device's messages come (collectives take no one link), each source's place among
    them, and the bandwidth of a path over each in bytes a modelled second."""
    places: dict[LinkLabels, int] = {}
    bandwidths: list[float] = []
    of_source: dict[int, int] = {}
    for action in program.devices[device]:
        if action.kind == Kind.RECEIVE and not program.transfer(action.message).members:
            source = program.transfer(action.message).source
            if source not in of_source:
                labels = _link(graph, source, device)
                if labels not in places:
                    places[labels] = len(places)
                    bandwidths.append(graph.path(source, device).bandwidth_bytes_per_second)
                of_source[source] = places[labels]
    return tuple(places), of_source, tuple(bandwidths)


@cache
def _layer_flops(model: Model, layer: int, share: Share, rows: int, seq: int) -> float:
    work = Work(Kind.FORWARD, training=False)
    segments = layer_segments(
        model, layer_kind(model, layer), share, rows, seq=seq, size=BYTES["fp32"], work=work
    )
    return sum(operation.flops for segment in segments for operation in segment.operations)


def model_flops(layout: Layout, workload: Workload, device: int) -> float:
    """Model FLOPs of a device's part of a step: forward and backward, recomputation not counted.

    Over all devices they are `model_flops_per_token` of every token.
    """
    total = 0.0
    for pipeline in layout.pipelines:
        for stage in pipeline.stages:
            for replica in stage.replicas:
                rows = replica.rows[1] - replica.rows[0]
                for rank in replica.ranks:
                    if rank.device == device:
                        total += pipeline.micro_batches * sum(
                            _layer_flops(layout.model, layer, rank.share, rows, workload.sequence_length)
                            for layer in range(*stage.layers)
                        )
    return 3 * total


def predicted_compute_seconds(program: Program, device: int) -> float:
    """Modelled seconds of a device's own compute in one step."""
    return sum(
        program.price(device, action).busy_seconds
        for action in program.devices[device]
        if action.kind in COMPUTE_KINDS
    )


def node_of(device: Device) -> str:
    """The name of a device's node, as labels have it."""
    return f"{device.group}/{device.node}"


def counters_file(folder: Path, device: Device) -> Path:
    """A device's counters in a run's telemetry folder."""
    return folder / COUNTERS / f"{device.name.replace('/', '-')}.bin"


def describe(
    program: Program,
    graph: CostGraph,
    workload: Workload,
    *,
    run: str,
    time_scale: float,
    peak_bytes: Mapping[int, int],
) -> dict[str, dict[str, Any]]:
    """What each node's agent is told, by the node's name; `peak_bytes` is the predicted peak by device."""
    emulated = graph.cluster.emulated_time_scale is not None
    places = _places(program.layout)
    nodes: dict[str, dict[str, Any]] = {}
    for rank, number in enumerate(program.layout.used):
        device = graph.devices[number]
        pipeline, stages = places[number]
        links, _, bandwidths = inbound_links(graph, program, number)
        peak = device.type.peak_flops_per_second.get(device.type.dtype_for(workload.precision))
        constants = {
            "hethub_device_memory_limit_bytes": float(usable_bytes(device.type)),
            "hethub_device_predicted_memory_bytes": float(peak_bytes[number]),
        }
        if peak is not None:
            constants["hethub_device_peak_flops_per_second"] = peak / time_scale
        node = nodes.setdefault(node_of(device), {"run": run, "node": node_of(device), "devices": []})
        node["devices"].append(
            {
                "labels": {
                    "device": str(device.index),
                    "device_type": device.type.name,
                    "vendor": device.type.vendor,
                    "pipeline": str(pipeline),
                    "stage": ",".join(map(str, stages)),
                },
                "rank": rank,
                "emulated": emulated,
                "file": counters_file(Path(), device).name,
                "constants": constants,
                "links": [
                    {**asdict(link), "capacity_bytes_per_second": bandwidth / time_scale}
                    for link, bandwidth in zip(links, bandwidths, strict=True)
                ],
            }
        )
    return nodes


def _places(layout: Layout) -> dict[int, tuple[int, list[int]]]:
    """Pipeline and stages of every device in use."""
    found: dict[int, tuple[int, list[int]]] = {}
    for pipeline in layout.pipelines:
        for stage in pipeline.stages:
            for device in stage.devices():
                found.setdefault(device, (pipeline.index, []))[1].append(stage.index)
    return found


def write_nodes(folder: Path, nodes: Mapping[str, dict[str, Any]]) -> None:
    """Write a telemetry folder's node files, with empty counters where a device has none yet; nodes that are not among
    them are forgotten."""
    for part in (NODES, COUNTERS):
        (folder / part).mkdir(parents=True, exist_ok=True)
    wanted: set[Path] = set()
    for name, node in nodes.items():
        for device in node["devices"]:
            create_counters(folder / COUNTERS / device["file"], len(device["links"]))
        wanted.add(node_file(folder, name))
        write_json(node_file(folder, name), node)
    for old in (folder / NODES).glob("*.json"):
        if old not in wanted:
            old.unlink()


def used_nodes(devices: Sequence[Device]) -> list[str]:
    """Names of the nodes of some devices, in their order."""
    return list(dict.fromkeys(node_of(device) for device in devices))
