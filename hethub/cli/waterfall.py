"""The waterfall of lost time of a prediction, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hethub.cost.compute import ComputeModel
    from hethub.simulate.engine import Simulation
    from hethub.timeline.waterfall import Waterfall

__all__ = ["predicted_waterfall", "waterfall_lines"]

_SHOWN = 5e-5  # what would read as 0.00 %


def predicted_waterfall(compute: ComputeModel, simulation: Simulation) -> Waterfall:
    """Where the time of the predicted step goes, devices weighed by their speed under the physical bound."""
    from collections import Counter

    from hethub.cost.bounds import physical_bound
    from hethub.timeline.waterfall import waterfall

    if simulation.timeline is None:
        raise AssertionError("the simulation kept no timeline")
    shares = physical_bound(compute).shares
    names = [device.type.name for device in compute.graph.devices]
    counts = Counter(names)
    return waterfall(simulation.timeline, 0, 0, [shares[name] / counts[name] for name in names])


def waterfall_lines(found: Waterfall) -> list[tuple[str, str]]:
    """(cause, share and meaning) of all that took time."""
    from hethub.timeline.waterfall import CAUSES

    return [
        (cause, f"{share:.2%}\t{CAUSES[cause]}") for cause, share in found.total.items() if share >= _SHOWN
    ]
