"""The cluster file: node groups, device types, links, devices to leave out, a default workload."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from hethub import catalog
from hethub.errors import InputError
from hethub.specs.base import Name, Problems, Spec, validate_document
from hethub.specs.constraints import (
    Constraints,
    ConstraintsSpec,
    Objective,
    ObjectiveSpec,
    resolve_constraints,
    resolve_objective,
)
from hethub.specs.device_types import DeviceTypeSpec, resolve_device_type, write_device_type
from hethub.specs.devices import MAX_DEVICES, format_devices, parse_devices
from hethub.specs.document import Document, Key, load_document
from hethub.specs.nearest import unknown_name
from hethub.specs.quantities import BANDWIDTHS, one_of, seconds_from_us, us_from_seconds, write_bandwidth
from hethub.specs.resolved import Cluster, Device, DeviceType, GroupLink, Link, NodeGroup
from hethub.specs.workload import Workload, WorkloadSpec, resolve_workload

__all__ = [
    "Cluster",
    "ClusterFile",
    "ClusterSpec",
    "Device",
    "DeviceType",
    "GroupLink",
    "Link",
    "NodeGroup",
    "Planning",
    "cluster_to_spec",
    "lacking_precision",
    "load_cluster",
    "load_cluster_file",
    "load_planning",
    "load_problem",
    "require_precision",
    "resolve_cluster",
]

Transport = Literal["native", "device-direct", "host-staged", "shared-memory", "tcp"]

_TRANSPORT = (
    "How bytes move: native (the vendor's library), device-direct, host-staged (through host memory, in "
    "chunks), shared-memory or tcp."
)


class _Bandwidth(Spec):
    """A bandwidth in one of three units, and a latency."""

    bandwidth_gbit_s: float | None = Field(None, gt=0, description="Bandwidth one way, 10^9 bits/s.")
    bandwidth_gb_s: float | None = Field(None, gt=0, description="Bandwidth one way, 10^9 bytes/s.")
    bandwidth_mb_s: float | None = Field(None, gt=0, description="Bandwidth one way, 10^6 bytes/s.")
    latency_us: float = Field(ge=0, description="Time of an empty message, microseconds.")

    @model_validator(mode="after")
    def _one_bandwidth(self) -> _Bandwidth:
        if one_of(self, "bandwidth", BANDWIDTHS) is None:
            raise ValueError("has no bandwidth. Give bandwidth_gbit_s, bandwidth_gb_s or bandwidth_mb_s")
        return self

    def link(self, name: str | None, transport: str) -> Link:
        """As a resolved link, named by its bandwidth when it has no name."""
        given = one_of(self, "bandwidth", BANDWIDTHS)
        assert given is not None  # the validator above
        bandwidth = float(given[0] * given[1])
        return Link(
            # :g writes 1e+06, and a plus has no place in a name.
            name=name or f"{bandwidth / 1e9:g}-gb-s".replace("+", ""),
            bandwidth_bytes_per_second=bandwidth,
            latency_seconds=seconds_from_us(self.latency_us),
            transport=transport,
        )


class LinkSpec(_Bandwidth):
    """A link inside or between nodes, written out."""

    name: Name | None = Field(None, description="What reports call it.")
    transport: Transport = Field("native", description=_TRANSPORT)


LinkUse = Annotated[
    Annotated[str, Tag("text")] | Annotated[LinkSpec, Tag("mapping")],
    Discriminator(lambda value: "mapping" if isinstance(value, dict | LinkSpec) else "text"),
]


class NodeGroupSpec(Spec):
    """Alike nodes."""

    name: Name = Field(description="Name of the group; devices are called group/node/device.")
    device_type: str = Field(description="A name of device_types, or of a catalog device.")
    nodes: int = Field(ge=1, le=100_000, description="Nodes in the group.")
    devices_per_node: int = Field(ge=1, le=4096, description="Devices in each node.")
    intra_link: LinkUse = Field(
        description="What one device gets inside its node: a link class, or its figures."
    )
    inter_link: LinkUse = Field(description="What one node gets outside: a link class, or its figures.")
    zone: Name = Field("default", description="Groups of one zone reach each other over their inter_link.")


class GroupLinkSpec(_Bandwidth):
    """A link between two groups or zones; the bandwidth is what one node gets."""

    between: list[Name] = Field(min_length=2, max_length=2, description="Two names of groups or zones.")
    name: Name | None = Field(None, description="What reports call it.")
    total_bandwidth_gbit_s: float | None = Field(None, gt=0, description="What all nodes share, 10^9 bits/s.")
    total_bandwidth_gb_s: float | None = Field(None, gt=0, description="What all nodes share, 10^9 bytes/s.")
    total_bandwidth_mb_s: float | None = Field(None, gt=0, description="What all nodes share, 10^6 bytes/s.")
    usd_per_gb: float | None = Field(None, ge=0, description="Price of 10^9 bytes, either way, US dollars.")
    transport: Transport = Field("host-staged", description=_TRANSPORT)

    @model_validator(mode="after")
    def _one_total(self) -> GroupLinkSpec:
        one_of(self, "total_bandwidth", BANDWIDTHS)
        return self


class EmulatedSpec(Spec):
    """Every device type here is emulated on CPU."""

    time_scale: float | Literal["auto"] = Field(
        "auto",
        description="Wall seconds per modelled second, or auto: the smallest that this machine can keep.",
    )

    @model_validator(mode="after")
    def _positive(self) -> EmulatedSpec:
        if self.time_scale != "auto" and self.time_scale <= 0:
            raise ValueError(f"time_scale, {self.time_scale}, is not above 0. Give more, or auto")
        return self


class ClusterSpec(Spec):
    """The cluster file as written."""

    name: Name = Field(description="Name of the cluster.")
    device_types: dict[Name, DeviceTypeSpec] = Field(
        {}, description="Device types that the catalog lacks, or whose figures differ here."
    )
    node_groups: list[NodeGroupSpec] = Field(min_length=1, description="Groups of alike nodes.")
    links: list[GroupLinkSpec] = Field([], description="Links between groups or zones.")
    exclude: list[str] = Field([], description="Devices to leave out: b/3/5, or ranges such as b/0-3/0-7.")
    workload: WorkloadSpec | None = Field(None, description="What to train when no job says otherwise.")
    constraints: ConstraintsSpec | None = Field(None, description="What the planner must keep to.")
    objective: ObjectiveSpec | None = Field(
        None, description="What the plan shall be best at, and its limits."
    )
    emulated: EmulatedSpec | None = Field(None, description="Present when the devices are emulated on CPU.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterFile:
    """All that a cluster file says; `workload` is None where it names none."""

    cluster: Cluster
    workload: Workload | None
    constraints: Constraints
    objective: Objective


@dataclass(frozen=True, slots=True, kw_only=True)
class Planning:
    """All that a planner is told by a cluster file."""

    cluster: Cluster
    workload: Workload
    constraints: Constraints
    objective: Objective


def load_cluster(path: Path) -> tuple[Cluster, Workload | None]:
    """Read a cluster file and its default workload. Raises InputError with one line per problem."""
    *_, cluster, workload = _read(path)
    return cluster, workload


def load_cluster_file(path: Path) -> ClusterFile:
    """Read a cluster file with its constraints and objective. Raises InputError with one line per problem."""
    spec, document, cluster, workload = _read(path)
    return ClusterFile(
        cluster=cluster,
        workload=workload,
        constraints=resolve_constraints(spec.constraints, cluster, document),
        objective=resolve_objective(spec.objective, cluster, document),
    )


def load_problem(path: Path) -> tuple[Cluster, Workload]:
    """Read a cluster file that must name its workload. Raises InputError, also where it names none."""
    cluster, workload = load_cluster(path)
    return cluster, _required(workload, path)


def load_planning(path: Path) -> Planning:
    """Read a cluster file that must name its workload, with its constraints and objective. Raises InputError."""
    told = load_cluster_file(path)
    return Planning(
        cluster=told.cluster,
        workload=_required(told.workload, path),
        constraints=told.constraints,
        objective=told.objective,
    )


def _read(path: Path) -> tuple[ClusterSpec, Document, Cluster, Workload | None]:
    document = load_document(path)
    spec = validate_document(document, ClusterSpec)
    cluster = resolve_cluster(spec, document)
    if spec.workload is None:
        return spec, document, cluster, None
    workload = resolve_workload(spec.workload, document, ("workload",))
    require_precision(cluster, workload.precision, document)
    return spec, document, cluster, workload


def _required(workload: Workload | None, path: Path) -> Workload:
    if workload is None:
        raise InputError(f"{path}: names no workload. Add workload: {{model: ..., sequence_length: ...}}.")
    return workload


def resolve_cluster(spec: ClusterSpec, document: Document, prefix: Sequence[Key] = ()) -> Cluster:
    """The cluster with every figure known. `prefix` leads to the cluster in `document`.

    Raises InputError with one line per problem.
    """
    return _Resolver(spec, Problems(document, prefix)).cluster()


def require_precision(cluster: Cluster, precision: str, document: Document) -> None:
    """Raise InputError, located in the cluster's file, when a device type cannot compute in `precision`."""
    problems = Problems(document)
    written = document.value.get("device_types") or {}
    for name, text in lacking_precision(cluster, precision).items():
        group = next(i for i, group in enumerate(cluster.node_groups) if group.device_type == name)
        keys = ("device_types", name) if name in written else ("node_groups", group, "device_type")
        problems.add(keys, text)
    problems.raise_any()


def lacking_precision(cluster: Cluster, precision: str) -> dict[str, str]:
    """What is wrong, and what to do, by name of each device type that cannot compute in `precision`."""
    return {
        name: _lacking(device_type, precision)
        for name, device_type in cluster.device_types.items()
        if device_type.dtype_for(precision) not in device_type.peak_flops_per_second
    }


def _lacking(device_type: DeviceType, precision: str) -> str:
    name, dtype = device_type.name, device_type.dtype_for(precision)
    known = None if device_type.catalog is None else catalog.devices().get(device_type.catalog.lower())
    if known is not None and dtype in known.lacks:
        return (
            f"{name} has no {dtype}, and the workload's precision is {precision}. Add substitute_dtype: "
            f"{{{dtype}: fp16}} to its entry in device_types, or change the precision."
        )
    return (
        f"no {dtype} peak is known for {name}, and the workload's precision is {precision}. Give "
        f"peak_tflops: {{{dtype}: ...}} or substitute_dtype in its entry in device_types, or change the "
        "precision."
    )


class _Resolver:
    """Turns a spec into a cluster, collecting all problems on the way."""

    def __init__(self, spec: ClusterSpec, problems: Problems) -> None:
        self.spec = spec
        self.problems = problems
        # Own types first, then the catalog's, so that a file may redefine a catalog name.
        self.types: dict[str, DeviceType | None] = {}

    def cluster(self) -> Cluster:
        groups = tuple(self._group(number, group) for number, group in enumerate(self.spec.node_groups))
        self._check_unused_types()
        self._check_group_names()
        links = tuple(self._link(number, link) for number, link in enumerate(self.spec.links))
        self._check_connected()
        exclude = self._exclude()
        self.problems.raise_any()
        emulated = self.spec.emulated
        return Cluster(
            name=self.spec.name,
            device_types={name: found for name, found in self.types.items() if found is not None},
            node_groups=groups,
            links=links,
            exclude=exclude,
            emulated_time_scale=None if emulated is None else emulated.time_scale,
        )

    def _group(self, number: int, group: NodeGroupSpec) -> NodeGroup:
        keys = ("node_groups", number)
        return NodeGroup(
            name=group.name,
            device_type=self._type(group.device_type, (*keys, "device_type")),
            nodes=group.nodes,
            devices_per_node=group.devices_per_node,
            intra_link=self._link_use(group.intra_link, (*keys, "intra_link")),
            inter_link=self._link_use(group.inter_link, (*keys, "inter_link")),
            zone=group.zone,
        )

    def _type(self, name: str, keys: Sequence[Key]) -> str:
        """Resolve the device type that a group names, once, and return its own name."""
        own = self.spec.device_types.get(name)
        if own is None:
            try:
                name = catalog.device(name).name
                own = self.spec.device_types.get(name)
            except catalog.UnknownName:
                known = [*self.spec.device_types, *(one.name for one in catalog.devices().values())]
                what = f'"{name}" is neither in device_types nor in the catalog'
                self.problems.add(keys, unknown_name(what, name, known))
                return name
        if name not in self.types:
            place = keys if own is None else ("device_types", name)
            self.types[name] = self._resolve_type(name, own, place)
        return name

    def _resolve_type(self, name: str, spec: DeviceTypeSpec | None, keys: Sequence[Key]) -> DeviceType | None:
        return resolve_device_type(name, spec, self.problems, keys, emulated=self.spec.emulated is not None)

    def _check_unused_types(self) -> None:
        """A type that no group uses may lack figures, but not name what does not exist."""
        for name, spec in self.spec.device_types.items():
            if name not in self.types and spec.catalog is not None and not spec.complete():
                try:
                    catalog.device(spec.catalog)
                except catalog.UnknownName as error:
                    self.problems.add(("device_types", name, "catalog"), str(error))

    def _check_group_names(self) -> None:
        first: dict[str, int] = {}
        devices = 0
        for number, group in enumerate(self.spec.node_groups):
            if group.name in first:
                text = f'node_groups[{first[group.name]}] is called "{group.name}" too. Rename one.'
                self.problems.add(("node_groups", number, "name"), text)
            first.setdefault(group.name, number)
            devices += group.nodes * group.devices_per_node
        if devices > MAX_DEVICES:
            self.problems.add(
                ("node_groups",), f"has {devices} devices, more than {MAX_DEVICES}. Give fewer."
            )

    def _link_use(self, use: str | LinkSpec, keys: Sequence[Key]) -> Link:
        if isinstance(use, LinkSpec):
            return use.link(use.name, use.transport)
        try:
            known = catalog.link(use)
        except catalog.UnknownName as error:
            self.problems.add(keys, f"{error} Or give bandwidth_gbit_s and latency_us.")
            return Link(name=use, bandwidth_bytes_per_second=1.0, latency_seconds=0.0, transport="native")
        return Link(
            name=known.name,
            bandwidth_bytes_per_second=known.bandwidth_gb_s * 1e9,
            latency_seconds=seconds_from_us(known.latency_us),
            transport=known.transport,
        )

    def _link(self, number: int, link: GroupLinkSpec) -> GroupLink:
        self._check_ends(number, link)
        total = one_of(link, "total_bandwidth", BANDWIDTHS)
        return GroupLink(
            between=(link.between[0], link.between[1]),
            link=link.link(link.name, link.transport),
            total_bandwidth_bytes_per_second=None if total is None else float(total[0] * total[1]),
            usd_per_gb=link.usd_per_gb,
        )

    def _check_ends(self, number: int, link: GroupLinkSpec) -> None:
        groups = {group.name for group in self.spec.node_groups}
        zones: dict[str, set[str]] = {}
        for group in self.spec.node_groups:
            zones.setdefault(group.zone, set()).add(group.name)
        for end, name in enumerate(link.between):
            keys = ("links", number, "between", end)
            # A zone that is one group may share its name: both mean the same.
            if name in groups and zones.get(name, {name}) != {name}:
                self.problems.add(keys, f'"{name}" is both a group and a zone. Rename one of them.')
            elif name not in groups and name not in zones:
                text = unknown_name(
                    f'there is no group or zone "{name}"', name, sorted(groups | zones.keys())
                )
                self.problems.add(keys, text)
        if link.between[0] == link.between[1]:
            self.problems.add(("links", number, "between"), "joins a name with itself. Name two.")
        for earlier in range(number):
            if sorted(self.spec.links[earlier].between) == sorted(link.between):
                self.problems.add(
                    ("links", number, "between"), f"links[{earlier}] joins these two already. Keep one."
                )

    def _check_connected(self) -> None:
        """Every group must be reached from the first one, through its zone or a chain of links."""
        if self.problems:
            return
        groups = self.spec.node_groups
        names = {group.name for group in groups}
        edges = [(("group", group.name), ("zone", group.zone)) for group in groups]
        for link in self.spec.links:
            one, other = (("group" if name in names else "zone", name) for name in link.between)
            edges.append((one, other))
        reached = _reached(("group", groups[0].name), edges)
        for number, group in enumerate(groups):
            if ("group", group.name) not in reached:
                self.problems.add(
                    ("node_groups", number, "name"),
                    f'no chain of links joins "{group.name}" (zone {group.zone}) and "{groups[0].name}" '
                    f"(zone {groups[0].zone}). Put them in one zone, or add an entry to links.",
                )

    def _exclude(self) -> frozenset[str]:
        if self.problems:
            return frozenset()
        groups = {group.name: group for group in self.spec.node_groups}
        found: set[str] = set()
        for number, text in enumerate(self.spec.exclude):
            keys = ("exclude", number)
            try:
                names = parse_devices(text)
            except ValueError as error:
                self.problems.add(keys, f"{error}. Change it.")
                continue
            wrong = next((why for why in (_absent(name, groups) for name in names) if why), None)
            if wrong is not None:
                self.problems.add(keys, wrong)
            found.update(names)
        if len(found) >= sum(group.nodes * group.devices_per_node for group in self.spec.node_groups):
            self.problems.add(("exclude",), "leaves no device. Exclude fewer.")
        return frozenset(found)


def _absent(name: str, groups: Mapping[str, NodeGroupSpec]) -> str | None:
    """Why the cluster has no device of this name, or None when it has."""
    group_name, node, index = name.split("/")
    group = groups.get(group_name)
    if group is None:
        return unknown_name(f'there is no group "{group_name}"', group_name, groups)
    if int(node) >= group.nodes:
        return f"there is no {name}: {group_name} has nodes 0 to {group.nodes - 1}. Change it."
    if int(index) >= group.devices_per_node:
        return f"there is no {name}: its node has devices 0 to {group.devices_per_node - 1}. Change it."
    return None


def _reached(
    start: tuple[str, str], edges: Iterable[tuple[tuple[str, str], tuple[str, str]]]
) -> set[tuple[str, str]]:
    """All vertices that a chain of edges joins with `start`."""
    near: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for one, other in edges:
        near.setdefault(one, []).append(other)
        near.setdefault(other, []).append(one)
    reached, fresh = {start}, [start]
    while fresh:
        fresh = [other for one in fresh for other in near.get(one, ()) if other not in reached]
        reached.update(fresh)
    return reached


def cluster_to_spec(cluster: Cluster) -> dict[str, Any]:
    """The cluster as a file's content with every figure: it loads back equal without the catalog."""
    content: dict[str, Any] = {
        "name": cluster.name,
        "device_types": {name: write_device_type(found) for name, found in cluster.device_types.items()},
        "node_groups": [_write_group(group) for group in cluster.node_groups],
    }
    if cluster.links:
        content["links"] = [_write_group_link(link) for link in cluster.links]
    if cluster.exclude:
        order = {group.name: number for number, group in enumerate(cluster.node_groups)}
        content["exclude"] = format_devices(
            sorted(cluster.exclude, key=lambda name: _place(name, order))
        ).split(", ")
    if cluster.emulated_time_scale is not None:
        content["emulated"] = {"time_scale": cluster.emulated_time_scale}
    return content


def _place(name: str, order: Mapping[str, int]) -> tuple[int, int, int]:
    group, node, index = name.split("/")
    return order[group], int(node), int(index)


def _write_link(link: Link) -> dict[str, Any]:
    return {
        "name": link.name,
        **write_bandwidth("bandwidth", link.bandwidth_bytes_per_second),
        "latency_us": us_from_seconds(link.latency_seconds),
        "transport": link.transport,
    }


def _write_group(group: NodeGroup) -> dict[str, Any]:
    return {
        "name": group.name,
        "device_type": group.device_type,
        "nodes": group.nodes,
        "devices_per_node": group.devices_per_node,
        "intra_link": _write_link(group.intra_link),
        "inter_link": _write_link(group.inter_link),
        "zone": group.zone,
    }


def _write_group_link(link: GroupLink) -> dict[str, Any]:
    total = link.total_bandwidth_bytes_per_second
    return {
        "between": list(link.between),
        **_write_link(link.link),
        **({} if total is None else write_bandwidth("total_bandwidth", total)),
        **({} if link.usd_per_gb is None else {"usd_per_gb": link.usd_per_gb}),
    }
