"""Who holds and who updates which slice of which parameter: one table, read by all.

Slices are the common refinement of all holders' cuts along a parameter's cut axis. Every element has exactly
one updater. Every holder contributes a partial sum: of other rows, of another pipeline, of a tied place, or (a norm
weight in a tensor-parallel group) of other tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

from hethub.apportion import apportion
from hethub.cost.shapes import Parameter, model_parameters, parameter_span
from hethub.specs.layout import Layout, Span

__all__ = ["Ownership", "Slice", "own"]

# Below this many elements a slice goes to one updater: cutting a norm weight only multiplies messages.
_SMALL = 4096


class Slice(NamedTuple):
    """Elements [start, stop) of the cut axis of parameter `parameter` (index into `Ownership.parameters`).

    `holders` and `updater` (a holder) are device indices, ascending.
    """

    parameter: int
    start: int
    stop: int
    elements: int
    holders: tuple[int, ...]
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
    def held_elements(self) -> Mapping[int, int]:
        """Device -> elements that it holds."""
        found: dict[int, int] = defaultdict(int)
        for entry in self.slices:
            for device in entry.holders:
                found[device] += entry.elements
        return found

    @cached_property
    def gradient_routes(self) -> Mapping[tuple[int, int], tuple[int, ...]]:
        """(holder, updater), different devices -> slices whose gradient goes that way."""
        found: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, entry in enumerate(self.slices):
            for device in entry.holders:
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


def _holdings(layout: Layout, parameter: Parameter) -> list[tuple[int, Span]]:
    """(device, span) of everyone who has the parameter, a device once."""
    found: dict[int, Span] = {}
    for pipeline in layout.pipelines:
        for stage in pipeline.stages:
            if not any(stage.layers[0] <= layer < stage.layers[1] for layer in parameter.layers):
                continue
            for replica in stage.replicas:
                for rank in replica.ranks:
                    found.setdefault(rank.device, parameter_span(parameter, rank.share))
    return sorted(found.items())


def _refine(holdings: list[tuple[int, Span]]) -> list[_Piece]:
    edges = sorted({edge for _, span in holdings for edge in span})
    return [
        _Piece((a, b), tuple(d for d, span in holdings if span[0] <= a and b <= span[1]))
        for a, b in pairwise(edges)
    ]


def _share_out(
    number: int, parameter: Parameter, piece: _Piece, turn: int, strengths: Mapping[int, float]
) -> list[Slice]:
    """Cut a piece among its holders by their strengths, or hand a small one to a single holder, in turn."""
    (start, stop), each = piece.span, parameter.elements_per_index
    count = len(piece.holders)
    weights = [strengths.get(d, 1.0) for d in piece.holders]
    if count == 1 or (stop - start) * each < _SMALL or stop - start < count or not any(weights):
        able = [d for d, w in zip(piece.holders, weights, strict=True) if w] or piece.holders
        spans = {able[turn % len(able)]: (start, stop)}
    else:
        edges = list(accumulate(apportion(stop - start, weights), initial=start))
        spans = dict(zip(piece.holders, pairwise(edges), strict=True))
    return [
        Slice(number, a, b, (b - a) * each, piece.holders, updater)
        for updater, (a, b) in spans.items()
        if a < b
    ]


def own(layout: Layout, strengths: Mapping[int, float] | None = None) -> Ownership:
    """Build the table of a layout: `strengths` (device -> weight, 1 where absent) size the updaters' shares, by what
    memory and speed they have for it. Decoders that stand in the same stages share one refinement."""
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
            slices.extend(_share_out(number, parameter, piece, parameter.layers[0] + turn, strengths or {}))
    return Ownership(parameters, tuple(slices))
