"""What the published searches ask of a cost model, so that the same search runs under theirs and under ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from hethub.planners.baselines.split import Band, Group, Kind, Side, Split
from hethub.simulate.sailor import chain_seconds, moving_seconds

__all__ = ["Floats", "Late", "Prices", "SplitPrice", "meetings", "never", "price_split", "split_fits"]

Floats = npt.NDArray[np.float64]
Late = Callable[[], bool]  # whether a search is to end with what it has


def never() -> bool:
    """No time limit."""
    return False


class Prices(Protocol):
    """Prices of stages. Layers are numbered 0 embedding, 1 to `decoders`, then the head; ranges are half-open.

    Seconds are infinite where there is no price, so that a search may ask for everything. `rows` are always those of
    one replica's micro-batch.
    """

    kinds: tuple[Kind, ...]
    decoders: int
    batch: int
    priced_rows: tuple[int, ...]

    def layer_seconds(self, group: Group, rows: int) -> Floats:
        """Forward and backward of a micro-batch, summed up to each layer: [layers + 1]."""
        ...

    def update_seconds(self, group: Group, rows: int, layers: tuple[int, int]) -> float:
        """The optimizer's step of a stage."""
        ...

    def forth_seconds(self, sender: Group, receiver: Group, last_layer: int, rows: int) -> float:
        """Sending the activation that `last_layer` makes."""
        ...

    def back_seconds(self, sender: Group, receiver: Group, first_layer: int, rows: int) -> float:
        """Sending back the gradient of what the stage that begins with `first_layer`, the sender, was sent."""
        ...

    def reduce_seconds(self, groups: Sequence[Group], count: int, layers: tuple[int, int]) -> float:
        """Reducing a stage's gradients among `count` groups of these sorts."""
        ...

    def node_ring_seconds(self, groups: Sequence[Group], count: int, layers: tuple[int, int]) -> float:
        """The same as Metis estimates it: a ring at what whole nodes reach between them, whatever the message."""
        ...

    def fits(self, group: Group, rows: int, layers: tuple[int, int], later_stages: int) -> bool:
        """Whether a stage fits its devices with `later_stages` behind it."""
        ...


class SplitPrice(NamedTuple):
    """Seconds of a step: what each band's pipeline takes, the reduction, the update."""

    pipeline_seconds: tuple[float, ...]
    reduce_seconds: float
    update_seconds: float

    @property
    def step_seconds(self) -> float:
        """The slowest pipeline, then reduction and update."""
        return max(self.pipeline_seconds) + self.reduce_seconds + self.update_seconds


def price_split(prices: Prices, split: Split) -> SplitPrice:
    """Price a split as Sailor's simulator does.

    A stage waits for its slowest replica and for its slowest message, a replica sending its own rows; the step for the
    slowest pipeline; then each stage's gradients are reduced over its replicas in all pipelines.
    """
    reduce = update = 0.0
    for number, layers in enumerate(split.layers):
        sides = [(side, band.repeat) for band in split.bands for side in band.stages[number]]
        groups = tuple(dict.fromkeys(side.group for side, _ in sides))
        count = sum(side.replicas * repeat for side, repeat in sides)
        reduce = max(reduce, prices.reduce_seconds(groups, count, layers))
        update = max(update, *(prices.update_seconds(side.group, side.rows, layers) for side, _ in sides))
    return SplitPrice(
        tuple(_pipeline_seconds(prices, split.bounds, band) for band in split.bands), reduce, update
    )


def _pipeline_seconds(prices: Prices, bounds: tuple[int, ...], band: Band) -> float:
    compute = [
        max(_stage_seconds(prices, side, layers) for side in stage)
        for stage, layers in zip(band.stages, pairwise(bounds), strict=True)
    ]
    forth, back = [], []
    for bound, (before, after) in zip(bounds[1:-1], pairwise(band.stages), strict=True):
        pairs = list(meetings(before, after))
        forth.append(max(prices.forth_seconds(a.group, b.group, bound - 1, a.rows) for a, b in pairs))
        back.append(max(prices.back_seconds(b.group, a.group, bound, b.rows) for a, b in pairs))
    return chain_seconds(compute, moving_seconds(forth, back), band.micro_batches)


def _stage_seconds(prices: Prices, side: Side, layers: tuple[int, int]) -> float:
    summed = prices.layer_seconds(side.group, side.rows)
    return float(summed[layers[1]] - summed[layers[0]])


def meetings(before: Sequence[Side], after: Sequence[Side]) -> Iterator[tuple[Side, Side]]:
    """Sides of two stages whose rows meet: both give out the micro-batch's rows in order."""
    end, ends = 0, []
    for side in after:
        end += side.rows * side.replicas
        ends.append(end)
    start = 0
    for side in before:
        stop = start + side.rows * side.replicas
        first = 0
        for other, last in zip(after, ends, strict=True):
            if first < stop and start < last:
                yield side, other
            first = last
        start = stop


def split_fits(prices: Prices, split: Split) -> bool:
    """Whether it uses no more devices than there are and every stage fits."""
    enough = all(split.devices_of(number) <= kind.count for number, kind in enumerate(prices.kinds))
    last = len(split.layers) - 1
    return enough and all(
        prices.fits(side.group, side.rows, layers, last - number)
        for band in split.bands
        for number, layers in enumerate(split.layers)
        for side in band.stages[number]
    )
