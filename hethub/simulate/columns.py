"""A program as columns: what the event loop reads, made once in a few passes over the lists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hethub.cost.graph import CostGraph
from hethub.program.actions import CARRIED, Action, Program, Transfer, What
from hethub.simulate.kernel import COMPUTE, RECEIVE, SEND, Rules, State, Tables
from hethub.timeline.record import Kind, Lane

if TYPE_CHECKING:
    from hethub.cost.profiles.curve import LinkFit

__all__ = ["Columns", "columns_of", "new_state"]

_FIELDS = len(Action._fields)
_IN_PLACE = (What.REDUCE, What.WEIGHTS)
_BELL_BYTES = 1
MessageWork = Callable[[int], "tuple[LinkFit, LinkFit] | None"]
Touch = Callable[[int, float], float]


@dataclass(frozen=True, slots=True)
class Columns:
    """`tables` hold arrays, one entry a row of what their names say (see `kernel.Tables`); the rest is what records
    need beside them."""

    tables: Tables
    actions: npt.NDArray[np.int32]  # [actions, fields of Action]
    price_busy: npt.NDArray[np.float64]
    bytes_told: npt.NDArray[np.int64]  # [transfers] of records: what is read in place counts as moved
    price_numbers: dict[tuple[int, int, Kind, int], int]
    channels: int
    cells: int


def columns_of(
    program: Program,
    graph: CostGraph,
    work: MessageWork = lambda device: None,
    touch: Touch = lambda device, size: 0.0,
) -> Columns:
    """Flatten a program and the paths that its transfers take; `work(device)` is what messages take of a device itself,
    sent and received, None where nothing, `touch(device, bytes)` the seconds of memory traffic."""
    actions = _flat(chain.from_iterable(program.devices), _FIELDS)
    kind, message = actions[:, 0], actions[:, 3]
    code = np.full(len(actions), COMPUTE, dtype=np.int8)
    code[kind == Kind.SEND] = SEND
    code[kind == Kind.RECEIVE] = RECEIVE
    messages = _flat(program.messages, 2)[:, 0].astype(np.int64)
    weights = np.fromiter((t.what in CARRIED for t in program.transfers), np.bool_)
    carried = kind == Kind.GATHER
    receives = np.flatnonzero(code == RECEIVE)
    carried[receives] = weights[messages[message[receives]]]
    lengths = np.fromiter((len(own) for own in program.devices), np.int64)
    prices = _Prices(program)
    subject = message.copy()
    works = np.flatnonzero(code == COMPUTE)
    devices = np.repeat(np.arange(len(lengths)), lengths)[works]
    subject[works] = prices.find(devices, actions[works])
    ways = _Ways(program, graph, work, touch)
    tables: dict[str, Any] = {
        "first": np.concatenate(([0], np.cumsum(lengths))),
        "code": code,
        "carried": carried.astype(np.int8),
        "subject": subject,
        "price_seconds": prices.seconds,
        "price_group": prices.group,
        "group_first": prices.group_first,
        "group_member": prices.group_member,
        "message_transfer": messages,
        **ways.tables,
    }
    return Columns(
        tables=Tables(**tables),
        actions=actions,
        price_busy=prices.busy,
        bytes_told=ways.bytes_told,
        price_numbers={key: number for number, key in enumerate(program.prices)},
        channels=ways.channels,
        cells=graph.cell_count,
    )


def new_state(columns: Columns, rules: Rules) -> State:
    """The state before the first event, as arrays."""
    t = columns.tables
    devices, keys = len(t.first) - 1, rules.steps * len(t.message_transfer)
    rows, groups = rules.steps * len(t.code), len(t.group_first) - 1
    # Only links that are shared know of channels' cells, and only then are these columns of any length.
    channels, cells = (columns.channels, columns.cells) if rules.sharing else (1, 1)
    slots = len(t.slot_channel) if rules.sharing else 1

    def full(count: int, value: float, dtype: type = np.int64) -> Any:
        return np.full(count, value, dtype=dtype)

    return State(
        at=np.asarray(t.first[:-1]).copy(),  # type: ignore[arg-type]
        step=full(devices, 0),
        since=full(devices, 0, float),
        blocked=full(devices, 0),
        until=full(devices, 0, float),
        ends=full(rules.steps * devices, 0, float),
        start=full(rows, np.nan, float),
        end=full(rows, np.nan, float),
        arrival=full(keys, -1, float),
        waiting=full(keys, -1),
        waiting_next=full(devices, -1),
        joined=full(keys, 0),
        group_count=full(groups, 0),
        group_start=full(groups, 0, float),
        unread=full(columns.channels, 0),
        held=full(columns.channels, -1),
        free_at=full(columns.cells, 0, float),
        carrying=full(channels, -1),
        hops_left=full(channels, 0),
        queue_head=full(channels, -1),
        queue_tail=full(channels, -1),
        queue_next=full(keys if rules.sharing else 1, -1),
        work_done=full(cells, 0, float),
        updated=full(cells, 0, float),
        sharers=full(cells, 0),
        due=full(cells, -1, float),
        event=full(cells, -1, float),
        head=full(cells, -1),
        least=full(cells, 0, float),
        slot_next=full(slots, -1),
        slot_target=full(slots, 0, float),
    )


def _flat(rows: Iterable[Sequence[int]], width: int) -> npt.NDArray[np.int32]:
    return np.fromiter(chain.from_iterable(rows), np.int32).reshape(-1, width)


class _Prices:
    """Prices by number, in the order of `Program.prices`, and the groups that share them."""

    def __init__(self, program: Program) -> None:
        entries = program.prices.values()
        self.seconds = np.fromiter((entry.price.seconds for entry in entries), np.float64)
        self.busy = np.fromiter((entry.busy_seconds for entry in entries), np.float64)
        members: dict[tuple[int, ...], int] = {}
        self.group = np.fromiter(
            (
                -1
                if stage < 0 or entry.alone
                else members.setdefault(program.groups[device, stage], len(members))
                for (device, stage, _, _), entry in program.prices.items()
            ),
            np.int64,
        )
        self.group_member = np.fromiter(chain.from_iterable(members), np.int64)
        self.group_first = np.cumsum([0, *map(len, members)], dtype=np.int64)
        keys = _flat(program.prices, 4).astype(np.int64)
        self._low = keys.min(axis=0, initial=0)
        self._span = keys.max(axis=0, initial=0) - self._low + 1
        coded = self._coded(keys)
        self._order = np.argsort(coded)
        self._sorted, self._keys = coded[self._order], keys[self._order]

    def _coded(self, keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """(device, stage, kind, part) as one number."""
        code = np.zeros(len(keys), dtype=np.int64)
        for column, (low, span) in enumerate(zip(self._low, self._span, strict=True)):
            code = code * span + (keys[:, column] - low)
        return code

    def find(self, devices: npt.NDArray[np.int64], actions: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """The number of each compute action's price. Raises KeyError where there is none."""
        keys = np.stack([devices, actions[:, 1], actions[:, 0], actions[:, 4]], axis=1)
        if not len(keys):
            return np.zeros(0, dtype=np.int32)
        place = np.minimum(np.searchsorted(self._sorted, self._coded(keys)), max(0, len(self._sorted) - 1))
        absent = (self._keys[place] != keys).any(axis=1)
        if absent.any():
            raise KeyError(f"no price of {keys[absent][0].tolist()} (device, stage, kind, part)")
        return self._order[place].astype(np.int32)


class _Ways:
    """Transfers, the channels that they stand on and the paths that these take."""

    def __init__(self, program: Program, graph: CostGraph, work: MessageWork, touch: Touch) -> None:
        transfers = program.transfers
        facts = np.fromiter(
            chain.from_iterable((t.source, t.destination, t.lane, t.bytes) for t in transfers), np.int64
        )
        source, destination, lane, told = np.ascontiguousarray(facts.reshape(-1, 4).T)
        size = told.copy()
        if graph.shares_memory:
            bells = [t.what in _IN_PLACE and graph.reads_in_place(t.source, t.destination) for t in transfers]
            size[bells] = _BELL_BYTES
        self.bytes_told = told
        ends = source * len(program.devices) + destination
        rings: dict[tuple[int, ...], int] = {}  # members -> what stands for their ends, below 0
        senders = np.ones(len(transfers), dtype=np.int64)
        for number in np.flatnonzero(source < 0).tolist():
            members = transfers[number].members
            ends[number] = rings.setdefault(members, -1 - len(rings))
            senders[number] = len(members)
        pairs, path = np.unique(ends, return_inverse=True)
        lanes, channel = np.unique(path * len(Lane) + lane, return_inverse=True)
        self.channels = max(1, len(lanes))
        members_of = {end: members for members, end in rings.items()}
        paths = [
            graph.path(*divmod(pair, len(program.devices))) if pair >= 0 else graph.ring(members_of[pair])
            for pair in pairs.tolist()
        ]
        cells = [cell for found in paths for cell in found.cells]
        lengths = np.array([len(found.cells) for found in paths], dtype=np.int64)
        slots = lengths[lanes // len(Lane)]
        self.tables = {
            "transfer_path": path,
            "transfer_channel": channel,
            "transfer_lane": lane,
            "transfer_source": source,
            "transfer_destination": destination,
            "transfer_senders": senders,
            "transfer_bytes": size.astype(np.float64),
            "transfer_send_seconds": _work_seconds(work, 0, source, size),
            "transfer_receive_seconds": _work_seconds(work, 1, destination, size),
            "path_first": np.concatenate(([0], np.cumsum(lengths))),
            "path_cell": np.array([cell for cell, _ in cells], dtype=np.int64),
            "path_bandwidth": np.array([bandwidth for _, bandwidth in cells], dtype=np.float64),
            "path_latency": np.array([found.latency_seconds for found in paths], dtype=np.float64),
            "channel_slot": np.concatenate(([0], np.cumsum(slots))),
            "slot_channel": np.repeat(np.arange(len(lanes)), slots),
        }
        for number in np.flatnonzero(source < 0).tolist():
            found_seconds = _joint_seconds(transfers[number], touch)
            for column, seconds in zip(
                ("transfer_send_seconds", "transfer_receive_seconds"), found_seconds, strict=True
            ):
                self.tables[column][number] = seconds


def _joint_seconds(transfer: Transfer, touch: Touch) -> tuple[float, float]:
    """What a collective takes of a member itself, sent and received: its shares are copied together, its own sum into
    place. What all-gathers bring, GATHER puts into place."""
    count, device = len(transfer.members), transfer.members[0]
    share = transfer.bytes / (count - 1)
    if transfer.what == What.REDUCE_SCATTER:
        return touch(device, 2 * count * share), touch(device, 2 * share)
    return touch(device, 2 * share), 0.0


def _work_seconds(
    work: MessageWork, end: int, device: npt.NDArray[np.int64], size: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """What each transfer takes of the device at one end of it."""
    found = np.zeros(len(size))
    for one in sorted(set(device.tolist())):
        both = work(one) if one >= 0 else None  # a collective's end
        if both is not None:
            own = device == one
            found[own] = both[end].latency_seconds + size[own] / both[end].bandwidth_bytes_per_second
    return found
