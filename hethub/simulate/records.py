"""Timeline records of a simulation, made at once from the times of all actions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from hethub.cost.compute import ComputePrice
from hethub.program.actions import Program
from hethub.simulate.columns import Columns
from hethub.simulate.kernel import COMPUTE, RECEIVE, SEND, State
from hethub.timeline.record import RECORD, Kind

__all__ = ["records_of"]

Records = npt.NDArray[np.void]
Floats = npt.NDArray[np.float64]

_AT_ONCE = 1 << 16  # rows


def records_of(program: Program, columns: Columns, state: State, steps: int, *, sub_events: bool) -> Records:
    """All records, by step, device and action; the collectives inside actions, if wanted, last."""
    t = columns.tables
    rows = np.flatnonzero(~np.isnan(np.asarray(state.end)))
    left = np.full(len(state.arrival), np.nan)
    found = np.empty(len(rows), dtype=RECORD)
    # Sends first, since receives tell when their message left. Part by part: fresh memory for columns of millions of
    # rows would take longer than filling it.
    parts = [slice(first, first + _AT_ONCE) for first in range(0, len(rows), _AT_ONCE)]
    for part in parts:
        _note_sends(left, columns, state, rows[part])
    for part in parts:
        _fill(found[part], columns, state, rows[part], left)
    found["step"] -= steps // 2
    if not sub_events:
        return found
    place = rows % max(1, len(t.code))
    works, subject = np.asarray(t.code)[place] == COMPUTE, np.asarray(t.subject)[place]
    return np.concatenate([found, *_collectives(program, columns, found, works, subject)])


def _note_sends(left: Floats, columns: Columns, state: State, rows: npt.NDArray[np.intp]) -> None:
    """Write down when the messages of some rows left: [steps x messages]."""
    t = columns.tables
    step, place = np.divmod(rows, len(t.code))
    send = np.asarray(t.code)[place] == SEND
    messages = np.asarray(t.subject)[place[send]]
    keys, starts = step[send] * len(t.message_transfer) + messages, np.asarray(state.start)[rows[send]]
    joint = np.asarray(t.transfer_senders)[np.asarray(t.message_transfer)[messages]] > 1
    left[keys[~joint]] = starts[~joint]
    np.fmax.at(left, keys[joint], starts[joint])  # a collective leaves with its last member


def _fill(found: Records, columns: Columns, state: State, rows: npt.NDArray[np.intp], left: Floats) -> None:
    """Fill the records of some rows."""
    t = columns.tables
    step, place = np.divmod(rows, len(t.code))
    code, subject = np.asarray(t.code)[place], np.asarray(t.subject)[place]
    actions, first = columns.actions[place], np.asarray(t.first)
    device = np.searchsorted(first, place, side="right") - 1
    found["step"], found["device"], found["action"] = step, device, place - first[device]
    for column, name in enumerate(("kind", "stage", "micro_batch", "message")):
        found[name] = actions[:, column]
    found["start"], found["end"] = np.asarray(state.start)[rows], np.asarray(state.end)[rows]
    found["lane"] = found["peer"] = -1
    found["sent"] = np.nan
    found["busy"] = found["overrun"] = found["bytes"] = 0
    works = code == COMPUTE
    found["busy"][works] = columns.price_busy[subject[works]]
    found["real"] = found["busy"]
    sent_in = step - np.asarray(t.carried)[place]
    for chosen, other in ((code == SEND, t.transfer_destination), (code == RECEIVE, t.transfer_source)):
        transfer = np.asarray(t.message_transfer)[subject[chosen]]
        found["lane"][chosen] = np.asarray(t.transfer_lane)[transfer]
        found["peer"][chosen] = np.asarray(other)[transfer]
        found["bytes"][chosen] = columns.bytes_told[transfer]
        found["sent"][chosen] = left[sent_in[chosen] * len(t.message_transfer) + subject[chosen]]


def _collectives(
    program: Program,
    columns: Columns,
    found: Records,
    works: npt.NDArray[np.bool_],
    subject: npt.NDArray[np.int32],
) -> Iterator[Records]:
    """The collectives of groups' actions as sub-events, each ending its segment."""
    joint = np.flatnonzero(works)
    joint = joint[np.asarray(columns.tables.price_group)[subject[joint]] >= 0]
    joint = joint[np.argsort(subject[joint], kind="stable")]
    if not len(joint):
        return
    used, firsts = np.unique(subject[joint], return_index=True)
    prices = list(program.prices.values())
    known: dict[int, tuple[Floats, Floats]] = {}  # members of a group share a price
    for number, rows in zip(used.tolist(), np.split(joint, firsts[1:]), strict=True):
        price = prices[number].price
        if id(price) not in known:
            known[id(price)] = _collective_times(price)
        offsets, lengths = known[id(price)]
        parents = found[rows]
        inside = np.repeat(parents, len(offsets))
        start = ((parents["end"] - price.seconds)[:, None] + offsets).ravel()
        inside["end"] = np.clip(start + np.tile(lengths, len(rows)), inside["start"], inside["end"])
        inside["start"] = np.clip(start, inside["start"], inside["end"])
        inside["kind"] = Kind.COLLECTIVE
        inside["busy"] = inside["real"] = 0.0
        yield inside


def _collective_times(price: ComputePrice) -> tuple[Floats, Floats]:
    """Seconds from the start of an action to each of its collectives, and how long these take."""
    slowest = np.array([max(segment.member_seconds) for segment in price.segments])
    lengths = np.array([segment.collective_seconds for segment in price.segments])
    offsets = np.cumsum(slowest) + np.cumsum(lengths) - lengths
    return offsets[lengths > 0], lengths[lengths > 0]
