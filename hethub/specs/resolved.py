"""A cluster as the rest of the program sees it: frozen values, SI units, every figure known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from hethub.errors import InputError

__all__ = ["Cluster", "Device", "DeviceType", "GroupLink", "Link", "NodeGroup"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceType:
    """A kind of accelerator. Efficiencies are achievable shares of the peaks, in (0, 1]. `host_copy_bytes_per_second`
    is each way between device and host memory."""

    name: str
    catalog: str | None
    vendor: str
    memory_bytes: int
    memory_reserve_bytes: int
    memory_bandwidth_bytes_per_second: float
    peak_flops_per_second: Mapping[str, float] = field(hash=False)
    matmul_efficiency: float
    memory_efficiency: float
    substitute_dtype: Mapping[str, str] = field(hash=False)
    power_watts: float | None
    usd_per_hour: float | None
    idle_power_watts: float | None = None
    communication_power_watts: float | None = None
    host_copy_bytes_per_second: float | None = None

    def dtype_for(self, precision: str) -> str:
        """The dtype in which this device computes a job of `precision`."""
        return self.substitute_dtype.get(precision, precision)

    def flops_per_second(self, precision: str) -> float:
        """Achievable FLOP/s of matrix products. Raises InputError when the peak is not known."""
        dtype = self.dtype_for(precision)
        peak = self.peak_flops_per_second.get(dtype)
        if peak is None:
            raise InputError(
                f"device_types.{self.name}: no peak is known for {dtype}. Give peak_tflops: {{{dtype}: "
                f"...}} or, where the device lacks {dtype}, substitute_dtype: {{{dtype}: ...}}."
            )
        return peak * self.matmul_efficiency


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One way of moving bytes, one direction.

    `transport` is native, device-direct, host-staged, shared-memory or tcp.
    """

    name: str
    bandwidth_bytes_per_second: float
    latency_seconds: float
    transport: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeGroup:
    """Alike nodes. `intra_link`: what a device gets in its node; `inter_link`: what a node gets outside."""

    name: str
    device_type: str
    nodes: int
    devices_per_node: int
    intra_link: Link
    inter_link: Link
    zone: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLink:
    """A link between two groups or zones: `link` is what a node gets, the total what all share. `usd_per_gb` is what
    10^9 bytes cost, either way; None where they are free."""

    between: tuple[str, str]
    link: Link
    total_bandwidth_bytes_per_second: float | None
    usd_per_gb: float | None = None

    @property
    def name(self) -> str:
        """Its two ends, joined by a hyphen."""
        return "-".join(self.between)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device; `name` is group/node/index."""

    name: str
    group: str
    node: int
    index: int
    type: DeviceType


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """All that is known of a cluster. `emulated_time_scale` is None when the devices are real.

    `device_types` holds the types that node groups use, in the order of their first use.
    """

    name: str
    device_types: Mapping[str, DeviceType] = field(hash=False)
    node_groups: tuple[NodeGroup, ...]
    links: tuple[GroupLink, ...] = ()
    exclude: frozenset[str] = frozenset()
    emulated_time_scale: float | Literal["auto"] | None = None

    @cached_property
    def _devices(self) -> tuple[Device, ...]:
        return tuple(
            Device(
                name=name, group=group.name, node=node, index=index, type=self.device_types[group.device_type]
            )
            for group in self.node_groups
            for node in range(group.nodes)
            for index in range(group.devices_per_node)
            if (name := f"{group.name}/{node}/{index}") not in self.exclude
        )

    def devices(self) -> tuple[Device, ...]:
        """Devices that may be used: groups in file order, node-major, excluded ones left out."""
        return self._devices

    def named_links(self) -> dict[str, Link]:
        """Every link under a name that no other has, whatever class it is of: `intra GROUP` inside a group's nodes,
        `inter GROUP` between them, and the two ends of a link between groups or zones, `ONE-OTHER`."""
        found = {f"intra {group.name}": group.intra_link for group in self.node_groups}
        found |= {f"inter {group.name}": group.inter_link for group in self.node_groups}
        return found | {cross.name: cross.link for cross in self.links}

    def counts(self) -> dict[str, int]:
        """Usable devices by type name; a type whose devices are all excluded counts 0."""
        counted = Counter(device.type.name for device in self._devices)
        return {name: counted[name] for name in self.device_types}
