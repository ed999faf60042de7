"""Islands and their collectives: who is joined, what is carried by whom, in which order, and what the proof notices."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings

from hethub.cost.compute import exchange_seconds
from hethub.cost.graph import CostGraph
from hethub.cost.memory import device_memory
from hethub.program.actions import Action, Program, ProgramError, What
from hethub.program.compile import compile_program
from hethub.program.islands import native_islands
from hethub.program.memory import program_memory
from hethub.program.prove import prove
from hethub.simulate.engine import simulate
from hethub.specs.cluster import Cluster, NodeGroup
from hethub.specs.layout import lay_out
from hethub.specs.plan import Plan
from hethub.timeline.record import Kind
from tests.plan_strategies import (
    NAMED_PLANS,
    compile_plan,
    compute_model,
    islands,
    joined,
    plans,
    three_speeds,
)

COLLECTIVES = (What.REDUCE_SCATTER, What.ALL_GATHER)
ONE = dict.fromkeys(range(6), 0)
TWO = {0: 0, 1: 0, 2: 1, 3: 1, 4: 1}  # and device 5 alone


def collectives(program: Program, device: int) -> list[tuple[int, tuple[int, ...]]]:
    """(message, members) of the collectives that a device joins, in its order."""
    joined = [a.message for a in program.devices[device] if a.kind == Kind.SEND]
    return [(m, program.transfer(m).members) for m in joined if program.transfer(m).members]


@settings(max_examples=150)
@given(plan=plans(), where=islands())
def test_random_plans_with_islands_compile_to_proven_programs(plan: Plan, where: dict[int, int]) -> None:
    """Seen to catch: collectives joined in the order in which each member has them ready."""
    prove(compile_plan(plan, islands=where))


@settings(max_examples=100)
@given(plan=plans(), where=islands())
def test_all_members_join_collectives_in_one_order(plan: Plan, where: dict[int, int]) -> None:
    program = compile_plan(plan, islands=where)
    joined = {device: collectives(program, device) for device in program.layout.used}
    for one, other in combinations(joined, 2):
        mine = [entry for entry in joined[one] if other in entry[1]]
        assert mine == [entry for entry in joined[other] if one in entry[1]]


@settings(max_examples=100)
@given(plan=plans(), where=islands())
def test_every_byte_crosses_between_islands_once(plan: Plan, where: dict[int, int]) -> None:
    """Of what a collective carries inside: an island sends its sum to the updater and is sent the new weights once."""
    program = compile_plan(plan, islands=where)
    table = program.ownership
    for inside, messages in (
        (What.REDUCE_SCATTER, (What.REDUCE,)),
        (What.ALL_GATHER, (What.WEIGHTS, What.RELAY)),
    ):
        joint = {
            (number, where[transfer.members[0]])
            for transfer in program.transfers
            if transfer.what == inside
            for number in transfer.slices
        }
        crossed: Counter[tuple[int, int]] = Counter()
        for transfer in program.transfers:
            if transfer.what in messages:
                away = transfer.source if inside == What.REDUCE_SCATTER else transfer.destination
                crossed.update((n, where[away]) for n in transfer.slices if (n, where.get(away, -1)) in joint)
        for number, island in joint:
            own = where.get(table.slices[number].updater) == island
            assert crossed[number, island] == (0 if own else 1)


@settings(max_examples=60)
@given(plan=plans(), where=islands())
def test_a_collective_has_the_slices_of_an_island_each_in_one_share(
    plan: Plan, where: dict[int, int]
) -> None:
    program = compile_plan(plan, islands=where)
    table = program.ownership
    for transfer in program.transfers:
        if transfer.what not in COLLECTIVES:
            assert not transfer.members
            continue
        assert len({where[member] for member in transfer.members}) == 1 < len(transfer.members)
        assert Counter(n for share in transfer.shares for n in share) == Counter(set(transfer.slices))
        sizes = [table.route_elements(share) for share in transfer.shares]
        assert len(sizes) * max(sizes) <= 2 * sum(sizes)  # what pads them is no more than they are
        each = transfer.bytes // (len(sizes) - 1)
        assert each == max(sizes) * 4
        for member, share in zip(transfer.members, transfer.shares, strict=True):
            for number in share:
                entry = table.slices[number]
                assert set(transfer.members) <= set(entry.holders)
                assert entry.updater == member or entry.updater not in transfer.members


def test_without_islands_nothing_but_messages_travels() -> None:
    program = compile_plan(NAMED_PLANS["everything uneven at once"]("fp32"))
    assert not any(transfer.members for transfer in program.transfers)
    assert {What.RELAY, *COLLECTIVES}.isdisjoint({transfer.what for transfer in program.transfers})


# -- which devices are an island ------------------------------------------------------------------------------------


def cluster(vendors: dict[str, str], transport: str = "native", *, emulated: bool = False) -> Cluster:
    """`three_speeds` with a vendor for each type and a transport for each link."""
    found = three_speeds(emulated=emulated)

    def alike(group: NodeGroup) -> NodeGroup:
        return replace(
            group,
            intra_link=replace(group.intra_link, transport="native"),
            inter_link=replace(group.inter_link, transport=transport),
        )

    return replace(
        found,
        device_types={
            name: replace(own, vendor=vendors.get(name, "cpu")) for name, own in found.device_types.items()
        },
        node_groups=tuple(alike(group) for group in found.node_groups),
    )


GPUS = {"fast": "nvidia", "middle": "huawei", "slow": "nvidia"}


def test_alike_devices_of_a_vendor_with_a_library_are_islands() -> None:
    assert native_islands(CostGraph(cluster(GPUS)), range(6)).number == {0: 0, 1: 0, 2: 1, 3: 1, 4: 2, 5: 2}


@pytest.mark.parametrize("vendors", [{}, {"fast": "biren"}], ids=["cpu", "no known library"])
def test_without_a_library_there_is_no_island(vendors: dict[str, str]) -> None:
    assert native_islands(CostGraph(cluster(vendors)), range(6)).number == {}


def test_links_that_are_not_native_part_islands() -> None:
    """b's two devices stand on a node each."""
    found = native_islands(CostGraph(cluster(GPUS, "tcp")), range(6)).number
    assert found[0] == found[1] and found[4] == found[5]
    assert found[2] != found[3]


def test_emulated_links_carry_messages_only() -> None:
    assert native_islands(CostGraph(cluster(GPUS, emulated=True)), range(6)).number == {}


# -- what the proof notices -----------------------------------------------------------------------------------------


def reducing(islands: dict[int, int]) -> Program:
    """Three replicas whose gradients leave in several collectives."""
    return compile_plan(NAMED_PLANS["replicas that reduce in parts"]("fp32"), islands=islands)


def places(program: Program, device: int, kind: Kind, what: What) -> list[int]:
    return [
        at
        for at, action in enumerate(program.devices[device])
        if action.kind == kind and program.transfer(action.message).what == what
    ]


def with_list(program: Program, device: int, actions: list[Action]) -> Program:
    devices = list(program.devices)
    devices[device] = tuple(actions)
    return replace(program, devices=tuple(devices))


def late_join(what: What) -> Callable[[Program], Program]:
    """The first collective behind the second."""

    def change(program: Program) -> Program:
        one, other = places(program, 0, Kind.SEND, what)[:2]
        actions = list(program.devices[0])
        actions.insert(other, actions.pop(one))
        return with_list(program, 0, actions)

    return change


def without(kind: Kind, what: What) -> Callable[[Program], Program]:
    def change(program: Program) -> Program:
        actions = list(program.devices[0])
        del actions[places(program, 0, kind, what)[0]]
        return with_list(program, 0, actions)

    return change


def moved(kind: Kind, what: What, to: Callable[[Program], int]) -> Callable[[Program], Program]:
    def change(program: Program) -> Program:
        actions = list(program.devices[0])
        action = actions.pop(places(program, 0, kind, what)[0])
        actions.insert(to(program), action)
        return with_list(program, 0, actions)

    return change


def at_norm(program: Program) -> int:
    """Behind it, once an earlier action is taken out."""
    return next(n for n, action in enumerate(program.devices[0]) if action.kind == Kind.NORM)


def in_two_shares(what: What) -> Callable[[Program], Program]:
    """The first slice of a collective is another member's too."""

    def change(program: Program) -> Program:
        at = next(n for n, transfer in enumerate(program.transfers) if transfer.what == what)
        transfer = program.transfers[at]
        first, second, *rest = transfer.shares
        changed = transfer._replace(shares=(first, (*second, first[0]), *rest))
        return replace(program, transfers=(*program.transfers[:at], changed, *program.transfers[at + 1 :]))

    return change


def left_out(program: Program) -> Program:
    """A member's share has lost a slice."""
    at = next(n for n, transfer in enumerate(program.transfers) if transfer.what == What.REDUCE_SCATTER)
    transfer = program.transfers[at]
    first, *rest = transfer.shares
    changed = transfer._replace(shares=(first[1:], *rest), slices=transfer.slices[1:])
    return replace(program, transfers=(*program.transfers[:at], changed, *program.transfers[at + 1 :]))


BUGS: dict[str, tuple[Callable[[Program], Program], str]] = {
    "a member joins two in another order": (
        late_join(What.ALL_GATHER),
        "does not end: rank 0 waits at receive all",
    ),
    "the same of gradients": (
        late_join(What.REDUCE_SCATTER),
        "does not end: rank 0 waits at receive reduce-sc",
    ),
    "a member never joins": (without(Kind.SEND, What.REDUCE_SCATTER), "rank 0 does not send collective"),
    "a member never takes": (without(Kind.RECEIVE, What.ALL_GATHER), "rank 0 does not receive collective"),
    "joined before the last backward": (
        moved(Kind.SEND, What.REDUCE_SCATTER, lambda program: 0),
        "send reduce-scatter to ranks 0, 2, 4 comes before what it needs",
    ),
    "sums that come after the norm": (
        moved(Kind.RECEIVE, What.REDUCE_SCATTER, at_norm),
        "norm comes before what it needs",
    ),
    "weights given before they are updated": (
        moved(Kind.SEND, What.ALL_GATHER, at_norm),
        "send all-gather to ranks 0, 2, 4 comes before what it needs",
    ),
    "a sum for two members": (in_two_shares(What.REDUCE_SCATTER), "does not travel once"),
    "weights given by two members": (in_two_shares(What.ALL_GATHER), "does not travel once"),
    "a slice left out": (left_out, "does not travel once"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_seeded_bug_is_found(bug: str) -> None:
    change, words = BUGS[bug]
    program = reducing(ONE)
    assert len(collectives(program, 0)) > 3
    with pytest.raises(ProgramError, match=words):
        prove(change(program))


RELAY_BUGS: dict[str, tuple[Kind, What, str]] = {
    "a sum sent before it is there": (
        Kind.RECEIVE,
        What.REDUCE_SCATTER,
        r"send reduce to rank \d comes before",
    ),
    "weights passed on before they are there": (
        Kind.RECEIVE,
        What.RELAY,
        "send all-gather to ranks .* comes",
    ),
}


@pytest.mark.parametrize("bug", RELAY_BUGS)
def test_a_seeded_bug_of_a_relay_is_found(bug: str) -> None:
    """The action that brings what a relay passes on stands behind the message in which it does."""
    kind, what, words = RELAY_BUGS[bug]
    program = compile_plan(NAMED_PLANS["rows 5 + 2 + 1"]("fp32"), islands={0: 0, 2: 0})
    sent = What.REDUCE if what == What.REDUCE_SCATTER else What.ALL_GATHER
    device = next(d for d in (0, 2) if places(program, d, kind, what) and places(program, d, Kind.SEND, sent))
    prove(program)
    actions = list(program.devices[device])
    action = actions.pop(places(program, device, kind, what)[-1])
    actions.insert(places(program, device, Kind.SEND, sent)[-1], action)
    with pytest.raises(ProgramError, match=words):
        prove(with_list(program, device, actions))


# -- what it costs ----------------------------------------------------------------------------------------------------


def test_a_collective_takes_what_its_ring_takes() -> None:
    """From the moment when its last member has copied its shares together, on idle links."""
    plan = NAMED_PLANS["rows 5 + 2 + 1"]("fp32")
    compute = compute_model(plan)
    program = compile_program(lay_out(plan), compute, islands=joined(ONE))
    done = simulate(program, compute)
    assert done.timeline is not None
    records = done.timeline.records
    starts: dict[int, list[float]] = defaultdict(list)
    for record in records[records["kind"] == Kind.SEND]:
        starts[int(record["message"])].append(float(record["start"]))
    seen = 0
    for record in records[records["kind"] == Kind.RECEIVE]:
        transfer = program.transfer(int(record["message"]))
        if transfer.members:
            last = max(starts[int(record["message"])])
            count = len(transfer.members)
            share = transfer.bytes / (count - 1)
            copied = share * (count if transfer.what == What.REDUCE_SCATTER else 1)
            alone = exchange_seconds(compute.graph, transfer.members, share)
            alone += compute.touch_seconds(compute.graph.devices[transfer.members[0]].type, 2 * copied)
            assert record["sent"] == last
            assert record["end"] >= last + alone * (1 - 1e-9)
            seen += record["end"] == pytest.approx(last + alone, rel=1e-6)
    assert seen  # the first of them has the links for itself


@settings(max_examples=60)
@given(plan=plans(), where=islands())
def test_memory_of_collectives_is_released(plan: Plan, where: dict[int, int]) -> None:
    """Devices that are no host. The closed form leaves out what pads shares; what a step did not give back would stand
    in the second one's peak beside its own."""
    types = {name: replace(own, vendor="nvidia") for name, own in plan.cluster.device_types.items()}
    plan = plan.model_copy(
        update={"cluster": replace(plan.cluster, device_types=types, emulated_time_scale=None)}
    )
    compute, layout = compute_model(plan), lay_out(plan)
    program = compile_program(layout, compute, islands=joined(where))
    table = program.ownership
    bound = device_memory(compute, layout, *table.updates)
    for device, peak in program_memory(program, compute).items():
        copies = max(0, peak.optimizer - bound[device].optimizer)
        more = 0  # than the elements themselves
        for transfer in program.transfers:
            if device in transfer.members and transfer.what == What.REDUCE_SCATTER:
                share = transfer.bytes // (len(transfer.members) - 1)
                more += (len(transfer.members) + 1) * share - 4 * table.route_elements(transfer.slices)
        assert peak.total - 48 * len(layout.used) - copies - more <= bound[device].total
