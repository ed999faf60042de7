"""How much of the update each device takes: by its speed, as far as its free memory goes."""

from __future__ import annotations

from hethub.cost.compute import ComputeModel, gradient_bytes, state_bytes
from hethub.cost.memory import device_memory, usable_bytes
from hethub.program.ownership import Ownership, own
from hethub.specs.layout import Layout

__all__ = ["own_by_strength"]

_ROUNDS = 4
_MARGIN = 0.9  # of the free memory, since small slices go whole to one updater


def own_by_strength(layout: Layout, compute: ComputeModel) -> Ownership:
    """The ownership table with updaters' shares in proportion to their memory bandwidth (an update only touches
    memory), less where optimizer state and incoming gradients would not fit."""
    devices = compute.graph.devices
    strengths = {d: 1.0 / compute.touch_seconds(devices[d].type, 1.0) for d in layout.used}
    ownership = own(layout, strengths)
    free = {
        d: usable_bytes(devices[d].type) - use.total
        for d, use in device_memory(compute, layout, {}, {}).items()
    }
    precision = compute.workload.precision
    for _ in range(_ROUNDS):
        short = False
        for device in layout.used:
            need = ownership.owned_elements.get(device, 0) * state_bytes(
                precision
            ) + ownership.incoming_elements.get(device, 0) * gradient_bytes(precision)
            if need > max(0, free[device]):
                short = True
                strengths[device] *= _MARGIN * max(0, free[device]) / need
        if not short:
            break
        ownership = own(layout, strengths)
    return ownership
