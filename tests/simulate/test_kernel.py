"""The event loop: compiled as interpreted, links that queue and links that are shared, sends that block, deadlocks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hethub.cost.graph import reserve
from hethub.program.actions import What
from hethub.program.prove import ProgramError
from hethub.simulate import kernel
from hethub.simulate.columns import Columns, columns_of, new_state
from hethub.simulate.engine import simulate
from hethub.simulate.kernel import COMPUTE, RECEIVE, SEND, Rules, State, Tables, run_events
from hethub.specs.plan import Plan
from hethub.timeline.record import Kind, Lane
from tests.plan_strategies import NAMED_PLANS, compile_plan, compute_model, islands, plans

rules = st.builds(
    Rules,
    steps=st.sampled_from([1, 3]),
    buffers=st.sampled_from([-1, -1, 1, 2, 8]),
    sharing=st.booleans(),
    overlap_slowdown=st.sampled_from([0.0, 0.0, 0.1]),
)


@settings(max_examples=150)
@given(plan=plans(), rules=rules, where=st.just({}) | islands())
def test_compiled_and_interpreted_give_the_same_bits(plan: Plan, rules: Rules, where: dict[int, int]) -> None:
    """Seeded bug it caught: compiled with fastmath, which may reorder sums."""
    program, compute = compile_plan(plan, islands=where), compute_model(plan)
    found = []
    for loop in ("compiled", "interpreted"):
        try:
            done = simulate(program, compute, steps=rules.steps, rules=rules, loop=loop)  # type: ignore[arg-type]
        except ProgramError as error:
            found.append((str(error), b""))
            continue
        assert done.timeline is not None
        found.append((str(done.step_seconds), done.timeline.records.tobytes()))
    assert found[0] == found[1]


@settings(max_examples=100)
@given(plan=plans(), data=st.data())
def test_links_queue_by_the_rule_that_emulated_links_follow(plan: Plan, data: st.DataObject) -> None:
    """Seeded bug it caught: a part of the latency counted into the cells' time."""
    program, graph = compile_plan(plan), compute_model(plan).graph
    if not program.transfers:
        return
    columns = columns_of(program, graph)
    state = new_state(columns, Rules())
    free_at = [0.0] * graph.cell_count
    picks = st.tuples(st.integers(0, len(program.transfers) - 1), st.floats(0, 1))
    for number, now in data.draw(st.lists(picks, min_size=1, max_size=20)):
        transfer = program.transfers[number]
        path = graph.path(transfer.source, transfer.destination)
        expected = reserve(free_at, path, columns.tables.transfer_bytes[number], now)
        assert kernel.reserve(columns.tables, state, number, now) == expected


# -- programs made by hand: (code, subject) lists, messages as (source, destination, bytes, cells) -------------------

Lists = list[list[tuple[int, int]]]
Messages = list[tuple[int, int, float, list[int]]]


def run(
    lists: Lists,
    messages: Messages,
    bandwidths: list[float],
    rules: Rules,
    seconds: list[float] | None = None,
    lanes: list[Lane] | None = None,
    latencies: list[float] | None = None,
    works: list[float] | None = None,
) -> tuple[Tables, State]:
    """Run lists whose compute actions are single devices' work of `seconds`; every pair of devices has one channel."""
    flat = [entry for own in lists for entry in own]
    cells = [cell for message in messages for cell in message[3]]
    pairs = list(dict.fromkeys((source, destination) for source, destination, _, _ in messages))
    hops = {(source, destination): len(way) for source, destination, _, way in messages}
    tables = Tables(
        first=np.cumsum([0, *map(len, lists)]).tolist(),
        code=[code for code, _ in flat],
        carried=[0] * len(flat),
        subject=[subject for _, subject in flat],
        price_seconds=seconds or [],
        price_group=[-1] * len(seconds or []),
        group_first=[0],
        group_member=[],
        message_transfer=list(range(len(messages))),
        transfer_path=list(range(len(messages))),
        transfer_channel=[pairs.index((source, destination)) for source, destination, _, _ in messages],
        transfer_lane=[int(lane) for lane in lanes or [Lane.ACTIVATIONS] * len(messages)],
        transfer_source=[message[0] for message in messages],
        transfer_destination=[message[1] for message in messages],
        transfer_senders=[1] * len(messages),
        transfer_bytes=[message[2] for message in messages],
        transfer_send_seconds=works or [0.0] * len(messages),
        transfer_receive_seconds=works or [0.0] * len(messages),
        path_first=np.cumsum([0, *(len(message[3]) for message in messages)]).tolist(),
        path_cell=cells,
        path_bandwidth=[bandwidths[cell] for cell in cells],
        path_latency=latencies or [0.5] * len(messages),
        channel_slot=np.cumsum([0, *(hops[pair] for pair in pairs)]).tolist(),
        slot_channel=[number for number, pair in enumerate(pairs) for _ in range(hops[pair])],
    )
    columns = Columns(
        tables=tables,
        actions=np.zeros((0, 5), dtype=np.int32),
        price_busy=np.zeros(0),
        bytes_told=np.zeros(0, dtype=np.int64),
        price_numbers={},
        channels=len(pairs),
        cells=len(bandwidths),
    )
    state = State(*(column.tolist() for column in new_state(columns, rules)))  # type: ignore[attr-defined]
    run_events(tables, state, rules)
    return tables, state


def arrivals(
    messages: Messages, bandwidths: list[float], starts: list[float], *, sharing: bool
) -> list[float]:
    """When messages arrive of which each is sent at its own time, by a device of its own."""
    senders: Lists = [[(COMPUTE, i), (SEND, i)] for i in range(len(messages))]
    takers: Lists = [[(RECEIVE, i)] for i in range(len(messages))]
    _, state = run([*senders, *takers], messages, bandwidths, Rules(sharing=sharing), starts)
    return state.arrival


def test_two_transfers_share_a_link_or_queue_for_it() -> None:
    messages: Messages = [(0, 2, 100.0, [0]), (1, 3, 50.0, [0])]
    assert arrivals(messages, [10.0], [0.0, 0.0], sharing=True) == [15.5, 10.5]
    assert arrivals(messages, [10.0], [0.0, 0.0], sharing=False) == [10.5, 15.5]


def test_a_latecomer_slows_what_is_under_way() -> None:
    messages: Messages = [(0, 2, 100.0, [0]), (1, 3, 20.0, [0])]
    # 60 bytes alone, then 20 each at half the speed, then the last 20 alone
    assert arrivals(messages, [10.0], [0.0, 6.0], sharing=True) == [12.5, 10.5]


def test_a_transfer_is_through_when_its_slowest_cell_is() -> None:
    messages: Messages = [(0, 2, 100.0, [0, 1]), (1, 3, 100.0, [0])]
    assert arrivals(messages, [10.0, 4.0], [0.0, 0.0], sharing=True) == [25.5, 20.5]


def fluid(sizes: list[float], starts: list[float], bandwidth: float) -> list[float]:
    """Ends of transfers over one shared link, by following every change."""
    left = dict(enumerate(sizes))
    ends = [0.0] * len(sizes)
    now = 0.0
    while left:
        there = [i for i in left if starts[i] <= now]
        coming = min((starts[i] for i in left if starts[i] > now), default=float("inf"))
        if not there:
            now = coming
            continue
        rate = bandwidth / len(there)
        least = min(left[i] for i in there)
        step = min(least / rate, coming - now)
        for i in there:
            left[i] -= step * rate
            if left[i] <= 1e-9 * sizes[i]:
                ends[i] = now + step
                del left[i]
        now = coming if step == coming - now else now + step
    return ends


@settings(max_examples=200)
@given(data=st.lists(st.tuples(st.floats(1, 1e3), st.floats(0, 50)), min_size=1, max_size=8))
def test_sharing_is_what_a_fluid_would_do(data: list[tuple[float, float]]) -> None:
    """Seeded bugs it caught: `work_done` not brought up to date when a transfer joins; a stale event obeyed."""
    sizes, starts = [size for size, _ in data], [start for _, start in data]
    messages: Messages = [(i, len(data) + i, size, [0]) for i, size in enumerate(sizes)]
    expected = [end + 0.5 for end in fluid(sizes, starts, 10.0)]
    assert arrivals(messages, [10.0], starts, sharing=True) == pytest.approx(expected, rel=1e-9)


def test_messages_of_a_channel_follow_each_other_where_links_are_shared() -> None:
    lists: Lists = [[(SEND, 0), (SEND, 1)], [(RECEIVE, 1), (RECEIVE, 0)]]
    messages: Messages = [(0, 1, 100.0, [0]), (0, 1, 10.0, [0])]
    _, state = run(lists, messages, [10.0], Rules(sharing=True))
    assert state.arrival == [10.5, 11.5]


def test_at_one_instant_activations_leave_before_parameters() -> None:
    """The first device's gradients would else hold up the second one's activations on the node's link."""
    lists: Lists = [[(COMPUTE, 0), (SEND, 0)], [(COMPUTE, 0), (SEND, 1)], [(RECEIVE, 0)], [(RECEIVE, 1)]]
    messages: Messages = [(0, 2, 100.0, [0]), (1, 3, 10.0, [0])]
    _, state = run(lists, messages, [10.0], Rules(), [1.0], lanes=[Lane.PARAMETERS, Lane.ACTIVATIONS])
    assert state.arrival == [12.5, 2.5]


@pytest.mark.parametrize("sharing", [False, True])
def test_a_blocking_send_holds_its_device_until_the_message_is_there(sharing: bool) -> None:
    lists: Lists = [[(SEND, 0), (COMPUTE, 0)], [(RECEIVE, 0)]]
    rules = Rules(buffers=1, sharing=sharing)
    tables, state = run(lists, [(0, 1, 100.0, [0])], [10.0], rules, [1.0])
    assert state.end == [10.5, 11.5, 10.5]
    assert tables.first == [0, 2, 3]


@pytest.mark.parametrize("sharing", [False, True])
def test_a_rendezvous_waits_for_the_receiver(sharing: bool) -> None:
    lists: Lists = [[(SEND, 0)], [(COMPUTE, 0), (RECEIVE, 0)]]
    _, state = run(lists, [(0, 1, 100.0, [0])], [10.0], Rules(buffers=0, sharing=sharing), [3.0])
    assert state.end == [13.5, 3.0, 13.5]
    assert state.start == [0.0, 0.0, 3.0]


@pytest.mark.parametrize("sharing", [False, True])
def test_what_a_message_takes_of_a_device_delays_what_it_does_next(sharing: bool) -> None:
    """Seeded bug it caught: charged to a receiver that waited, whose wait the link's own time already explains."""
    lists: Lists = [[(SEND, 0), (COMPUTE, 0)], [(COMPUTE, 1), (RECEIVE, 0), (COMPUTE, 0)]]
    for busy, end in ((1.0, 10.5 + 2.0), (20.0, 20.0 + 0.25 + 2.0)):
        _, state = run(lists, [(0, 1, 100.0, [0])], [10.0], Rules(sharing=sharing), [2.0, busy], works=[0.25])
        assert state.end[1] == 2.25
        assert state.end[4] == end


def test_compute_is_slowed_while_a_message_is_under_way() -> None:
    lists: Lists = [[(SEND, 0), (COMPUTE, 0)], [(RECEIVE, 0)]]
    _, state = run(lists, [(0, 1, 10.0, [0])], [10.0], Rules(overlap_slowdown=0.2), [4.0])
    assert state.end[1] == pytest.approx(4.0 + 0.2 * 1.5)


def test_a_deadlock_is_told_with_its_cycle() -> None:
    """1F1B deadlocks where every send is a rendezvous: activation and gradient wait for each other."""
    plan = NAMED_PLANS["pipeline of 2"]("fp32")
    stages = [stage.model_copy(update={"in_flight": 2}) for stage in plan.pipelines[0].stages]
    pipeline = plan.pipelines[0].model_copy(update={"stages": stages})
    plan = plan.model_copy(update={"pipelines": [pipeline]})
    program = compile_plan(plan)
    front, back = program.layout.used
    with pytest.raises(ProgramError, match=r"^deadlock of 2 ranks: ") as caught:
        simulate(program, compute_model(plan), rules=Rules(buffers=0))
    text = str(caught.value)
    assert f"rank {front} waits at send stage 1 micro-batch 1 activation to rank {back}" in text
    assert f"rank {back} waits at send stage 0 micro-batch 0 gradient to rank {front}" in text


@pytest.mark.parametrize("sharing", [False, True])
def test_a_collective_ends_for_all_when_the_last_member_has_joined(sharing: bool) -> None:
    """Whoever comes later takes it at once. Seeded bug it caught: only the latest of those who wait went on."""
    plan = NAMED_PLANS["rows 5 + 2 + 1"]("fp32")
    program = compile_plan(plan, islands=dict.fromkeys(range(6), 0))
    done = simulate(program, compute_model(plan), steps=3, rules=Rules(steps=3, sharing=sharing))
    assert done.timeline is not None
    records = done.timeline.records
    for message in np.unique(records["message"][records["message"] >= 0]).tolist():
        if not program.transfer(message).members:
            continue
        carried = program.transfer(message).what == What.ALL_GATHER
        own = records[records["message"] == message]
        taken = own[(own["kind"] == Kind.RECEIVE) & (own["step"] == 0)]
        joined = own[(own["kind"] == Kind.SEND) & (own["step"] == -carried)]
        assert sorted(taken["device"]) == sorted(joined["device"]) == list(program.transfer(message).members)
        assert (taken["sent"] == joined["start"].max()).all()
        arrival = taken["end"].min()
        assert arrival > joined["start"].max()
        assert (taken["end"] == np.maximum(taken["start"], arrival)).all()


def test_a_member_that_never_joins_is_told() -> None:
    plan = NAMED_PLANS["rows 5 + 2 + 1"]("fp32")
    program = compile_plan(plan, islands=dict.fromkeys(range(6), 0))
    late = program.layout.used[1]
    actions = [
        action
        for action in program.devices[late]
        if action.kind != Kind.SEND or program.transfer(action.message).what != What.REDUCE_SCATTER
    ]
    devices = tuple(tuple(actions) if d == late else own for d, own in enumerate(program.devices))
    with pytest.raises(ProgramError, match=f"waits at receive reduce-scatter from ranks .* for rank {late}"):
        simulate(replace(program, devices=devices), compute_model(plan))


@settings(max_examples=50)
@given(plan=plans(), sharing=st.booleans())
def test_blocking_sends_hold_devices_no_longer_than_messages_take(plan: Plan, sharing: bool) -> None:
    program, compute = compile_plan(plan), compute_model(plan)
    done = simulate(program, compute, rules=Rules(buffers=1 << 20, sharing=sharing))
    assert done.timeline is not None
    sends = done.timeline.records[done.timeline.records["kind"] == Kind.SEND]
    moved = columns_of(program, compute.graph).tables.transfer_bytes
    for record in sends:
        path = compute.graph.path(int(record["device"]), int(record["peer"]))
        assert (
            record["end"]
            >= record["start"] + path.seconds(moved[program.messages[record["message"]].transfer]) - 1e-9
        )
