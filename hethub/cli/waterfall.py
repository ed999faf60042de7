"""The waterfall of lost time of a prediction, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hethub.simulate.modelled import Modelled
    from hethub.timeline.waterfall import Waterfall

__all__ = ["predicted_waterfall", "waterfall_lines"]

_SHOWN = 5e-5  # what would read as 0.00 %


def predicted_waterfall(modelled: Modelled) -> Waterfall:
    """Where the time of the predicted step goes, devices weighed by their speed under the physical bound."""
    from collections import Counter

    from hethub.cost.bounds import physical_bound
    from hethub.simulate.pieces import piece_seconds
    from hethub.timeline.waterfall import waterfall

    timeline = modelled.simulation.timeline
    if timeline is None:
        raise AssertionError("the simulation kept no timeline")
    compute = modelled.compute
    shares = physical_bound(compute).shares
    names = [device.type.name for device in compute.graph.devices]
    counts = Counter(names)
    weights = [shares[name] / counts[name] for name in names]
    if modelled.fold is not None:  # one device of the timeline stands for all of its group
        for first, group in modelled.fold.members.items():
            together = sum(weights[device] for device in group)
            for device in group:
                weights[device] = together if device == first else 0.0
    return waterfall(timeline, 0, 0, weights, piece_seconds(modelled.layout, compute))


def waterfall_lines(found: Waterfall) -> list[tuple[str, str]]:
    """(cause, share and meaning) of all that took time."""
    from hethub.timeline.waterfall import CAUSES

    return [
        (cause, f"{share:.2%}\t{CAUSES[cause]}") for cause, share in found.total.items() if share >= _SHOWN
    ]
