"""The waterfall of lost time of a prediction, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hethub.simulate.modelled import Modelled
    from hethub.timeline.waterfall import Waterfall

__all__ = ["predicted_waterfall", "waterfall_lines"]

_SHOWN = 5e-5  # what would read as 0.00 %


def predicted_waterfall(modelled: Modelled) -> Waterfall:
    """Where the time of the predicted step goes, devices weighed by their speed under the physical bound.

    Where a device stands for its whole group, it has the group's weight.
    """
    from collections import Counter

    from hethub.cost.bounds import physical_bound
    from hethub.timeline.waterfall import waterfall

    if modelled.simulation.timeline is None:
        raise AssertionError("the simulation kept no timeline")
    shares = physical_bound(modelled.compute).shares
    names = [device.type.name for device in modelled.compute.graph.devices]
    counts = Counter(names)
    speeds = [shares[name] / counts[name] for name in names]
    for first, group in ({} if modelled.fold is None else modelled.fold.members).items():
        together = sum(speeds[device] for device in group)
        for device in group:
            speeds[device] = 0.0
        speeds[first] = together
    return waterfall(modelled.simulation.timeline, 0, 0, speeds)


def waterfall_lines(found: Waterfall) -> list[tuple[str, str]]:
    """(cause, share and meaning) of all that took time."""
    from hethub.timeline.waterfall import CAUSES

    return [
        (cause, f"{share:.2%}\t{CAUSES[cause]}") for cause, share in found.total.items() if share >= _SHOWN
    ]
