"""The waterfall of lost time: from all that the devices could have computed in a step down to what they did.

Every second of every device in a window of steps goes to one cause; devices are weighed by their speed, so that an
idle second of a fast device weighs as much as the work that it would have done. The causes add up to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hethub.timeline.record import Kind, Lane, Timeline
from hethub.timeline.summary import (
    StepClock,
    gap_seconds,
    is_kind,
    overlap_seconds,
    reached_ends,
    sent_seconds,
    sorted_actions,
)

__all__ = ["CAUSES", "Waterfall", "waterfall"]

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.intp]
Records = npt.NDArray[np.void]

CAUSES = {
    "busy": "forward and backward work",
    "recompute": "forward work done again",
    "rounding": "less work than the busiest device has, but no layer, row or micro-batch more would fit beside it",
    "imbalance": "less work than the busiest device has, by whole layers, rows or micro-batches",
    "bubble": "waits inside the pipeline for a message that is not sent yet",
    "collectives": "tensor-parallel collectives and waits for members",
    "activations": "activations on their way, and handling them",
    "gradients": "gradients of activations on their way, and handling them",
    "reduction": "weight gradients: waiting for them, adding them up",
    "norm": "the gradient norm: waiting for it, computing it",
    "update": "the optimizer",
    "gather": "new weights: waiting for them, taking them over",
    "idle": "nothing of the step left to do",
    "unaccounted": "overhead that no price explains, such as waking up late",
}
"""Where time goes, in the order of the waterfall, and what each cause means."""

_NAMES = tuple(CAUSES)
_AT = {name: place for place, name in enumerate(_NAMES)}
_BACKWARD = frozenset({Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT})
_PIPELINE = _BACKWARD | {Kind.FORWARD, Kind.RECOMPUTE}
_OF_KIND = {Kind.REDUCE: "reduction", Kind.NORM: "norm", Kind.UPDATE: "update", Kind.GATHER: "gather"}
# What a message on the parameter lane carries, by the latest of these actions before it on the same device.
_CARRIED_AFTER = {
    **dict.fromkeys(_BACKWARD, "reduction"),
    Kind.REDUCE: "reduction",
    Kind.NORM: "norm",
    Kind.UPDATE: "gather",
    Kind.GATHER: "gather",
}
_WAITED_FOR = ("bubble", "reduction", "norm", "gather")


@dataclass(frozen=True, slots=True, kw_only=True)
class Waterfall:
    """Shares of a window of steps, one for each cause in `CAUSES`; each adds up to 1.

    `total` weighs devices by their speed, `devices` has one mapping per device in the timeline's order.
    """

    seconds: float
    total: dict[str, float]
    devices: tuple[dict[str, float], ...]

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"seconds": self.seconds, "total": self.total, "devices": list(self.devices)}


def waterfall(
    timeline: Timeline,
    first: int,
    last: int,
    speeds: Sequence[float] | None = None,
    pieces: Sequence[float] | None = None,
) -> Waterfall:
    """Attribute the time of steps `first` to `last`, inclusive.

    `speeds` are the devices' relative speeds in the timeline's order (None: all alike). A message counts by what it
    carries; the wait for it is its own cause once it is sent, and the bubble, or the tail's cause, before. Time in
    which a device waits although it has less work than the busiest one is imbalance first, and of that rounding what
    is left when as many whole `pieces` of work (seconds of a step, by device) as fit are taken off; without `pieces`
    nothing is called rounding.
    Raises InputError when a step at either end is not in the timeline or the window has no length.
    """
    actions = sorted_actions(timeline.records)
    clock = StepClock.of(actions)
    window = clock.window(first, last)
    devices = len(timeline.info.devices)
    shares = np.zeros((len(_NAMES), devices))
    waits = np.zeros((len(_NAMES), devices))
    _add_compute(shares, actions, timeline, window)
    _add_messages(shares, waits, actions, clock, window)
    idle, unaccounted = gap_seconds(actions, clock, window, devices)
    waits[_AT["idle"]] += idle
    shares[_AT["unaccounted"]] += unaccounted
    steps = last - first + 1
    _move_imbalance(shares, waits, np.zeros(devices) if pieces is None else steps * np.asarray(pieces))
    shares = (shares + waits) / (window[1] - window[0])
    weights = np.ones(devices) if speeds is None else np.asarray(speeds, dtype=np.float64)
    total = shares @ (weights / weights.sum())
    return Waterfall(
        seconds=window[1] - window[0],
        total=_named(total),
        devices=tuple(_named(column) for column in shares.T),
    )


def _named(shares: Floats) -> dict[str, float]:
    return {name: float(share) for name, share in zip(_NAMES, shares, strict=True)}


def _add_compute(shares: Floats, actions: Records, timeline: Timeline, window: tuple[float, float]) -> None:
    """Compute actions: own work by kind; what is left of one is its collectives, if it has any, or lateness."""
    start, end = actions["start"], actions["end"]
    begin = np.clip(reached_ends(actions), start, end)
    inside = overlap_seconds(begin, end, window)
    length = np.maximum(end - start, np.finfo(np.float64).tiny)
    own = inside * np.clip(actions["busy"] / length, 0.0, 1.0)
    joint = _in_groups(actions, timeline)
    pipeline = is_kind(actions, _PIPELINE)
    again = is_kind(actions, {Kind.RECOMPUTE})
    _add(shares, "busy", actions, own, pipeline & ~again)
    _add(shares, "recompute", actions, own, again)
    _add(shares, "collectives", actions, inside - own, pipeline & joint)
    _add(shares, "unaccounted", actions, inside - own, pipeline & ~joint)
    for kind, cause in _OF_KIND.items():
        _add(shares, cause, actions, inside, is_kind(actions, {kind}))


def _add_messages(
    shares: Floats, waits: Floats, actions: Records, clock: StepClock, window: tuple[float, float]
) -> None:
    """Sends and receives, by what they carry; waits for what is not sent yet go to `waits`."""
    start, end = actions["start"], actions["end"]
    begin = np.clip(reached_ends(actions), start, end)
    send, wait = is_kind(actions, {Kind.SEND}), is_kind(actions, {Kind.RECEIVE})
    sent = sent_seconds(actions)
    # A message that nobody is known to have sent explains none of the wait.
    gone = np.clip(np.where(np.isnan(sent), end, sent), begin, end)
    # A wait for the next step may begin in this one: until this one ends, the device has nothing left to do.
    early = np.clip(clock.end_before(actions["step"]), begin, gone)
    underway = np.where(send, overlap_seconds(begin, end, window), overlap_seconds(gone, end, window))
    unsent = overlap_seconds(early, gone, window)
    _add(waits, "idle", actions, overlap_seconds(begin, early, window), wait)
    for cause, chosen in _contents(actions).items():
        _add(shares, cause, actions, underway, chosen & (send | wait))
        _add(waits, cause if cause in _WAITED_FOR else "bubble", actions, unsent, chosen & wait)


def _contents(actions: Records) -> dict[str, Bools]:
    """For every cause, which sends and receives carry what it is about.

    Activations go with forward actions, which receives precede and sends follow; their gradients with backward ones.
    """
    parameters = actions["lane"] == Lane.PARAMETERS
    send = is_kind(actions, {Kind.SEND})
    before, after = _neighbour(actions, _PIPELINE, back=True), _neighbour(actions, _PIPELINE, back=False)
    forward = np.where(send, before, after) == Kind.FORWARD
    found = {"activations": ~parameters & forward, "gradients": ~parameters & ~forward}
    latest = _neighbour(actions, frozenset(_CARRIED_AFTER), back=True)
    # Before the first of them, in a timeline that begins with a step, weights of the step before arrive.
    for cause in ("reduction", "norm", "gather"):
        kinds = [int(kind) for kind, carried in _CARRIED_AFTER.items() if carried == cause]
        chosen = np.isin(latest, kinds) | ((latest < 0) if cause == "gather" else False)
        found[cause] = parameters & chosen
    return found


def _neighbour(actions: Records, kinds: frozenset[Kind], *, back: bool) -> npt.NDArray[np.int64]:
    """The kind of the nearest action of `kinds` before (after) each action on its device; -1 where there is none."""
    if not back:
        return _neighbour(actions[::-1], kinds, back=True)[::-1]
    place = np.where(is_kind(actions, kinds), np.arange(len(actions)), -1)
    nearest = np.maximum.accumulate(place) if len(place) else place
    same = (nearest >= 0) & (actions["device"][nearest] == actions["device"])
    return np.where(same, actions["kind"][nearest].astype(np.int64), -1)


def _in_groups(actions: Records, timeline: Timeline) -> Bools:
    """Which actions are of a stage that the device computes together with others: one in which a collective stands.

    A prediction may leave collectives out of its records, but never lets an action end late.
    """
    if timeline.info.origin == "predicted":
        return np.ones(len(actions), dtype=np.bool_)
    inside = timeline.records[timeline.records["kind"] == Kind.COLLECTIVE]
    return np.isin(_place(actions), np.unique(_place(inside)))


def _place(records: Records) -> npt.NDArray[np.int64]:
    """Device and stage as one number."""
    return np.asarray((records["device"].astype(np.int64) << 16) + records["stage"])


def _move_imbalance(shares: Floats, waits: Floats, pieces: Floats) -> None:
    """Call imbalance, or rounding, what a device waits because it has less to compute than the busiest one, while that
    works."""
    work = shares[_AT["busy"]] + shares[_AT["recompute"]]
    spare = work.max(initial=0.0) - work
    fit = np.floor(spare / np.where(pieces > 0, pieces, np.inf) + 1e-9)  # sums of times are not exact
    rest = np.where(pieces > 0, np.maximum(0.0, spare - fit * pieces), 0.0)
    for cause in ("bubble", "reduction", "norm", "gather", "idle"):
        moved = np.minimum(spare, waits[_AT[cause]])
        waits[_AT[cause]] -= moved
        shares[_AT["imbalance"]] += moved
        spare = spare - moved
    rounding = np.minimum(rest, shares[_AT["imbalance"]])
    shares[_AT["imbalance"]] -= rounding
    shares[_AT["rounding"]] += rounding


def _add(shares: Floats, cause: str, actions: Records, seconds: Floats, chosen: Bools) -> None:
    shares[_AT[cause]] += np.bincount(
        actions["device"][chosen], weights=seconds[chosen], minlength=shares.shape[1]
    )
