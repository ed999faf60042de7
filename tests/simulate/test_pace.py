"""Devices and links against their own prediction: whoever is slow is named, with how slow, and nobody else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hethub.cost.compute import ComputeModel
from hethub.cost.graph import CostGraph
from hethub.program.compile import compile_program
from hethub.simulate.engine import simulate
from hethub.simulate.pace import MOVED, Expected, Pace, at_pace, median_pace, paced_graph, paced_step_seconds
from hethub.simulate.what_if import with_links
from hethub.specs.layout import lay_out
from hethub.specs.plan import Plan
from hethub.timeline.record import Kind, Timeline
from tests.plan_strategies import NAMED_PLANS, plans


def emulated(plan: Plan) -> Plan:
    """Links of emulated devices serve first come, first served."""
    return plan.model_copy(update={"cluster": replace(plan.cluster, emulated_time_scale=1.0)})


def timeline(plan: Plan, devices: dict[int, float], links: dict[str, float]) -> Timeline:
    """What the plan's own program does on devices and links of another pace."""
    known = ComputeModel(CostGraph(plan.cluster), plan.workload)
    program = at_pace(compile_program(lay_out(plan), known), devices)
    changed = ComputeModel(CostGraph(with_links(plan.cluster, links)), plan.workload)
    found = simulate(program, changed, steps=3).timeline
    assert found is not None
    return found


def pace(plan: Plan, devices: dict[int, float], links: dict[str, float]) -> Pace:
    measured = timeline(plan, devices, links)
    expected = Expected(timeline(plan, {}, {}), CostGraph(plan.cluster))
    return expected.pace(measured.records, 0)


@settings(max_examples=20)
@given(plan=plans(), data=st.data())
def test_a_slow_device_has_its_factor_and_all_others_one(plan: Plan, data: st.DataObject) -> None:
    """Seen to catch: time from start to end in place of the device's own compute (members of a group that waited for
    the slow one had moved too)."""
    plan = emulated(plan)
    used = lay_out(plan).used
    slow = data.draw(st.sampled_from(used))
    factor = data.draw(st.sampled_from([0.5, 1.5, 2.0, 4.0]))
    found = pace(plan, {slow: factor}, {})
    names = [device.name for device in plan.cluster.devices()]
    expected = {names[d]: factor if d == slow else 1.0 for d in used}
    assert found.devices == pytest.approx(expected)


@settings(max_examples=20)
@given(plan=plans(), data=st.data())
def test_a_slow_device_is_not_taken_for_a_slow_link(plan: Plan, data: st.DataObject) -> None:
    """Others wait at other times then, and for other messages. Seen to catch: the least delayed message of a step over
    an idle path's time, since in another step all that somebody waits for may queue."""
    plan = emulated(plan)
    slow = data.draw(st.sampled_from(lay_out(plan).used))
    found = pace(plan, {slow: data.draw(st.sampled_from([1.5, 2.0, 4.0]))}, {})
    assert all(ratio < MOVED for ratio in found.links.values()), found.links


@settings(max_examples=20)
@given(plan=plans(), data=st.data())
def test_a_link_of_a_quarter_of_its_bandwidth_is_named_with_its_share(
    plan: Plan, data: st.DataObject
) -> None:
    plan = emulated(plan)
    known = pace(plan, {}, {})
    assert all(ratio == pytest.approx(1.0) for ratio in known.links.values())
    assume(known.links)
    link = data.draw(st.sampled_from(sorted(known.links)))
    found = pace(plan, {}, {link: 0.25})
    expected = Expected(timeline(plan, {}, {}), CostGraph(plan.cluster))
    measured = timeline(plan, {}, {link: 0.25})
    if (
        found.links.get(link, 1.0) > MOVED
    ):  # it is not where nobody waits for a large message, or latency is all
        assert expected.bandwidth_share(measured.records, [0], link) == pytest.approx(0.25, rel=0.1)
    graph = CostGraph(plan.cluster)
    used = lay_out(plan).used
    # A path shows that it is slow, and its slowest link is named: another that has become slower is not told apart.
    over = {
        name
        for a in used
        for b in used
        if a != b and link in on_path(graph, a, b)
        for name in graph.slowest_links(a, b)
    }
    assert {name for name, ratio in found.links.items() if ratio > MOVED} <= over


def on_path(graph: CostGraph, source: int, destination: int) -> set[str]:
    one, other = graph.devices[source], graph.devices[destination]
    if (one.group, one.node) == (other.group, other.node):
        return {f"intra {one.group}"}
    crossings = graph.path(source, destination).crossings
    return {f"inter {end.group}" for end in (one, other)} | {graph.cluster.links[n].name for n in crossings}


def test_what_a_step_does_not_show_is_left_out() -> None:
    plan = emulated(NAMED_PLANS["single device"]("fp32"))
    found = pace(plan, {}, {})
    assert found.links == {} and list(found.devices.values()) == pytest.approx([1.0])


def test_medians_are_over_the_steps_that_show_a_figure() -> None:
    paces = [Pace({"a": 1.0}, {"l": 2.0}), Pace({"a": 3.0}), Pace({"a": 2.0})]
    assert median_pace(paces) == Pace({"a": 2.0}, {"l": 2.0})


def test_a_pace_as_predicted_changes_nothing_and_a_slow_device_is_one_of_a_kind() -> None:
    plan = emulated(NAMED_PLANS["pipeline of 2"]("fp32"))
    graph = CostGraph(plan.cluster)
    names = [device.name for device in graph.devices]
    same = paced_graph(graph, Pace(dict.fromkeys(names, 1.01)))
    assert same.devices == graph.devices
    slow = paced_graph(graph, Pace({names[0]: 2.0}))
    assert slow.devices[0].type != graph.devices[0].type and slow.devices[1:] == graph.devices[1:]
    known = ComputeModel(graph, plan.workload)
    usual = simulate(compile_program(lay_out(plan), known), known, record=False, steps=3).step_seconds
    assert paced_step_seconds(plan, Pace(dict.fromkeys(names, 1.01))) == pytest.approx(usual)


def test_a_step_at_a_pace_is_what_its_timeline_says() -> None:
    """The promise of `replan` and the pace it comes from are one thing."""
    plan = emulated(NAMED_PLANS["uneven pipeline of 3"]("fp32"))
    names = [device.name for device in plan.cluster.devices()]
    used = lay_out(plan).used
    measured = timeline(plan, {used[1]: 2.0}, {})
    steps = [measured.records[measured.records["step"] == n]["end"].max() for n in (-1, 0)]
    assert paced_step_seconds(plan, Pace({names[used[1]]: 2.0})) == pytest.approx(steps[1] - steps[0])


def test_a_receiver_and_a_sender_may_tell_the_time_of_sending_a_little_apart() -> None:
    """Seeded bug: messages joined by that time, so that no link of a real run was ever judged."""
    plan = emulated(NAMED_PLANS["pipeline of 2"]("fp32"))
    measured = timeline(plan, {}, {"east-west": 0.1})
    records = measured.records.copy()
    waits = records["kind"] == Kind.RECEIVE
    records["sent"][waits] += 1e-6
    found = Expected(timeline(plan, {}, {}), CostGraph(plan.cluster)).pace(records, 0, 1e6)
    assert found.links["east-west"] > MOVED


def test_a_message_that_nobody_waited_for_says_nothing_of_its_link() -> None:
    plan = emulated(NAMED_PLANS["pipeline of 2"]("fp32"))
    measured = timeline(plan, {}, {})
    records = measured.records[measured.records["step"] == 0].copy()
    waits = records["kind"] == Kind.RECEIVE
    records["start"][waits] = records["end"][waits] = records["end"][waits] + 100.0
    expected = Expected(measured, CostGraph(plan.cluster))
    assert expected.pace(np.asarray(records), 0).links == {}
