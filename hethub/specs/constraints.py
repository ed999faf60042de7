"""What a user fixes of a plan, and what it shall be best at: the cluster file's `constraints` and `objective`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from pydantic import Field

from hethub.specs.base import Problems, Spec
from hethub.specs.document import Document
from hethub.specs.nearest import unknown_name
from hethub.specs.resolved import Cluster

__all__ = [
    "FASTEST",
    "FREE",
    "Constraints",
    "ConstraintsSpec",
    "Objective",
    "ObjectiveSpec",
    "resolve_constraints",
    "resolve_objective",
]

_GIB = 1 << 30

Goal = Literal["throughput", "usd_per_million_tokens", "joules_per_token"]


class ConstraintsSpec(Spec):
    """The `constraints` key as written."""

    tensor_parallel: dict[str, list[Annotated[int, Field(ge=1)]]] = Field(
        {}, description="Tensor-parallel degrees that a device type may be used with: {A100-40GB: [4, 8]}."
    )
    max_pipeline: int | None = Field(None, ge=1, description="Most stages of a pipeline.")
    same_stage: bool = Field(True, description="Whether unlike devices may share a stage as replicas.")
    use_all: bool = Field(False, description="Whether every device must work.")
    memory_reserve_gib: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {}, description="Memory that stays free on a device type, beside the type's own reserve."
    )


class ObjectiveSpec(Spec):
    """The `objective` key as written."""

    best: Goal = Field("throughput", description="What the plan shall be best at.")
    tokens: float | None = Field(
        None, gt=0, description="Tokens of the whole job, for limits in hours and USD."
    )
    deadline_hours: float | None = Field(None, gt=0, description="The job must end within this time.")
    budget_usd: float | None = Field(None, gt=0, description="The job must not cost more.")
    site_watts: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {},
        description="Power that a zone's devices in use may take together, at full power: {hall-1: 40000}.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """Limits of the plan space; the default is none.

    `tensor_parallel` gives the degrees that a device type may be used with, `max_pipeline` the most stages of a
    pipeline, `same_stage` whether unlike devices may share a stage, `use_all` whether every device must work,
    `memory_reserve_bytes` what stays free on a type's devices beside its own reserve. `places` tells where each
    constraint stands in its file.
    """

    tensor_parallel: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    max_pipeline: int | None = None
    same_stage: bool = True
    use_all: bool = False
    memory_reserve_bytes: Mapping[str, int] = field(default_factory=dict, hash=False)
    places: Mapping[str, str] = field(default_factory=dict, hash=False, compare=False)

    def names(self) -> tuple[str, ...]:
        """Every single constraint, by its key in the file."""
        found = [f"tensor_parallel.{name}" for name in self.tensor_parallel]
        found += ["max_pipeline"] if self.max_pipeline is not None else []
        found += ["same_stage"] if not self.same_stage else []
        found += ["use_all"] if self.use_all else []
        return (*found, *(f"memory_reserve_gib.{name}" for name in self.memory_reserve_bytes))

    def only(self, names: Iterable[str]) -> Constraints:
        """These constraints without the others."""
        kept = set(names)
        return replace(
            self,
            tensor_parallel={k: v for k, v in self.tensor_parallel.items() if f"tensor_parallel.{k}" in kept},
            max_pipeline=self.max_pipeline if "max_pipeline" in kept else None,
            same_stage=self.same_stage or "same_stage" not in kept,
            use_all=self.use_all and "use_all" in kept,
            memory_reserve_bytes={
                k: v for k, v in self.memory_reserve_bytes.items() if f"memory_reserve_gib.{k}" in kept
            },
        )


FREE = Constraints()


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What a plan shall be best at, and its limits: of a job of `tokens`, and of the power of a zone's devices."""

    best: Goal = "throughput"
    tokens: float | None = None
    deadline_hours: float | None = None
    budget_usd: float | None = None
    site_watts: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def plain(self) -> bool:
        """Whether only speed counts."""
        limits = (self.deadline_hours, self.budget_usd, *self.site_watts.values())
        return self.best == "throughput" and all(limit is None for limit in limits)


FASTEST = Objective()


def resolve_constraints(spec: ConstraintsSpec | None, cluster: Cluster, document: Document) -> Constraints:
    """The constraints, each with its place. Raises InputError where a device type is not in the cluster, or none of a
    type's degrees fits its nodes."""
    if spec is None:
        return FREE
    problems = Problems(document, ("constraints",))
    widest = {
        name: max(group.devices_per_node for group in cluster.node_groups if group.device_type == name)
        for name in cluster.device_types
    }
    for key in ("tensor_parallel", "memory_reserve_gib"):
        for name in getattr(spec, key):
            if name not in cluster.device_types:
                text = unknown_name(f'"{name}" is no device type of this cluster', name, cluster.device_types)
                problems.add((key, name), text)
    for name, degrees in spec.tensor_parallel.items():
        if name in widest and not any(degree <= widest[name] for degree in degrees):
            problems.add(
                ("tensor_parallel", name),
                f"no degree of {degrees} fits a node of {widest[name]} devices. Give at most {widest[name]}.",
            )
    problems.raise_any()
    found = Constraints(
        tensor_parallel={name: tuple(degrees) for name, degrees in spec.tensor_parallel.items()},
        max_pipeline=spec.max_pipeline,
        same_stage=spec.same_stage,
        use_all=spec.use_all,
        memory_reserve_bytes={n: int(gib * _GIB) for n, gib in spec.memory_reserve_gib.items()},
    )
    places = {name: document.where(("constraints", *name.split(".", 1))) for name in found.names()}
    return replace(found, places=places)


def resolve_objective(spec: ObjectiveSpec | None, cluster: Cluster, document: Document) -> Objective:
    """The objective. Raises InputError where a limit lacks what it needs, or a zone is not in the cluster."""
    if spec is None:
        return FASTEST
    problems = Problems(document, ("objective",))
    zones = {group.zone for group in cluster.node_groups}
    for zone in spec.site_watts:
        if zone not in zones:
            problems.add(
                ("site_watts", zone), unknown_name(f'there is no zone "{zone}"', zone, sorted(zones))
            )
    for key in ("deadline_hours", "budget_usd"):
        if getattr(spec, key) is not None and spec.tokens is None:
            problems.add((key,), "a limit of the whole job needs its size. Give tokens: 1e12, say.")
    needed = {
        "usd_per_hour": spec.best == "usd_per_million_tokens" or spec.budget_usd is not None,
        "power_watts": spec.best == "joules_per_token" or bool(spec.site_watts),
    }
    for figure, wanted in needed.items():
        for name, device_type in cluster.device_types.items():
            if wanted and getattr(device_type, figure) is None:
                problems.add((), f"{figure} of {name} is not known. Give it in device_types.{name}.")
    problems.raise_any()
    return Objective(
        best=spec.best,
        tokens=spec.tokens,
        deadline_hours=spec.deadline_hours,
        budget_usd=spec.budget_usd,
        site_watts=dict(spec.site_watts),
    )
