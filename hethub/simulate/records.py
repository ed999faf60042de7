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


def records_of(program: Program, columns: Columns, state: State, steps: int, *, sub_events: bool) -> Records:
    """All records, by step, device and action; the collectives inside actions, if wanted, last."""
    t = columns.tables
    count = len(t.code)
    start, end = np.asarray(state.start), np.asarray(state.end)
    rows = np.flatnonzero(~np.isnan(end))
    step, place = np.divmod(rows, max(1, count))
    actions = columns.actions[place]
    code, subject = np.asarray(t.code)[place], np.asarray(t.subject)[place]
    first = np.asarray(t.first)
    device = np.repeat(np.arange(len(first) - 1, dtype=np.int32), np.diff(first))[place]
    found = np.zeros(len(rows), dtype=RECORD)
    found["step"] = step - steps // 2
    found["device"], found["action"] = device, place - first[device]
    found["kind"], found["stage"], found["micro_batch"] = actions[:, 0], actions[:, 1], actions[:, 2]
    found["message"] = actions[:, 3]
    found["lane"] = found["peer"] = -1
    found["start"], found["end"] = start[rows], end[rows]
    found["sent"] = np.nan
    works = code == COMPUTE
    found["busy"][works] = columns.price_busy[subject[works]]
    found["real"] = found["busy"]
    _add_messages(found, columns, code, subject, step - np.asarray(t.carried)[place])
    if not sub_events:
        return found
    return np.concatenate([found, *_collectives(program, columns, found, works, subject)])


def _add_messages(
    found: Records,
    columns: Columns,
    code: npt.NDArray[np.int8],
    subject: npt.NDArray[np.int32],
    sent_in: npt.NDArray[np.int64],
) -> None:
    """Fill the columns that only sends and receives have; `sent_in` is the step in which each message left."""
    t = columns.tables
    messages = len(t.message_transfer)
    left = np.full((int(sent_in.max(initial=0)) + 1) * messages, np.nan)
    send = code == SEND
    left[sent_in[send] * messages + subject[send]] = found["start"][send]
    for chosen, other in ((send, t.transfer_destination), (code == RECEIVE, t.transfer_source)):
        transfer = np.asarray(t.message_transfer)[subject[chosen]]
        found["lane"][chosen] = np.asarray(t.transfer_lane)[transfer]
        found["peer"][chosen] = np.asarray(other)[transfer]
        found["bytes"][chosen] = np.asarray(t.transfer_bytes)[transfer]
        found["sent"][chosen] = left[sent_in[chosen] * messages + subject[chosen]]


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
