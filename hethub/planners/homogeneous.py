"""The homogeneous bound: what each device type reaches with its own best plan on its own devices, summed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from hethub.cost.bounds import PhysicalBound
from hethub.planners.first import FirstPlanner
from hethub.planners.interface import Found, Problem

__all__ = ["HomogeneousBound", "TypeBound", "only_type", "type_alone"]

_FINALISTS = (
    2  # of each type: the closed form ranks splits of alike devices well; one for the figure beside it
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeBound:
    """One device type alone. `global_batch` is its share of the physical bound times the whole batch,
    rounded from `exact_batch`; the tokens per second are 0 where it cannot hold the model. None at the whole batch
    where that was not asked for."""

    device_type: str
    count: int
    exact_batch: float
    global_batch: int
    tokens_per_second: float
    whole_batch_tokens_per_second: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HomogeneousBound:
    """The sum over `types`, and the types that cannot hold the model alone: with any, the share is no
    bound."""

    tokens_per_second: float
    types: tuple[TypeBound, ...]
    not_a_bound: tuple[str, ...]

    @classmethod
    def of(cls, types: Iterable[TypeBound]) -> HomogeneousBound:
        """These types added up."""
        types = tuple(types)
        return cls(
            tokens_per_second=sum(entry.tokens_per_second for entry in types),
            types=types,
            not_a_bound=tuple(entry.device_type for entry in types if entry.tokens_per_second == 0.0),
        )


def only_type(problem: Problem, found: Found) -> TypeBound:
    """Of a cluster of one type: the plan for all devices that nothing but speed decides is the type's own."""
    devices, batch = problem.compute.graph.devices, problem.workload.global_batch
    speed = _tokens_per_second(problem, batch, found)
    return TypeBound(
        device_type=devices[0].type.name,
        count=len(devices),
        exact_batch=float(batch),
        global_batch=batch,
        tokens_per_second=speed,
        whole_batch_tokens_per_second=speed,
    )


def type_alone(
    planner: FirstPlanner, problem: Problem, physical: PhysicalBound, name: str, *, whole_batch: bool = False
) -> TypeBound:
    """Plan a device type by itself: with its share of the batch, and if asked with the `whole_batch`. Only the batch
    and the devices in use differ from `problem`, so its prices are used again."""
    batch = problem.workload.global_batch
    exact_batch = physical.shares[name] * batch
    own = max(1, round(exact_batch))
    speed = _alone(planner, problem, name, own, _FINALISTS)
    whole = (_alone(planner, problem, name, batch, 1) if speed else 0.0) if whole_batch else None
    return TypeBound(
        device_type=name,
        count=sum(device.type.name == name for device in problem.compute.graph.devices),
        exact_batch=exact_batch,
        global_batch=own,
        tokens_per_second=speed,
        whole_batch_tokens_per_second=whole,
    )


def _alone(planner: FirstPlanner, problem: Problem, name: str, batch: int, finalists: int) -> float:
    limited = replace(
        problem,
        types=frozenset([name]),
        workload=replace(problem.workload, global_batch=batch),
        finalists=finalists,
    )
    found = planner.search(limited)
    return 0.0 if found is None else _tokens_per_second(problem, batch, found)


def _tokens_per_second(problem: Problem, batch: int, found: Found) -> float:
    return batch * problem.workload.sequence_length / found.step_seconds
