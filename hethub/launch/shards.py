"""What a device holds of the parameters, and the slices of the ownership table in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from hethub.program.ownership import Ownership

__all__ = ["Shards"]


@dataclass(frozen=True, slots=True)
class Shards:
    """One device's shards: `weights` and (wide) `gradients` map parameter names to them, `first` to the first index of
    the cut axis that each begins at."""

    ownership: Ownership
    weights: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    first: Mapping[str, int]

    def weight(self, number: int) -> Tensor:
        """Slice `number` of the weights, where it lies."""
        return self._cut(number, self.weights).detach()

    def gradient(self, number: int) -> Tensor:
        """Slice `number` of the gradients, where it lies."""
        return self._cut(number, self.gradients)

    def _cut(self, number: int, tensors: Mapping[str, Tensor]) -> Tensor:
        entry = self.ownership.slices[number]
        parameter = self.ownership.parameters[entry.parameter]
        start = entry.start - self.first[parameter.name]
        return tensors[parameter.name].narrow(parameter.axis, start, entry.stop - entry.start)
