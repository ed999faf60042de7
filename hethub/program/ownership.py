"""Who holds and who updates which slice of which parameter: one table, read by all.

Slices are the common refinement of all holders' cuts along a parameter's cut axis. Every element has exactly
one updater. Every holder contributes a partial sum: of other rows, of another pipeline, of a tied place, or (a norm
weight in a tensor-parallel group) of other tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

from hethub.apportion import apportion
from hethub.cost.shapes import Parameter, model_parameters, parameter_span
from hethub.specs.layout import Layout, Span

__all__ = ["MOST_INCOMING", "Held", "Ownership", "Slice", "held_by", "own", "share_out"]

# Below this many elements a piece goes to one updater: cutting a norm weight only makes more of them.
_SMALL = 4096
# Among more holders than `_FEW`, an updater's share of a run is at least `_WORTH` elements: every holder sends to every
# updater, so that a norm weight of forty holders would be 1560 messages of a few hundred elements.
_FEW = 8
_WORTH = 1 << 16
# Both only while what comes to the updater of such a piece or share from all other holders is at most this many
# elements: it grows with the holders, until it is more than all that the device holds itself.
MOST_INCOMING = 1 << 21


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
        return self._by_holder(lambda elements, count: elements)

    def _by_holder(self, share: Callable[[int, int], int]) -> Mapping[int, int]:
        """Device -> the sum, over the slices that it holds, of `share` of a slice's elements and number of holders."""
        by_holders: dict[tuple[int, ...], int] = defaultdict(int)  # few of these, each of many slices
        for entry in self.slices:
            by_holders[entry.holders] += share(entry.elements, len(entry.holders))
        found: dict[int, int] = defaultdict(int)
        for holders, elements in by_holders.items():
            for device in holders:
                found[device] += elements
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
        for entry in self.slices:
            found[entry.updater] += entry.elements * (len(entry.holders) - 1)
        return found

    @cached_property
    def joint_elements(self) -> Mapping[int, int]:
        """Device -> elements of what it gives together with others and gets back where collectives carry that: all that
        it shares, and its own part of the sums."""
        return self._by_holder(lambda elements, count: elements - (-elements // count) if count > 1 else 0)

    @cached_property
    def apart_elements(self) -> Mapping[int, int]:
        """Device -> elements that it updates in slices that do not lie in one piece: those that are a part of its
        columns."""
        # parameter -> holders -> their columns
        spans: dict[int, dict[tuple[int, ...], Span]] = defaultdict(dict)
        for entry in self.slices:
            if self.parameters[entry.parameter].axis:
                known = spans[entry.parameter]
                first, _ = known.get(entry.holders, (entry.start, entry.stop))
                known[entry.holders] = (first, entry.stop)
        found: dict[int, int] = defaultdict(int)
        whole: dict[tuple[int, int], int] = {}  # (parameter, device) -> its columns
        for entry in self.slices:
            known, key = spans.get(entry.parameter, {}), (entry.parameter, entry.updater)
            if known and key not in whole:
                own = [span for holders, span in known.items() if entry.updater in holders]
                whole[key] = max(stop for _, stop in own) - min(start for start, _ in own)
            found[entry.updater] += entry.elements if entry.stop - entry.start < whole.get(key, 0) else 0
        return found

    @property
    def updates(self) -> tuple[Mapping[int, int], ...]:
        """Elements by device that memory depends on, as `device_memory` takes them."""
        return self.owned_elements, self.incoming_elements, self.joint_elements, self.apart_elements

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


def _updaters(
    holders: tuple[int, ...], turn: int, total: int, strengths: Mapping[int, float]
) -> tuple[int, ...]:
    """Who shares a run of `total` elements out, in order: all holders, each layer beginning with another one, or the
    first few of many, the same for all layers, so that their messages can be joined."""
    worth = max(1, total // _WORTH, -(-total * (len(holders) - 1) // MOST_INCOMING))
    if len(holders) > max(_FEW, worth):
        able = tuple(d for d in holders if strengths.get(d, 1.0)) or holders
        return able[:worth]
    start = turn % len(holders)
    return holders[start:] + holders[:start]


_Run = tuple[tuple[Span, int, int], ...]  # of each piece of a layer: span, elements per index, axis
_Shared = tuple[int, int, int, int, int]  # piece's place in the run, start, stop, elements, updater


def _shares_of(
    run: _Run, holders: tuple[int, ...], turn: int, strengths: Mapping[int, float]
) -> Iterator[_Shared]:
    """Share the pieces of one layer that the same devices hold out among them, by their strengths.

    Everyone gets consecutive elements of the run, so that what it is sent lies in one place on every holder. A
    boundary falls inside a piece where that is cut along its rows and not small, or is too much for one updater, else
    at the nearer end of it.
    """
    total = sum((stop - start) * each for (start, stop), each, _ in run)
    order = _updaters(holders, turn, total, strengths)
    weights = [strengths.get(d, 1.0) for d in order]
    if not any(weights):
        weights = [1.0] * len(order)
    edges = list(accumulate(apportion(total, weights)))
    at, updater = 0, 0
    for place, ((start, stop), each, axis) in enumerate(run):
        size = (stop - start) * each
        whole = size < _SMALL or (axis != 0 and size * (len(holders) - 1) <= MOST_INCOMING)
        while start < stop:
            # how many indices lie before the updater's edge
            room = round((edges[updater] - at) / each)
            if whole:
                room = stop - start if 2 * (edges[updater] - at) >= (stop - start) * each else 0
            last = updater == len(order) - 1
            take = stop - start if last else max(0, min(stop - start, room))
            if take:
                yield place, start, start + take, take * each, order[updater]
            start, at = start + take, at + take * each
            if start < stop:
                updater += 1


class _LayerRun(NamedTuple):
    """What the same devices hold of a layer: parameters by number, one a piece, and the pieces."""

    layer: int
    holders: tuple[int, ...]
    numbers: tuple[int, ...]
    pieces: _Run


class Held(NamedTuple):
    """Who holds which pieces of a layout, whoever updates them."""

    parameters: tuple[Parameter, ...]
    runs: tuple[_LayerRun, ...]


def held_by(layout: Layout) -> Held:
    """Refine a layout's cuts. Decoders that stand in the same stages share one refinement."""
    parameters = model_parameters(layout.model)
    known: dict[tuple[object, ...], list[_Piece]] = {}
    runs: dict[tuple[int, tuple[int, ...]], list[tuple[int, Span]]] = defaultdict(list)
    places: dict[tuple[int, ...], tuple[int, ...]] = {}  # layers -> stages that they stand in
    for number, parameter in enumerate(parameters):
        if parameter.layers not in places:
            places[parameter.layers] = tuple(
                stage.index
                for pipeline in layout.pipelines
                for stage in pipeline.stages
                if any(stage.layers[0] <= layer < stage.layers[1] for layer in parameter.layers)
            )
        key = (places[parameter.layers], parameter.cut, parameter.unit, parameter.shape[parameter.axis])
        if key not in known:
            known[key] = _refine(_holdings(layout, parameter))
        for piece in known[key]:
            runs[parameter.layers[0], piece.holders].append((number, piece.span))
    widths = [parameter.elements_per_index for parameter in parameters]
    return Held(
        parameters,
        tuple(
            _LayerRun(
                layer,
                holders,
                tuple(number for number, _ in run),
                tuple((span, widths[number], parameters[number].axis) for number, span in run),
            )
            for (layer, holders), run in runs.items()
        ),
    )


def own(layout: Layout, strengths: Mapping[int, float] | None = None) -> Ownership:
    """Build the table of a layout: `strengths` (device -> weight, 1 where absent) size the updaters' shares, by what
    memory and speed they have for it."""
    return share_out(held_by(layout), strengths or {})


def share_out(held: Held, strengths: Mapping[int, float]) -> Ownership:
    """The same of what is known to be held."""
    slices: list[Slice] = []
    shared: dict[tuple[_Run, tuple[int, ...], int], list[_Shared]] = {}  # alike layers are shared out alike
    for layer, holders, numbers, pieces in held.runs:
        turn = layer % len(holders)
        if (pieces, holders, turn) not in shared:
            shared[pieces, holders, turn] = list(_shares_of(pieces, holders, turn, strengths))
        slices += [
            Slice(numbers[place], start, stop, elements, holders, updater)
            for place, start, stop, elements, updater in shared[pieces, holders, turn]
        ]
    return Ownership(held.parameters, tuple(sorted(slices)))
