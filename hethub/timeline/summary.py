"""Where every device's time went: shares of a window of steps that sum to one.

The window of steps `first` to `last` runs from the end of the step before (the latest record of any device;
the earliest start where there is no step before) to the end of `last`. Everything is attributed by time, not
by step: a device that starts the next step early works inside this window, so windows add up without loss or
overlap.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hethub.errors import InputError
from hethub.timeline.record import COMPUTE_KINDS, USEFUL_KINDS, Kind, Timeline

__all__ = [
    "BUBBLE",
    "BUSY",
    "EXPOSED",
    "IDLE",
    "RECOMPUTE",
    "UNACCOUNTED",
    "DeviceSummary",
    "StepClock",
    "TypeSummary",
    "action_seconds",
    "before_last_backward",
    "by_type",
    "gap_seconds",
    "is_kind",
    "overlap_seconds",
    "reached_ends",
    "sent_seconds",
    "sorted_actions",
    "step_numbers",
    "step_seconds",
    "step_window",
    "summarize",
]

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Records = npt.NDArray[np.void]

_BACKWARD_KINDS = frozenset({Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT})


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSummary:
    """One device over a window. The six shares `busy` to `unaccounted` are of `seconds` and sum to 1.

    busy: useful compute. recompute: forward work done again. exposed_communication: collectives inside
    compute actions, posting of sends, and waits for messages on their way. bubble: waits for messages not
    sent yet, up to the device's last backward action. idle: such waits after it, and time when the device had
    nothing of the step left to do. unaccounted: time of no action.

    `overrun_ratio` is the share of compute actions whose real work passed the emulated deadline, `real_ratio`
    the wall time of real math over the wall time of compute actions (both 0 for a device without compute
    actions), `actions` the number of actions.
    """

    device: str
    device_type: str
    seconds: float
    busy_ratio: float
    recompute_ratio: float
    exposed_communication_ratio: float
    bubble_ratio: float
    idle_ratio: float
    unaccounted_ratio: float
    overrun_ratio: float
    real_ratio: float
    actions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeSummary:
    """The mean over the `devices` devices of one type; fields as in DeviceSummary, `actions` their sum."""

    device_type: str
    devices: int
    seconds: float
    busy_ratio: float
    recompute_ratio: float
    exposed_communication_ratio: float
    bubble_ratio: float
    idle_ratio: float
    unaccounted_ratio: float
    overrun_ratio: float
    real_ratio: float
    actions: int


_RATIOS = (
    "busy_ratio",
    "recompute_ratio",
    "exposed_communication_ratio",
    "bubble_ratio",
    "idle_ratio",
    "unaccounted_ratio",
    "overrun_ratio",
    "real_ratio",
)


def summarize(timeline: Timeline, first: int, last: int) -> list[DeviceSummary]:
    """Summarize every device over steps `first` to `last`, inclusive, in the order of the timeline's devices.

    Raises InputError when a step at either end is not in the timeline or the window has no length.
    """
    actions = sorted_actions(timeline.records)
    clock = StepClock.of(actions)
    window = clock.window(first, last)
    devices = len(timeline.info.devices)
    seconds = window[1] - window[0]
    by_action = action_seconds(actions, clock, window)
    shares: Floats = np.array(
        [np.bincount(actions["device"], weights=row, minlength=devices) for row in by_action]
    )
    idle, unaccounted = gap_seconds(actions, clock, window, devices)
    shares[IDLE] += idle
    shares[UNACCOUNTED] += unaccounted
    shares /= seconds
    counts, overruns, reals = _quality(actions, first, last, devices, timeline.info.time_scale)
    return [
        DeviceSummary(
            device=name,
            device_type=device_type,
            seconds=seconds,
            busy_ratio=float(shares[BUSY, index]),
            recompute_ratio=float(shares[RECOMPUTE, index]),
            exposed_communication_ratio=float(shares[EXPOSED, index]),
            bubble_ratio=float(shares[BUBBLE, index]),
            idle_ratio=float(shares[IDLE, index]),
            unaccounted_ratio=float(shares[UNACCOUNTED, index]),
            overrun_ratio=float(overruns[index]),
            real_ratio=float(reals[index]),
            actions=int(counts[index]),
        )
        for index, (name, device_type) in enumerate(
            zip(timeline.info.devices, timeline.info.device_types, strict=True)
        )
    ]


def by_type(summaries: list[DeviceSummary]) -> list[TypeSummary]:
    """Average the devices of each type; types in the order of their first device."""
    groups: dict[str, list[DeviceSummary]] = {}
    for summary in summaries:
        groups.setdefault(summary.device_type, []).append(summary)
    return [
        TypeSummary(
            device_type=device_type,
            devices=len(members),
            seconds=members[0].seconds,
            actions=sum(member.actions for member in members),
            **{name: sum(getattr(member, name) for member in members) / len(members) for name in _RATIOS},
        )
        for device_type, members in groups.items()
    ]


def step_numbers(timeline: Timeline) -> npt.NDArray[np.int64]:
    """Return the steps that have records, ascending."""
    return np.unique(timeline.records["step"]).astype(np.int64)


def step_seconds(timeline: Timeline) -> Floats:
    """Return the seconds of each step of `step_numbers`: its end minus the end of the step before it.

    The first counts from the timeline's earliest start. shape: (steps,)
    """
    clock = StepClock.of(_without_collectives(timeline.records))
    return np.diff(clock.ends, prepend=clock.origin)


def step_window(timeline: Timeline, first: int, last: int) -> tuple[float, float]:
    """Return start and end in seconds of steps `first` to `last`. Raises InputError as `summarize` does."""
    return StepClock.of(_without_collectives(timeline.records)).window(first, last)


def sent_seconds(records: Records) -> Floats:
    """Return for every record the second at which its message was sent; NaN where that is not known.

    A receive that does not say takes the start of the send with the same (step, message), or, where that came after
    it, of the step before: new weights are received by the step after the one that sends them. Of a collective, which
    all members send, the last start counts. shape: (records,)
    """
    sent: Floats = records["sent"].astype(np.float64)
    asking = np.flatnonzero((records["kind"] == Kind.RECEIVE) & np.isnan(sent) & (records["message"] >= 0))
    sends = records[(records["kind"] == Kind.SEND) & (records["message"] >= 0)]
    if not len(asking) or not len(sends):
        return sent
    keys = _pair(sends["step"], sends["message"])
    order = np.lexsort((sends["start"], keys))

    def starts(step: npt.NDArray[np.int32]) -> Floats:
        """Of the sends of the asking records' messages in these steps, NaN where there is none."""
        wanted = _pair(step, records["message"][asking])
        match = order[np.maximum(np.searchsorted(keys[order], wanted, side="right") - 1, 0)]
        return np.where(keys[match] == wanted, sends["start"][match], np.nan)

    same, before = starts(records["step"][asking]), starts(records["step"][asking] - 1)
    late = same > records["end"][asking]
    sent[asking] = np.where(late, before, same)
    return sent


def before_last_backward(records: Records) -> Bools:
    """Tell for every record whether it starts before its device's last backward action of its step has ended.

    Where a device runs no backward action in a step (evaluation), its last forward counts. shape: (records,)
    """
    groups, group = np.unique(_pair(records["device"], records["step"]), return_inverse=True)
    backward = _last_end(records, group, len(groups), _BACKWARD_KINDS)
    forward = _last_end(records, group, len(groups), frozenset({Kind.FORWARD}))
    last = np.where(np.isneginf(backward), forward, backward)
    return np.asarray(records["start"] < last[group], dtype=np.bool_)


# --- the window -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StepClock:
    """When each step ended: `numbers` ascending, `ends` in seconds, `origin` the start of the first."""

    numbers: npt.NDArray[np.int64]
    ends: Floats
    origin: float

    @classmethod
    def of(cls, actions: Records) -> StepClock:
        """Read it from actions. Raises InputError when there is none."""
        if not len(actions):
            raise InputError("timeline: holds no action. Give the folder of a run that finished a step.")
        numbers, index = np.unique(actions["step"], return_inverse=True)
        ends = np.full(len(numbers), -np.inf)
        np.maximum.at(ends, index, actions["end"])
        origin = float(actions["start"][index == 0].min())
        return cls(numbers.astype(np.int64), np.maximum.accumulate(ends), origin)

    def end_before(self, step: npt.ArrayLike) -> Floats:
        """Return the end of the latest step before each `step`, the origin where there is none."""
        return np.asarray(np.concatenate(([self.origin], self.ends))[np.searchsorted(self.numbers, step)])

    def window(self, first: int, last: int) -> tuple[float, float]:
        """Start and end of steps `first` to `last`. Raises InputError as `summarize` does."""
        for step in (first, last):
            if step not in self.numbers:
                low, high = self.numbers[0], self.numbers[-1]
                raise InputError(f"step {step}: not in the timeline. Choose from {low} to {high}.")
        begin = float(self.end_before(first))
        end = float(self.ends[np.searchsorted(self.numbers, last)])
        if not end > begin:
            raise InputError(f"steps {first} to {last}: take no time. Give the first step before the last.")
        return begin, end


def _without_collectives(records: Records) -> Records:
    """Drop the sub-events, whose time is already inside their compute action."""
    return np.asarray(records[records["kind"] != Kind.COLLECTIVE])


def sorted_actions(records: Records) -> Records:
    """Return the actions by device, then start, then end."""
    actions = _without_collectives(records)
    return actions[np.lexsort((actions["end"], actions["start"], actions["device"]))]


# --- the shares -------------------------------------------------------------------------------------------

BUSY, RECOMPUTE, EXPOSED, BUBBLE, IDLE, UNACCOUNTED = range(6)


def action_seconds(actions: Records, clock: StepClock, window: tuple[float, float]) -> Floats:
    """Seconds of the window inside each of the sorted actions, by share. shape: (6 shares, actions)"""
    start, end = actions["start"], actions["end"]
    begin = np.clip(
        reached_ends(actions), start, end
    )  # where two actions overlap, the earlier one has the time
    inside = overlap_seconds(begin, end, window)
    shares = np.zeros((6, len(actions)))

    length = end - start
    own = inside * np.clip(_over(actions["busy"], length), 0.0, 1.0)
    useful, compute = is_kind(actions, USEFUL_KINDS), is_kind(actions, COMPUTE_KINDS)
    again = is_kind(actions, {Kind.RECOMPUTE})
    send, wait = is_kind(actions, {Kind.SEND}), is_kind(actions, {Kind.RECEIVE})
    shares[BUSY, useful] = own[useful]
    shares[RECOMPUTE, again] = own[again]
    shares[EXPOSED, compute] = (inside - own)[compute]
    shares[EXPOSED, send] = inside[send]

    sent = sent_seconds(actions)
    # A message that nobody is known to have sent explains none of the wait.
    arrive = np.clip(np.where(np.isnan(sent), end, sent), begin, end)
    # A wait for the next step may begin in this one: until this one ends, the device has nothing left to do.
    early = np.clip(clock.end_before(actions["step"]), begin, arrive)
    filling = wait & before_last_backward(actions)
    draining = wait & ~filling
    unsent = overlap_seconds(early, arrive, window)
    shares[EXPOSED, wait] = overlap_seconds(arrive, end, window)[wait]
    shares[IDLE, wait] = overlap_seconds(begin, early, window)[wait]
    shares[BUBBLE, filling] = unsent[filling]
    shares[IDLE, draining] += unsent[draining]
    return shares


def gap_seconds(
    actions: Records, clock: StepClock, window: tuple[float, float], devices: int
) -> tuple[Floats, Floats]:
    """Idle and unaccounted seconds of the window inside none of the sorted `actions`. shapes: (devices,)

    Before a device's first action and after its last, and between its part of a step and the end of that
    step, it is idle. What remains is unaccounted.
    """
    device, step, start = actions["device"], actions["step"], actions["start"]
    opens = np.flatnonzero(np.diff(device, prepend=-1))
    same_step = np.diff(step, prepend=-1) == 0
    same_step[opens] = False
    reached = reached_ends(actions)
    idle_until = np.where(same_step, reached, clock.end_before(step))
    idle_until[opens] = start[opens]
    idle_until = np.clip(idle_until, reached, np.maximum(start, reached))

    idle = np.full(devices, window[1] - window[0])
    unaccounted = np.zeros(devices)
    if len(opens):
        ends = np.maximum.reduceat(actions["end"], opens)
        idle[device[opens]] -= overlap_seconds(start[opens], ends, window)
    between = overlap_seconds(reached, idle_until, window)
    between[opens] = 0.0  # counted already: from the window's start to the device's first action
    _add(idle, device, between)
    _add(unaccounted, device, overlap_seconds(idle_until, start, window))
    return idle, unaccounted


def reached_ends(actions: Records) -> Floats:
    """For every sorted action, the latest end among the device's earlier ones (its own start for the first).

    shape: (actions,)
    """
    ends = np.sort(actions["end"])
    # Ranks instead of times, with the device in front: one running maximum serves all devices, exactly.
    rank = np.searchsorted(ends, actions["end"]) + actions["device"].astype(np.int64) * len(ends)
    latest = ends[np.maximum.accumulate(rank) % len(ends)]
    reached = np.concatenate(([0.0], latest[:-1]))
    opens = np.diff(actions["device"], prepend=-1) != 0
    reached[opens] = actions["start"][opens]
    return reached


def _quality(
    actions: Records, first: int, last: int, devices: int, time_scale: float
) -> tuple[npt.NDArray[np.int64], Floats, Floats]:
    """Return per device the number of actions and the shares of overruns and of real math in these steps."""
    chosen = actions[(actions["step"] >= first) & (actions["step"] <= last)]
    counts = np.bincount(chosen["device"], minlength=devices)
    compute = chosen[is_kind(chosen, COMPUTE_KINDS)]
    device = compute["device"]
    number = np.bincount(device, minlength=devices)
    overruns = np.bincount(device, weights=compute["overrun"] > 0, minlength=devices)
    padded = np.bincount(device, weights=compute["end"] - compute["start"], minlength=devices) * time_scale
    real = np.bincount(device, weights=compute["real"], minlength=devices)
    return counts, _over(overruns, number), _over(real, padded)


# --- arrays -----------------------------------------------------------------------------------------------


def _over(numerator: npt.ArrayLike, denominator: npt.ArrayLike) -> Floats:
    """Divide; 0 where the denominator is 0."""
    below = np.asarray(denominator, dtype=np.float64)
    quotient = np.zeros_like(below)
    np.divide(numerator, below, out=quotient, where=below > 0)
    return quotient


def is_kind(records: Records, kinds: Iterable[Kind]) -> Bools:
    """Which records are of one of these kinds. shape: (records,)"""
    table = np.zeros(256, dtype=np.bool_)
    table[[int(kind) for kind in kinds]] = True
    return np.asarray(table[records["kind"]])


def _add(total: Floats, device: npt.NDArray[np.int32], seconds: Floats) -> None:
    total += np.bincount(device, weights=seconds, minlength=len(total))


def overlap_seconds(start: Floats, end: Floats, window: tuple[float, float]) -> Floats:
    """Seconds of each [start, end] inside the window."""
    inside: Floats = np.maximum(np.minimum(end, window[1]) - np.maximum(start, window[0]), 0.0)
    return inside


def _pair(high: npt.NDArray[np.int32], low: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Join two columns of numbers from 0 to 2**31 - 1 into one key."""
    return (high.astype(np.int64) << 32) | low.astype(np.int64)


def _last_end(records: Records, group: npt.NDArray[np.intp], groups: int, kinds: frozenset[Kind]) -> Floats:
    """Return the latest end among the records of `kinds` in each group, -inf where there is none."""
    ends = np.full(groups, -np.inf)
    chosen = is_kind(records, kinds)
    np.maximum.at(ends, group[chosen], records["end"][chosen])
    return ends
