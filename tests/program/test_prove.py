"""Compiled programs keep their promises, and the proof notices when one is broken."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings

from hethub.program.actions import Action, Program, What
from hethub.program.prove import ProgramError, prove
from hethub.simulate.engine import simulate
from hethub.specs.plan import Plan
from hethub.timeline.record import Kind
from tests.plan_strategies import NAMED_PLANS, compile_plan, compute_model, plans


@pytest.mark.parametrize("name", NAMED_PLANS)
@pytest.mark.parametrize("training", [True, False])
def test_named_plans_compile_to_proven_programs(name: str, training: bool) -> None:
    prove(compile_plan(NAMED_PLANS[name]("fp32"), training=training))


@settings(max_examples=100)
@given(plan=plans())
def test_random_plans_compile_to_proven_programs(plan: Plan) -> None:
    prove(compile_plan(plan))
    prove(compile_plan(plan, training=False))


def with_list(program: Program, device: int, actions: list[Action]) -> Program:
    devices = list(program.devices)
    devices[device] = tuple(actions)
    return replace(program, devices=tuple(devices))


def places(program: Program, device: int, kind: Kind, what: What | None = None) -> list[int]:
    """Where actions of a kind (messages: carrying `what`) stand in a device's list."""
    return [
        at
        for at, action in enumerate(program.devices[device])
        if action.kind == kind
        and (what is None or program.transfers[program.messages[action.message].transfer].what == what)
    ]


def swap_sends(program: Program) -> Program:
    one, other = places(program, 0, Kind.SEND, What.ACTIVATION)[:2]
    actions = list(program.devices[0])
    actions[one], actions[other] = actions[other], actions[one]
    return with_list(program, 0, actions)


def swap_order(program: Program) -> Program:
    """The receiver's posting order, but not the sender's."""
    order = dict(program.order)
    channel = max(order, key=lambda c: len(order[c]))
    order[channel] = order[channel][::-1]
    return replace(program, order=order)


def without(kind: Kind, what: What | None = None) -> Callable[[Program], Program]:
    def change(program: Program) -> Program:
        actions = list(program.devices[0])
        del actions[places(program, 0, kind, what)[0]]
        return with_list(program, 0, actions)

    return change


def twice(kind: Kind) -> Callable[[Program], Program]:
    def change(program: Program) -> Program:
        at = places(program, 0, kind)[0]
        actions = list(program.devices[0])
        return with_list(program, 0, [*actions[: at + 1], *actions[at:]])

    return change


def moved(program: Program, device: int, origin: int, to: int) -> Program:
    actions = list(program.devices[device])
    actions.insert(to, actions.pop(origin))
    return with_list(program, device, actions)


def send_before_work(program: Program) -> Program:
    return moved(program, 0, places(program, 0, Kind.SEND, What.ACTIVATION)[0], 0)


def receive_after_use(program: Program) -> Program:
    at = places(program, 0, Kind.RECEIVE, What.GRADIENT)[0]
    return moved(program, 0, at, places(program, 0, Kind.BACKWARD)[0])


def update_first(program: Program) -> Program:
    return moved(program, 0, places(program, 0, Kind.UPDATE)[0], 0)


def to_another_rank(program: Program) -> Program:
    at = places(program, 0, Kind.SEND)[0]
    actions = list(program.devices[0])
    moved_action = actions.pop(at)
    changed = with_list(program, 0, actions)
    return with_list(changed, 4, [moved_action, *changed.devices[4]])


BUGS: dict[str, tuple[Callable[[Program], Program], str]] = {
    "two sends swapped": (swap_sends, "stated order"),
    "receives posted in another order": (swap_order, "stated order"),
    "a receive dropped": (without(Kind.RECEIVE, What.GRADIENT), "received 0 times"),
    "a send dropped": (without(Kind.SEND, What.ACTIVATION), "is sent 0"),
    "a backward twice": (twice(Kind.BACKWARD), "BACKWARD of stage 0"),
    "a forward dropped": (without(Kind.FORWARD), "FORWARD of stage 0"),
    "a recomputation dropped": (without(Kind.RECOMPUTE), "RECOMPUTE of stage 0"),
    "a send before its forward": (send_before_work, "before what it needs"),
    "a receive after its backward": (receive_after_use, "before its gradient from rank 4"),
    "an update before the reduction": (update_first, "before what it needs"),
    "a send on another rank": (to_another_rank, "stands at rank 4"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_seeded_bug_is_found(bug: str) -> None:
    change, words = BUGS[bug]
    program = compile_plan(NAMED_PLANS["recompute full"]("fp32"))
    with pytest.raises(ProgramError, match=words):
        prove(change(program))


def deadlocked() -> tuple[Plan, Program]:
    """Rank 4 waits for a gradient before it sends the activation that the gradient is made of."""
    plan = NAMED_PLANS["chunks: one device in stages 0 and 2"]("fp32")
    (chain,) = plan.pipelines
    stages = [stage.model_copy(update={"in_flight": 1}) for stage in chain.stages]
    plan = plan.model_copy(update={"pipelines": [chain.model_copy(update={"stages": stages})]})
    program = compile_plan(plan)
    send = places(program, 4, Kind.SEND, What.ACTIVATION)[0]
    return plan, moved(program, 4, send, places(program, 4, Kind.RECEIVE, What.GRADIENT)[0])


def test_a_cycle_of_waiting_ranks_is_found_by_proof_and_simulator() -> None:
    plan, program = deadlocked()
    with pytest.raises(ProgramError, match="does not end: rank 0 waits at receive stage 2 micro-batch"):
        prove(program)
    with pytest.raises(
        ProgramError, match=r"deadlock of 2 ranks: rank 0 waits at receive stage 2 micro-batch"
    ):
        simulate(program, compute_model(plan))


def test_too_few_receive_buffers_are_found() -> None:
    program = compile_plan(NAMED_PLANS["pipeline of 2"]("fp32"))
    with pytest.raises(ProgramError, match="does not end"):
        prove(replace(program, depth=dict.fromkeys(program.depth, 0)))


def test_members_of_a_group_must_meet_in_the_same_action() -> None:
    program = compile_plan(NAMED_PLANS["heads 6 + 2"]("fp32"), training=False)
    actions = list(program.devices[0])
    one, other = places(program, 0, Kind.FORWARD)[:2]
    actions[one], actions[other] = actions[other], actions[one]
    with pytest.raises(ProgramError, match="meet in different actions"):
        prove(with_list(program, 0, actions))
