"""Small made-up prices, so that no test needs published data: two kinds, a model of a few decoders."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hethub.planners.baselines.prices import Floats
from hethub.planners.baselines.split import Group, Kind

__all__ = ["MadeUpPrices", "kind"]


def kind(name: str, count: int, *, region: str = "here", degrees: tuple[int, ...] = (1, 2)) -> Kind:
    return Kind(name=name, device_type=name, region=region, count=count, node_size=2, degrees=degrees)


class MadeUpPrices:
    """A decoder takes 1 s a row on one device of speed 1; embedding and head take nothing. Messages take `hop` s a row;
    a ring takes `ring` s for each layer of the stage, divided by the degree. `room` is layers x rows x stages in flight
    that a device holds."""

    def __init__(
        self,
        kinds: Sequence[Kind],
        speeds: Sequence[float],
        *,
        decoders: int = 4,
        batch: int = 16,
        hop: float = 0.0,
        ring: float = 0.0,
        room: float = 1e9,
    ) -> None:
        self.kinds = tuple(kinds)
        self.decoders = decoders
        self.batch = batch
        self.priced_rows = (1, 2)
        self._speeds, self._hop, self._ring, self._room = speeds, hop, ring, room

    def layer_seconds(self, group: Group, rows: int) -> Floats:
        each = rows / self._speeds[group.kind] / group.degree
        return np.concatenate(([0.0, 0.0], np.cumsum(np.full(self.decoders, each)), [self.decoders * each]))

    def update_seconds(self, group: Group, rows: int, layers: tuple[int, int]) -> float:
        return 0.0

    def forth_seconds(self, sender: Group, receiver: Group, last_layer: int, rows: int) -> float:
        return self._hop * rows

    def back_seconds(self, sender: Group, receiver: Group, first_layer: int, rows: int) -> float:
        return self._hop * rows

    def reduce_seconds(self, groups: Sequence[Group], count: int, layers: tuple[int, int]) -> float:
        if count < 2:
            return 0.0
        return self._ring * (layers[1] - layers[0]) / min(group.degree for group in groups)

    node_ring_seconds = reduce_seconds

    def fits(self, group: Group, rows: int, layers: tuple[int, int], later_stages: int) -> bool:
        return (layers[1] - layers[0]) * rows * (later_stages + 1) / group.degree <= self._room
