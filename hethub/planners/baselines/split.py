"""Splits in counts, as the published planners see them: one cut of the layers, and bands of alike pipelines.

A *kind* is devices that are interchangeable: of one type, in one region. All bands cut the layers alike, so that a
stage's gradients are reduced over the replicas of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

__all__ = ["Band", "Group", "Kind", "Side", "Split"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """`count` devices of `device_type` in `region`, on nodes of `node_size`, in groups of one of `degrees` devices."""

    name: str
    device_type: str
    region: str
    count: int
    node_size: int
    degrees: tuple[int, ...]

    def groups(self, degree: int) -> int:
        """Tensor-parallel groups of that many devices that stand in its nodes."""
        nodes, rest = divmod(self.count, self.node_size)
        return nodes * (self.node_size // degree) + rest // degree


class Group(NamedTuple):
    """A tensor-parallel group: the number of its kind, and its devices."""

    kind: int
    degree: int


class Side(NamedTuple):
    """Alike replicas of a stage, each with `rows` rows of every micro-batch."""

    group: Group
    rows: int
    replicas: int = 1


class Band(NamedTuple):
    """`repeat` alike pipelines. `stages` holds the sides of each stage; their rows add up to the same everywhere."""

    stages: tuple[tuple[Side, ...], ...]
    micro_batches: int
    repeat: int = 1

    @property
    def rows(self) -> int:
        """Rows of a micro-batch."""
        return sum(side.rows * side.replicas for side in self.stages[0])

    @property
    def total_rows(self) -> int:
        """Rows of a step that all its pipelines do together."""
        return self.repeat * self.rows * self.micro_batches

    def devices_of(self, kind: int) -> int:
        """Devices of this kind in use."""
        sides = [side for stage in self.stages for side in stage if side.group.kind == kind]
        return self.repeat * sum(side.group.degree * side.replicas for side in sides)


class Split(NamedTuple):
    """`bounds` are the first layers of the stages and the end of the last: [bounds[i], bounds[i + 1])."""

    bounds: tuple[int, ...]
    bands: tuple[Band, ...]

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """Of each stage, half-open."""
        return tuple(pairwise(self.bounds))

    @property
    def total_rows(self) -> int:
        """Rows of a step."""
        return sum(band.total_rows for band in self.bands)

    def devices_of(self, kind: int) -> int:
        """Devices of this kind in use."""
        return sum(band.devices_of(kind) for band in self.bands)
