"""How much of the update each device takes: by its speed, as far as its free memory goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from hethub.cost.compute import ComputeModel
from hethub.cost.memory import MemoryUse, RankUse, rank_uses, usable_bytes, with_updates
from hethub.program.ownership import Ownership, held_by, own, share_out
from hethub.specs.layout import Layout

__all__ = ["own_by_speed", "own_by_strength"]

_ROUNDS = 4
_MARGIN = 0.9  # of the free memory, since small slices go whole to one updater


def own_by_speed(layout: Layout, compute: ComputeModel) -> Ownership:
    """The ownership table with updaters' shares in proportion to their memory bandwidth (an update only touches
    memory), whether or not that fits."""
    return own(layout, _speeds(layout, compute.by_figures))


def _speeds(layout: Layout, compute: ComputeModel) -> dict[int, float]:
    devices = compute.graph.devices
    return {d: 1.0 / compute.touch_seconds(devices[d].type, 1.0) for d in layout.used}


def own_by_strength(layout: Layout, compute: ComputeModel) -> Ownership:
    """The ownership table by speed, less where that would not fit. Where no such shares are found they begin with even
    ones, which a plan that fits has the memory for; where those do not fit either, the table with the least shortage;
    where a device lacks memory whatever it updates, the table by speed.
    It depends on the plan alone, not on what was measured."""
    compute = compute.by_figures
    uses, held = rank_uses(compute, layout), held_by(layout)
    found: list[tuple[int, Ownership]] = []
    idle: Mapping[int, MemoryUse] | None = None
    for strengths in (_speeds(layout, compute), dict.fromkeys(layout.used, 1.0)):
        for _ in range(_ROUNDS):
            ownership = share_out(held, strengths)
            if idle is None:  # what is exchanged in common, who updates what does not change
                idle = with_updates(compute, uses, {}, {}, ownership.joint_elements)
                if any(use.total > _usable(compute, device) for device, use in idle.items()):
                    return ownership
            short = _short(compute, uses, ownership, idle)
            if not short:
                return ownership
            found.append((max(each.bytes for each in short.values()), ownership))
            for device, each in short.items():
                strengths[device] *= _MARGIN * each.room
    return min(found, key=lambda one: one[0])[1]


class _Shortage(NamedTuple):
    """`bytes` that a device lacks, and the share of what it is to update that it has `room` for."""

    bytes: int
    room: float


def _usable(compute: ComputeModel, device: int) -> int:
    return usable_bytes(compute.graph.devices[device].type)


def _short(
    compute: ComputeModel, uses: Mapping[int, RankUse], ownership: Ownership, idle: Mapping[int, MemoryUse]
) -> dict[int, _Shortage]:
    """The devices that lack memory, of which each would need what it does `idle` if it updated nothing."""
    found = {}
    for device, use in with_updates(compute, uses, *ownership.updates).items():
        usable, least = _usable(compute, device), idle[device].total
        if use.total > usable:
            found[device] = _Shortage(use.total - usable, (usable - least) / (use.total - least))
    return found
