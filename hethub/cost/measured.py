"""What was measured of a cluster, beside its figures: layers, runs, and how sure predictions are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hethub.cost.compute import ComputeModel
from hethub.cost.graph import CostGraph
from hethub.specs.workload import Workload

if TYPE_CHECKING:
    from hethub.cost.profiles.profile import Profile

__all__ = ["NOT_MEASURED", "Measured", "spread_interval"]

# Of a normal distribution: 95 % lie within 1.96 standard deviations of the middle, its quartiles 1.349 apart.
_HALF_WIDTH_OF_QUARTILES = 1.96 / 1.349


@dataclass(frozen=True, slots=True)
class Measured:
    """A profile of layers; how much longer devices work in whole runs, by type; and between which measured over
    predicted step time lies with 95 % (None where neither runs nor repetitions tell)."""

    profile: Profile | None = None
    slow_down: Mapping[str, float] = field(default_factory=dict)
    ratio_interval: tuple[float, float] | None = None

    def compute(self, graph: CostGraph, workload: Workload) -> ComputeModel:
        """Prices of a workload under what was measured."""
        return ComputeModel(graph, workload, self.profile, slow_down=self.slow_down)


NOT_MEASURED = Measured()


def spread_interval(spread: float) -> tuple[float, float]:
    """The interval of measured over predicted where layers repeat with quartiles `spread` (over the median) apart.

    The longest that all layers together can take is that of each of them at its end of the interval, and then the step
    grows by no more than they do, since messages take no longer.
    """
    most = 1.0 + _HALF_WIDTH_OF_QUARTILES * spread
    return 1.0 / most, most
