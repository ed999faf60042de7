"""Who holds and who updates which slice of which parameter: one table, read by all.

Slices are the common refinement of all holders' cuts along a parameter's cut axis. Every element has exactly
one updater. A holder is a *contributor* when its gradient is a partial sum (other rows, pipelines, a tied
place) and not one when it holds a mere copy (a norm weight on the later ranks of a tensor-parallel group):
copies are never added.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from hethub.cost.shapes import Parameter, model_parameters, parameter_span
from hethub.specs.layout import Layout, Span

__all__ = ["Ownership", "Slice", "own"]

# Below this many elements a slice goes to one updater: cutting a norm weight only multiplies messages.
_SMALL = 4096


class Slice(NamedTuple):
    """Elements [start, stop) of the cut axis of parameter `parameter` (index into `Ownership.parameters`).

    `holders`, `contributors` (a subset) and `updater` (a holder) are device indices, ascending.
    """

    parameter: int
    start: int
    stop: int
    elements: int
    holders: tuple[int, ...]
    contributors: tuple[int, ...]
    updater: int


@dataclass(frozen=True)
class Ownership:
    """The table, and the views that reduction, norm, memory and checkpoints take of it."""

    parameters: tuple[Parameter, ...]
    slices: tuple[Slice, ...]

    @cached_property
    def by_updater(self) -> Mapping[int, tuple[int, ...]]:
        """Device -> indices of the slices that it updates."""
        found: dict[int, list[int]] = defaultdict(list)
        for number, entry in enumerate(self.slices):
            found[entry.updater].append(number)
        return {device: tuple(numbers) for device, numbers in found.items()}

    @cached_property
    def owned_elements(self) -> Mapping[int, int]:
        """Device -> elements that it updates."""
        return {d: sum(self.slices[n].elements for n in numbers) for d, numbers in self.by_updater.items()}

    @cached_property
    def gradient_routes(self) -> Mapping[tuple[int, int], tuple[int, ...]]:
        """(contributor, updater), different devices -> slices whose gradient goes that way."""
        found: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, entry in enumerate(self.slices):
            for device in entry.contributors:
                if device != entry.updater:
                    found[device, entry.updater].append(number)
        return {route: tuple(numbers) for route, numbers in found.items()}

    @cached_property
    def weight_routes(self) -> Mapping[tuple[int, int], tuple[int, ...]]:
        """(updater, holder), different devices -> slices whose new weights go that way."""
        found: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, entry in enumerate(self.slices):
            for device in entry.holders:
                if device != entry.updater:
                    found[entry.updater, device].append(number)
        return {route: tuple(numbers) for route, numbers in found.items()}

    @cached_property
    def incoming_elements(self) -> Mapping[int, int]:
        """Device -> gradient elements that reach it from others: its reduction buffers."""
        found: dict[int, int] = defaultdict(int)
        for (_, updater), numbers in self.gradient_routes.items():
            found[updater] += self.route_elements(numbers)
        return found

    def route_elements(self, numbers: tuple[int, ...]) -> int:
        """Elements of these slices together."""
        slices = self.slices
        return sum(slices[n].elements for n in numbers)


class _Piece(NamedTuple):
    """A refined interval of a cut axis and who has it."""

    span: Span
    holders: tuple[int, ...]
    contributors: tuple[int, ...]


def _holdings(layout: Layout, parameter: Parameter) -> list[tuple[int, Span, bool]]:
    """(device, span, contributes) of everyone who has the parameter, a device once."""
    found: dict[int, tuple[Span, bool]] = {}
    for pipeline in layout.pipelines:
        for stage in pipeline.stages:
            if not any(stage.layers[0] <= layer < stage.layers[1] for layer in parameter.layers):
                continue
            for replica in stage.replicas:
                for rank in replica.ranks:
                    adds = True  # a norm weight's gradient is partial too: each rank norms its own tokens
                    found.setdefault(rank.device, (parameter_span(parameter, rank.share), adds))
    return [(device, span, adds) for device, (span, adds) in sorted(found.items())]


def _refine(holdings: list[tuple[int, Span, bool]]) -> list[_Piece]:
    edges = sorted({edge for _, span, _ in holdings for edge in span})
    pieces = []
    for start, stop in pairwise(edges):
        inside = [(d, adds) for d, span, adds in holdings if span[0] <= start and stop <= span[1]]
        pieces.append(
            _Piece((start, stop), tuple(d for d, _ in inside), tuple(d for d, adds in inside if adds))
        )
    return pieces


def _share_out(number: int, parameter: Parameter, piece: _Piece, turn: int) -> list[Slice]:
    """Cut a piece among its holders, or hand a small one to a single holder, in turn."""
    (start, stop), each = piece.span, parameter.elements_per_index
    count = len(piece.holders)
    if count == 1 or (stop - start) * each < _SMALL or stop - start < count:
        spans = {piece.holders[turn % count]: (start, stop)}
    else:
        width = stop - start
        spans = {
            d: (start + width * i // count, start + width * (i + 1) // count)
            for i, d in enumerate(piece.holders)
        }
    return [
        Slice(number, a, b, (b - a) * each, piece.holders, piece.contributors, updater)
        for updater, (a, b) in spans.items()
    ]


def own(layout: Layout) -> Ownership:
    """Build the table of a layout. Decoders that stand in the same stages share one refinement."""
    parameters = model_parameters(layout.model)
    known: dict[tuple[object, ...], list[_Piece]] = {}
    slices: list[Slice] = []
    for number, parameter in enumerate(parameters):
        where = tuple(
            stage.index
            for pipeline in layout.pipelines
            for stage in pipeline.stages
            if any(stage.layers[0] <= layer < stage.layers[1] for layer in parameter.layers)
        )
        key = (where, parameter.cut, parameter.unit, parameter.shape[parameter.axis])
        if key not in known:
            known[key] = _refine(_holdings(layout, parameter))
        for turn, piece in enumerate(known[key]):
            slices.extend(_share_out(number, parameter, piece, parameter.layers[0] + turn))
    return Ownership(parameters, tuple(slices))
