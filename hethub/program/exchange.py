"""What is exchanged around the pipeline: gradient slices to their updaters, new weights to their holders, and when.

A device's own list decides: a gradient may leave behind the last action that adds to it, a new weight must be there
before the first action that uses it. Inside an island collectives carry both (`islands.py`), in one order at all
members: a collective may begin behind its own moment, and not before the one ahead of it in that order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import NamedTuple

from hethub.cost.shapes import layer_parameters
from hethub.program.actions import Action
from hethub.program.islands import Collective, Collectives, Islands, find_collectives
from hethub.program.ownership import Ownership
from hethub.program.parts import Parts
from hethub.specs.layout import Layout, Span
from hethub.timeline.record import Kind

__all__ = [
    "GRADIENT_KINDS",
    "Exchange",
    "Gathering",
    "GradientSend",
    "Reducing",
    "Reduction",
    "Uses",
    "WeightSend",
    "plan_exchange",
    "touches",
]

GRADIENT_KINDS = (Kind.BACKWARD, Kind.BACKWARD_WEIGHT)  # the last one of a stage completes its gradients


class GradientSend(NamedTuple):
    """Slices whose gradient is complete on `source` behind an action, for one updater. A relay's are its island's sum,
    complete when the collective `reduced` (by number; else -1) is; it has no `behind`."""

    source: int
    destination: int
    behind: Action | None
    slices: tuple[int, ...]
    reduced: int = -1


class Reduction(NamedTuple):
    """One bucket of an updater: `needs` are the gradient sends (by number) to wait for before it, none twice over all
    buckets; `slices` the incoming ones that it adds, once for every sender."""

    bucket: int
    needs: tuple[int, ...]
    slices: tuple[int, ...]


class WeightSend(NamedTuple):
    """New weights of an updater's bucket for one holder, which first uses them in `first_use`; None for a relay, which
    passes them on at once."""

    bucket: int
    destination: int
    first_use: Action | None
    slices: tuple[int, ...]


class Reducing(NamedTuple):
    """A reduce-scatter; member i joins it behind its action `behind[i]`."""

    collective: Collective
    behind: tuple[Action, ...]


class Gathering(NamedTuple):
    """An all-gather: member i joins it behind the update of its bucket `bucket[i]` (-1: of none), and first uses what
    it brings in `first_use[i]`. It is `relayed` where a member gives weights that another island updates; those come
    after all that are not, behind all updates."""

    collective: Collective
    bucket: tuple[int, ...]
    first_use: tuple[Action, ...]
    relayed: bool


@dataclass(frozen=True, slots=True)
class Exchange:
    """Everything that goes over the parameter lane but norms.

    `gradients` stand in the order of each source's list; `reductions[d]`, `weights[d]` and `buckets[d]` are an
    updater's, buckets in the order of first use, reductions in that of the backward. `reducing` and `gathering` stand
    in the order in which all members join them.
    """

    reducing: tuple[Reducing, ...]
    gathering: tuple[Gathering, ...]
    gradients: tuple[GradientSend, ...]
    reductions: Mapping[int, tuple[Reduction, ...]]
    weights: Mapping[int, tuple[WeightSend, ...]]
    buckets: Mapping[int, tuple[tuple[int, ...], ...]]


class Uses(NamedTuple):
    """Per parameter (number) of one device: indices of the first action that uses it and the last that adds to its
    gradient."""

    first: dict[int, int]
    last: dict[int, int]


def touches(
    layout: Layout, spans: Mapping[int, Sequence[Span]], actions: Sequence[Action], numbers: Mapping[str, int]
) -> Uses:
    """Where a device's list uses and completes each of its parameters.

    `spans[stage]` are the layer ranges of the stage's parts, `numbers` parameters' places in the ownership table.
    """
    first_of: dict[tuple[int, int], int] = {}
    last_of: dict[tuple[int, int], int] = {}
    for index, action in enumerate(actions):
        if action.kind == Kind.FORWARD:
            first_of.setdefault((action.stage, action.part), index)
        elif action.kind in GRADIENT_KINDS:
            last_of[action.stage, action.part] = index

    def parameters(stage: int, part: int) -> Iterator[int]:
        layers = spans[stage][part] if part >= 0 else (spans[stage][0][0], spans[stage][-1][1])
        for layer in range(*layers):
            for parameter in layer_parameters(layout.model, layer):
                yield numbers[parameter.name]

    found = Uses({}, {})
    for place, index in first_of.items():  # the earliest first
        for number in parameters(*place):
            found.first.setdefault(number, index)
    for place, index in sorted(last_of.items(), key=itemgetter(1)):
        for number in parameters(*place):
            found.last[number] = index
    return found


def plan_exchange(
    ownership: Ownership,
    parts: Parts,
    layout: Layout,
    lists: Sequence[Sequence[Action]],
    islands: Islands,
) -> Exchange:
    """Decide the exchange from the pipelines' finished lists (one a device)."""
    numbers = {parameter.name: n for n, parameter in enumerate(ownership.parameters)}
    spans: dict[int, dict[int, Sequence[Span]]] = defaultdict(dict)
    for pipeline in layout.pipelines:
        for stage in pipeline.stages:
            for device in stage.devices():
                spans[device][stage.index] = parts[pipeline.index, stage.index]
    uses = {d: touches(layout, spans[d], lists[d], numbers) for d in layout.used}
    buckets = {d: _buckets(ownership, d, uses[d]) for d in layout.used}
    ready = {d: _ready(uses[d], lists[d]) for d in layout.used}
    # counted from the end of the lists, where those of unlike length meet
    reduced = find_collectives(ownership, islands, lambda d, n: ready[d][n] - len(lists[d]))
    reduced = replace(reduced, each=tuple(sorted(reduced.each, key=_by_readiness)))
    gathered = find_collectives(ownership, islands, lambda d, n: uses[d].first[n])
    gradients = _gradients(ownership, ready, lists, reduced)
    return Exchange(
        _reducing(reduced, lists),
        _gathering(gathered, buckets, lists),
        gradients,
        _reductions(ownership, gradients, buckets),
        {d: _weights(ownership, d, buckets[d], uses, lists, gathered) for d in layout.used},
        buckets,
    )


def _by_readiness(one: Collective) -> tuple[object, ...]:
    """First what is ready first at all members."""
    return (max(one.moments), one)


def _reducing(reduced: Collectives, lists: Sequence[Sequence[Action]]) -> tuple[Reducing, ...]:
    begun: dict[int, int] = {}  # device -> where it joined the latest
    found = []
    for one in reduced.each:
        for device, moment in zip(one.members, one.moments, strict=True):
            begun[device] = max(begun.get(device, 0), moment + len(lists[device]))
        found.append(Reducing(one, tuple(lists[d][begun[d]] for d in one.members)))
    return tuple(found)


def _gathering(
    gathered: Collectives,
    buckets: Mapping[int, tuple[tuple[int, ...], ...]],
    lists: Sequence[Sequence[Action]],
) -> tuple[Gathering, ...]:
    """First what is used first by any member; what is relayed comes last."""
    bucket_of = {n: bucket for own in buckets.values() for bucket, slices in enumerate(own) for n in slices}
    relays = gathered.relays
    found = []
    for one in gathered.each:
        given = [(d, n) for d, share in zip(one.members, one.shares, strict=True) for n in share]
        latest = dict.fromkeys(one.members, -1)
        for device, number in given:
            if (number, device) not in relays:
                latest[device] = max(latest[device], bucket_of[number])
        relayed = any((number, device) in relays for device, number in given)
        first_use = tuple(lists[d][moment] for d, moment in zip(one.members, one.moments, strict=True))
        found.append(Gathering(one, tuple(latest.values()), first_use, relayed))
    return tuple(sorted(found, key=lambda g: (g.relayed, min(g.collective.moments), g.collective)))


def _buckets(ownership: Ownership, device: int, uses: Uses) -> tuple[tuple[int, ...], ...]:
    """A device's own slices by the action that first uses them."""
    found: dict[int, list[int]] = defaultdict(list)
    for number in ownership.by_updater.get(device, ()):
        found[uses.first[ownership.slices[number].parameter]].append(number)
    return tuple(tuple(numbers) for _, numbers in sorted(found.items()))


def _ready(uses: Uses, actions: Sequence[Action]) -> dict[int, int]:
    """Parameter -> the action behind which its gradient may leave."""
    later = _leaving(actions)
    return {parameter: later.get(last, last) for parameter, last in uses.last.items()}


def _gradients(
    ownership: Ownership,
    ready: Mapping[int, Mapping[int, int]],
    lists: Sequence[Sequence[Action]],
    reduced: Collectives,
) -> tuple[GradientSend, ...]:
    """A device sends to all, neighbours in turn, what each action completes; then relays their islands' sums."""
    found: dict[tuple[int, int, int, int], list[int]] = defaultdict(list)
    relayed: dict[tuple[int, int, int, int], list[int]] = defaultdict(list)
    count = len(lists)
    relays = reduced.relays
    carrier = {
        (n, d): place
        for place, one in enumerate(reduced.each if relays else ())
        for d, share in zip(one.members, one.shares, strict=True)
        for n in share
    }
    for number, entry in enumerate(ownership.slices):
        updater = entry.updater
        for source in reduced.left(number, entry.holders):
            turn = (updater - source) % count
            if (number, source) in relays:
                relayed[source, carrier[number, source], turn, updater].append(number)
            elif source != updater:
                found[source, ready[source][entry.parameter], turn, updater].append(number)
    return tuple(
        GradientSend(source, updater, lists[source][behind], tuple(slices))
        for (source, behind, _, updater), slices in sorted(found.items())
    ) + tuple(
        GradientSend(source, updater, None, tuple(slices), place)
        for (source, place, _, updater), slices in sorted(relayed.items())
    )


def _leaving(actions: Sequence[Action]) -> dict[int, int]:
    """Where gradients leave that are complete behind a part of a backward, but would hold up what the stage before
    waits for: behind the whole backward. Gradients of the first stage hold up nobody."""
    whole = {
        (a.stage, a.micro_batch): n for n, a in enumerate(actions) if a.kind == Kind.BACKWARD and a.part == 0
    }
    return {
        n: whole[a.stage, a.micro_batch]
        for n, a in enumerate(actions)
        if a.kind == Kind.BACKWARD and a.part > 0 and a.stage > 0
    }


def _reductions(
    ownership: Ownership,
    gradients: Sequence[GradientSend],
    buckets: Mapping[int, tuple[tuple[int, ...], ...]],
) -> dict[int, tuple[Reduction, ...]]:
    """Buckets from the last used on, which is the first whose gradients come."""
    carriers: dict[int, list[int]] = defaultdict(list)  # slice -> numbers of the sends that carry it
    for number, send in enumerate(gradients):
        for entry in send.slices:
            carriers[entry].append(number)
    found: dict[int, tuple[Reduction, ...]] = {}
    for device, own in buckets.items():
        taken: set[int] = set()
        entries = []
        for bucket in reversed(range(len(own))):
            # in the order in which the senders complete them, all senders side by side
            needs = [
                n
                for n in dict.fromkeys(n for s in own[bucket] for n in carriers.get(s, ()))
                if n not in taken
            ]
            taken.update(needs)
            slices = tuple(s for s in own[bucket] for _ in carriers.get(s, ()))
            if slices:
                entries.append(Reduction(bucket, tuple(needs), slices))
        found[device] = tuple(entries)
    return found


def _weights(
    ownership: Ownership,
    device: int,
    buckets: Sequence[Sequence[int]],
    uses: Mapping[int, Uses],
    lists: Sequence[Sequence[Action]],
    gathered: Collectives,
) -> tuple[WeightSend, ...]:
    """Each bucket goes to all holders that no collective serves, neighbours in turn; first to relays, who have others
    waiting."""
    count = len(lists)
    relays = gathered.relays
    sends = []
    for bucket, numbers in enumerate(buckets):
        found: dict[tuple[bool, int, int], list[int]] = defaultdict(list)
        for number in numbers:
            for holder in gathered.left(number, ownership.slices[number].holders):
                if holder != device:
                    last = (number, holder) not in relays
                    found[last, (holder - device) % count, holder].append(number)
        for (last, _, holder), slices in sorted(found.items()):
            first = min(uses[holder].first[ownership.slices[n].parameter] for n in slices)
            sends.append(WeightSend(bucket, holder, lists[holder][first] if last else None, tuple(slices)))
    return tuple(sends)
