"""Prices of a published problem under Sailor's cost assumptions (SOSP 2025, arXiv 2504.17096), of its artifact's
tables.

Its rules, as its simulator has them (`simulate/sailor.py`): layer times as profiled, never interpolated; every message
between stages crosses nodes, at the bandwidth that as many devices as the group has reach together; a stage's
gradients, divided by the least tensor-parallel degree in it, are reduced in a ring at one device's bandwidth over the
slowest link in it; 24 bytes a parameter, activations of as many micro-batches as stages follow, and 2 or 3 GB of
runtime. Devices of a node that send at once do not share its link when they reduce, which favours small groups; we keep
that.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hethub.errors import InputError
from hethub.planners.baselines.prices import Floats
from hethub.planners.baselines.problems import PublishedProblem
from hethub.planners.baselines.split import Group
from hethub.simulate.sailor import (
    BYTES_PER_PARAMETER,
    FLOAT_BYTES,
    LARGEST_AVERAGED_DEGREE,
    SailorCosts,
    ring_seconds,
)

__all__ = ["CloudLinks", "PublishedPrices", "load_cloud_links"]

_RUNTIME_BYTES = {1: 2.0e9}  # by degree
_WIDE_RUNTIME_BYTES = 3.0e9  # of a degree above 1
_LEAST_BYTES = 2**17  # the fitted bandwidth is negative below on fast links
_End = tuple[str, str, int]  # device type, zone, devices that send at once


class Bandwidth(NamedTuple):
    """GB/s = a x^2 + b x + c with x = log2(bytes / 1e6), never above `most`, the largest measured."""

    a: float
    b: float
    c: float
    most: float

    def seconds(self, size: float) -> float:
        """Of a message of `size` bytes."""
        x = math.log2(max(size, _LEAST_BYTES) / 1e6)
        return size / (min(self.a * x * x + self.b * x + self.c, self.most) * 1e9)


class CloudLinks:
    """Bandwidth between groups of devices of a cloud's zones, measured between devices of one type."""

    def __init__(self, measured: Mapping[tuple[_End, _End], Bandwidth]) -> None:
        self._measured = measured

    def between(self, one: _End, other: _End) -> Bandwidth:
        """Of unlike ends, the slower of the two links between alike ones, as the artifact derives it.

        Raises InputError where that was not measured.
        """
        pairs = [((t, one[1], n), (t, other[1], n)) for t, _, n in dict.fromkeys((one, other))]
        try:
            return min((self._measured[pair] for pair in pairs), key=lambda link: link.most)
        except KeyError:
            raise InputError(
                f"link_bandwidth.csv has no link between {_name(one)} and {_name(other)} of cluster gcp. "
                "Leave the problem out."
            ) from None


def _name(end: _End) -> str:
    return f"{end[2]} x {end[0]} in {end[1]}"


def load_cloud_links(path: Path) -> CloudLinks:
    """The measured links between nodes and zones of cluster gcp. Raises InputError with file and line."""
    found = {}
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            for line, row in enumerate(csv.DictReader(stream), start=2):
                try:
                    if row["cluster"] != "gcp" or row["origin"] != "measured" or row["scope"] == "intra_node":
                        continue
                    ends = [
                        (row[f"{side}_device_type"], row[f"{side}_zone"], int(row[f"{side}_gpus"]))
                        for side in ("sender", "receiver")
                    ]
                    columns = ("coef_log2_squared", "coef_log2", "coef_constant", "max_measured_gb_per_s")
                    found[ends[0], ends[1]] = Bandwidth(*(float(row[column]) for column in columns))
                except (KeyError, ValueError) as error:
                    raise InputError(f"{path}:{line}: {error}. Name link_bandwidth.csv.") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Name the data's folder.") from None
    return CloudLinks(found)


class PublishedPrices:
    """Implements `Prices` for one problem."""

    def __init__(self, problem: PublishedProblem, costs: SailorCosts, links: CloudLinks) -> None:
        self.kinds = problem.kinds
        self.decoders = problem.decoders
        self.batch = problem.global_batch
        self.priced_rows = problem.priced_rows
        self._memory_bytes = problem.memory_bytes
        self._zones = problem.zones
        self._costs = costs
        self._links = links
        layers = ("embedding", "decoder_first", *["decoder"] * (problem.decoders - 1), "head")
        self._layers = layers
        degrees = sorted({degree for kind in problem.kinds for degree in kind.degrees})
        self._elements = {d: _summed([costs.memory[d, layer][0] for layer in layers]) for d in {1, *degrees}}
        self._kept = {d: _summed([costs.memory[d, layer][1] for layer in layers]) for d in degrees}
        self._output_bytes = [costs.memory[1, layer][2] * FLOAT_BYTES for layer in layers]
        for cached in ("layer_seconds", "update_seconds", "_send_seconds", "_between", "_slowest"):
            setattr(self, cached, lru_cache(maxsize=None)(getattr(self, cached)))

    def layer_seconds(self, group: Group, rows: int) -> Floats:
        """Forward and backward of a micro-batch, summed up to each layer: [layers + 1]. Rows that were not profiled are
        done in parts that were, one after the other, as Metis estimates them."""
        summed = np.zeros(len(self._layers) + 1)
        for times, part in self._parts(group, rows):
            forward, backward, _ = zip(
                *(self._times(group, part, layer) for layer in self._layers), strict=True
            )
            summed = summed + times * (_summed(forward) + _summed(backward))
        return summed

    def update_seconds(self, group: Group, rows: int, layers: tuple[int, int]) -> float:
        """Of the small model that was profiled, whatever the stage holds."""
        largest = self._parts(group, rows)[0][1]
        return self._times(group, largest, self._layers[layers[0]])[2]

    def _parts(self, group: Group, rows: int) -> list[tuple[int, int]]:
        """(how often, profiled rows), largest first; without a profile the rows themselves, which have no price."""
        parts, left = [], rows
        for part in reversed(self.priced_rows):
            if math.isfinite(self._times(group, part, "head")[0]) and left >= part:
                parts.append((left // part, part))
                left %= part
        return parts if left == 0 else [(1, rows)]

    def _times(self, group: Group, rows: int, layer: str) -> tuple[float, float, float]:
        place = (self.kinds[group.kind].device_type, group.degree, rows, layer)
        return self._costs.times.get(place, (math.inf, math.inf, math.inf))

    def forth_seconds(self, sender: Group, receiver: Group, last_layer: int, rows: int) -> float:
        """The whole activation, at the bandwidth of both groups."""
        return self._send_seconds(sender, receiver, self._output_bytes[last_layer] * rows)

    def back_seconds(self, sender: Group, receiver: Group, first_layer: int, rows: int) -> float:
        """As much as the *output* of the later stage's first layer has, as it counts."""
        return self._send_seconds(sender, receiver, self._output_bytes[first_layer] * rows)

    def _send_seconds(self, sender: Group, receiver: Group, size: float) -> float:
        return max(link.seconds(size) for link in self._between(sender, receiver))

    def _between(self, one: Group, other: Group) -> tuple[Bandwidth, ...]:
        """Links between all zones of both kinds' regions, of which a search takes the slowest."""
        ends = [
            [(kind.device_type, zone, group.degree) for zone in self._zones[kind.region]]
            for kind, group in ((self.kinds[group.kind], group) for group in (one, other))
        ]
        return tuple(self._links.between(*pair) for pair in product(*ends))

    def reduce_seconds(self, groups: Sequence[Group], count: int, layers: tuple[int, int]) -> float:
        """Groups of one kind stand beside each other in the ring, kinds in order."""
        kinds = tuple(sorted({group.kind for group in groups}))
        return ring_seconds(self._gradient_bytes(groups, layers), count, self._slowest(kinds))

    def node_ring_seconds(self, groups: Sequence[Group], count: int, layers: tuple[int, int]) -> float:
        """At the largest bandwidth that was measured between two nodes all of whose devices send, of the slowest
        kind."""
        nodes = {Group(group.kind, self.kinds[group.kind].node_size) for group in groups}
        most = min(link.most for node in nodes for link in self._between(node, node))
        return 2 * (count - 1) / count * self._gradient_bytes(groups, layers) / (most * 1e9)

    def _gradient_bytes(self, groups: Sequence[Group], layers: tuple[int, int]) -> float:
        """What each group of a ring reduces."""
        elements = self._elements[1][layers[1]] - self._elements[1][layers[0]]
        return (
            float(elements) * FLOAT_BYTES / min(LARGEST_AVERAGED_DEGREE, *(group.degree for group in groups))
        )

    def _slowest(self, kinds: tuple[int, ...]) -> Callable[[float], float]:
        """Seconds of a message over the slowest link of a ring through these kinds."""
        pairs = [*zip(kinds, kinds, strict=True), *pairwise(kinds)]
        links = {link for one, other in pairs for link in self._between(Group(one, 1), Group(other, 1))}
        return lambda size: max(link.seconds(size) for link in links)

    def fits(self, group: Group, rows: int, layers: tuple[int, int], later_stages: int) -> bool:
        """As its planner's check counts."""
        first, end = layers
        elements = self._elements[group.degree]
        kept = self._kept[group.degree]
        use = (
            float(elements[end] - elements[first]) * BYTES_PER_PARAMETER
            + float(kept[end] - kept[first]) * rows * (later_stages + 1)
            + _RUNTIME_BYTES.get(group.degree, _WIDE_RUNTIME_BYTES)
        )
        return use <= self._memory_bytes[self.kinds[group.kind].device_type]


def _summed(values: Sequence[float]) -> Floats:
    return np.concatenate(([0.0], np.cumsum(np.asarray(values, dtype=np.float64))))
