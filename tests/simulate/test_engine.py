"""The simulator against sums that a person can do, and laws that hold for every plan."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings

from hethub.program.actions import Program, What
from hethub.simulate.columns import columns_of
from hethub.simulate.engine import Rules, simulate
from hethub.specs.plan import Pipeline, Plan
from hethub.timeline.record import COMPUTE_KINDS, Kind, Timeline
from tests.plan_strategies import NAMED_PLANS, compile_plan, compute_model, plans

COMPUTE = [int(kind) for kind in COMPUTE_KINDS]


def run(plan: Plan, steps: int = 1, rules: Rules | None = None) -> tuple[Program, float, Timeline]:
    program = compile_plan(plan)
    done = simulate(program, compute_model(plan), steps=steps, rules=rules)
    assert done.timeline is not None
    return program, done.step_seconds, done.timeline


def two_stages(micro_batches: int) -> Plan:
    """a/0/0 (fast) holds layers [0, 2), c/0/0 (slow) [2, 5)."""
    plan = NAMED_PLANS["pipeline of 2"]("fp32")
    stages = [stage.model_copy(update={"in_flight": micro_batches}) for stage in plan.pipelines[0].stages]
    pipeline = Pipeline(micro_batches=micro_batches, micro_batch_rows=2, stages=stages)
    return plan.model_copy(update={"pipelines": [pipeline]})


def end_of(timeline: Timeline, device: int, kind: Kind, micro_batch: int = -1) -> float:
    r = timeline.records
    chosen = (r["device"] == device) & (r["kind"] == kind) & (r["micro_batch"] == micro_batch)
    (end,) = r["end"][chosen]
    return float(end)


def test_two_stages_and_one_micro_batch_by_hand() -> None:
    plan = two_stages(1)
    program, step, timeline = run(
        plan, rules=Rules()
    )  # shared, the norm's few bytes would delay the gradient
    front, back = program.layout.used
    path = compute_model(plan).graph.path(front, back)

    def seconds(device: int, stage: int, kind: Kind) -> float:
        return program.prices[device, stage, kind, 0 if kind == Kind.UPDATE else -1].price.seconds

    hop = path.seconds(2 * 16 * 16 * 4)  # rows x sequence x hidden x bytes
    turn = (
        seconds(front, 0, Kind.FORWARD)
        + hop
        + seconds(back, 1, Kind.FORWARD)
        + seconds(back, 1, Kind.BACKWARD)
    )
    home = turn + hop + seconds(front, 0, Kind.BACKWARD)
    assert end_of(timeline, front, Kind.BACKWARD, 0) == pytest.approx(home, rel=1e-12)
    # Nothing to reduce: each rank owns what it holds. Both norms meet at the root, the total goes back.
    scalars = path.seconds(16)
    summed = max(home + seconds(front, -1, Kind.NORM), turn + seconds(back, -1, Kind.NORM) + scalars)
    last = max(summed + seconds(front, -1, Kind.UPDATE), summed + scalars + seconds(back, -1, Kind.UPDATE))
    assert step == pytest.approx(last, rel=1e-12)


def test_two_stages_and_two_micro_batches_by_hand() -> None:
    plan = two_stages(2)
    program, _, timeline = run(plan, rules=Rules())
    front, back = program.layout.used
    hop = compute_model(plan).graph.path(front, back).seconds(2 * 16 * 16 * 4)
    f0, b0 = (program.prices[front, 0, kind, -1].price.seconds for kind in (Kind.FORWARD, Kind.BACKWARD))
    f1, b1 = (program.prices[back, 1, kind, -1].price.seconds for kind in (Kind.FORWARD, Kind.BACKWARD))
    first = f0 + hop + f1 + b1
    second = max(first, 2 * f0 + hop) + f1 + b1
    home = max(first + hop + b0, 2 * f0 + b0)
    assert end_of(timeline, front, Kind.BACKWARD, 0) == pytest.approx(home, rel=1e-12)
    assert end_of(timeline, front, Kind.BACKWARD, 1) == pytest.approx(max(home, second + hop) + b0, rel=1e-12)


@settings(max_examples=100)
@given(plan=plans())
def test_a_step_is_no_shorter_than_any_device_is_busy(plan: Plan) -> None:
    program, step, timeline = run(plan)
    records = timeline.records[np.isin(timeline.records["kind"], COMPUTE)]
    for device in program.layout.used:
        busy = records["busy"][records["device"] == device].sum()
        assert busy <= step * (1 + 1e-9)
    assert timeline.records["end"].max() <= step * (1 + 1e-9)


@settings(max_examples=100)
@given(plan=plans())
def test_a_device_does_one_thing_at_a_time_in_its_own_order(plan: Plan) -> None:
    program, _, timeline = run(plan)
    for device in program.layout.used:
        own = timeline.records[
            (timeline.records["device"] == device) & (timeline.records["kind"] != Kind.COLLECTIVE)
        ]
        own = own[np.argsort(own["action"])]
        # The only step has no new weights of a step before to take.
        done = [(n, a) for n, a in enumerate(program.devices[device]) if not program.carried(a)]
        assert own["action"].tolist() == [number for number, _ in done]
        assert own["kind"].tolist() == [int(action.kind) for _, action in done]
        assert (own["start"][1:] >= own["end"][:-1] - 1e-15).all()


@settings(max_examples=100)
@given(plan=plans())
def test_nothing_is_received_before_it_could_arrive(plan: Plan) -> None:
    program, _, timeline = run(plan)
    graph = compute_model(plan).graph
    moved = columns_of(program, graph).tables.transfer_bytes  # parameters read in place are not
    sends = {int(r["message"]): r for r in timeline.records if r["kind"] == Kind.SEND}
    for record in timeline.records[timeline.records["kind"] == Kind.RECEIVE]:
        send = sends[int(record["message"])]
        number = program.messages[int(record["message"])].transfer
        transfer = program.transfers[number]
        path = graph.path(transfer.source, transfer.destination)
        assert record["sent"] == send["start"]
        assert record["end"] >= send["start"] + path.seconds(moved[number]) - 1e-12
        assert (send["device"], send["peer"]) == (record["peer"], record["device"])
        assert send["bytes"] == record["bytes"] == transfer.bytes


@settings(max_examples=50)
@given(plan=plans())
def test_messages_of_a_channel_arrive_in_the_order_of_their_sends(plan: Plan) -> None:
    """A receive that had to wait ends at the arrival; no later message of its channel arrived earlier."""
    program, _, timeline = run(plan)
    receives = {int(r["message"]): r for r in timeline.records if r["kind"] == Kind.RECEIVE}
    for messages in program.order.values():
        messages = tuple(m for m in messages if m in receives)  # new weights are received by the next step
        waited = [m for m in messages if receives[m]["end"] > receives[m]["start"]]
        arrivals = [float(receives[m]["end"]) for m in waited]
        assert arrivals == sorted(arrivals)
        sent = [float(receives[m]["sent"]) for m in messages]
        assert sent == sorted(sent)


@settings(max_examples=50)
@given(plan=plans())
def test_a_group_starts_and_ends_its_actions_together(plan: Plan) -> None:
    program, _, timeline = run(plan)
    ends: dict[tuple[object, ...], set[float]] = defaultdict(set)
    for record in timeline.records:
        if record["kind"] in (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.RECOMPUTE):
            action = program.devices[int(record["device"])][int(record["action"])]
            key = (program.group(int(record["device"]), action), action)
            ends[key].add(float(record["end"]))
    assert all(len(found) == 1 for found in ends.values())


@settings(max_examples=50)
@given(plan=plans())
def test_the_same_plan_gives_the_same_timeline(plan: Plan) -> None:
    one, other = run(plan), run(plan)
    assert one[1] == other[1]
    assert one[2].records.tobytes() == other[2].records.tobytes()


def test_collectives_are_sub_events_of_a_groups_actions() -> None:
    program, _, timeline = run(NAMED_PLANS["heads 6 + 2"]("fp32"))
    records = timeline.records
    parents = {
        (int(r["device"]), int(r["action"])): r for r in records if r["kind"] in (Kind.FORWARD, Kind.BACKWARD)
    }
    inside = records[records["kind"] == Kind.COLLECTIVE]
    assert len(inside) > 0
    for record in inside:
        parent = parents[int(record["device"]), int(record["action"])]
        assert parent["start"] <= record["start"] <= record["end"] <= parent["end"] + 1e-15
        assert record["busy"] == 0
    for device, action in parents:
        price = program.price(device, program.devices[device][action]).price
        spent = sum(s.collective_seconds for s in price.segments)
        own = inside[(inside["device"] == device) & (inside["action"] == action)]
        assert (own["end"] - own["start"]).sum() == pytest.approx(spent)


def test_the_middle_of_three_steps_of_one_device_is_like_a_single_one() -> None:
    plan = NAMED_PLANS["single device"]("fp32")
    _, alone, _ = run(plan)
    program, middle, timeline = run(plan, steps=3)
    assert middle == pytest.approx(alone)
    assert sorted(set(timeline.records["step"].tolist())) == [-1, 0, 1]
    assert len(timeline.records) == 3 * len(program.devices[program.layout.used[0]])


@settings(max_examples=50)
@given(plan=plans())
def test_new_weights_are_received_one_step_later(plan: Plan) -> None:
    program, _, timeline = run(plan, steps=3)
    weights = [
        i for i, m in enumerate(program.messages) if program.transfers[m.transfer].what == What.WEIGHTS
    ]
    r = timeline.records[np.isin(timeline.records["message"], weights)]
    for message in weights:
        sends, receives = (
            np.sort(r["step"][(r["message"] == message) & (r["kind"] == kind)])
            for kind in (Kind.SEND, Kind.RECEIVE)
        )
        assert sends.tolist() == [-1, 0, 1]
        assert receives.tolist() == [0, 1]


@settings(max_examples=50)
@given(plan=plans())
def test_following_steps_are_simulated_to_the_end(plan: Plan) -> None:
    program, middle, timeline = run(plan, steps=3)
    assert middle > 0
    for what in (What.NORM, What.TOTAL):
        messages = [i for i, m in enumerate(program.messages) if program.transfers[m.transfer].what == what]
        received = timeline.records[
            (timeline.records["kind"] == Kind.RECEIVE) & np.isin(timeline.records["message"], messages)
        ]
        assert len(received) == 3 * len(messages)
