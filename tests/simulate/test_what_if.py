"""What-if: changed clusters, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hethub.cost.compute import ComputeModel
from hethub.cost.graph import CostGraph
from hethub.cost.profiles.profile import LayerRow, Profile
from hethub.errors import InputError
from hethub.program.compile import compile_program
from hethub.simulate.energy import egress_usd, job_of, joules_of
from hethub.simulate.engine import simulate
from hethub.simulate.what_if import Addition, Change, changed_graph, enlarged, parse_change, with_links
from hethub.specs.layout import Share, lay_out
from hethub.specs.plan import Plan
from hethub.specs.resolved import GroupLink
from hethub.timeline.summary import DeviceSummary
from tests.plan_strategies import NAMED_PLANS


def seconds(plan: Plan, *changes: str) -> float:
    parsed = [parse_change(text) for text in changes]
    graph = changed_graph(plan.cluster, [change for change in parsed if isinstance(change, Change)])
    compute = ComputeModel(graph, plan.workload)
    return simulate(compile_program(lay_out(plan), compute), compute, record=False).step_seconds


def everything(plan: Plan, factor: float) -> list[str]:
    links = {link.name for group in plan.cluster.node_groups for link in (group.intra_link, group.inter_link)}
    links |= {cross.link.name for cross in plan.cluster.links}
    return [f"type:{name}={factor}x" for name in plan.cluster.device_types] + [
        f"link:{name}={factor}x" for name in links
    ]


def test_all_twice_as_fast_takes_half_as_long_but_for_latencies() -> None:
    plan = NAMED_PLANS["pipeline of 2"]("fp32")
    whole, half = seconds(plan), seconds(plan, *everything(plan, 2.0))
    assert whole / 2 < half < 0.6 * whole
    assert half < seconds(plan, *everything(plan, 2.0)[:-1])  # without one of the links


def test_a_slower_device_slows_the_step() -> None:
    plan = NAMED_PLANS["pipeline of 2"]("fp32")
    used = plan.pipelines[0].stages[1].replicas[0].ranks[0].device
    assert seconds(plan, f"device:{used}=0.5x") > 1.2 * seconds(plan)
    assert seconds(plan, f"device:{used}=1x") == seconds(plan)


def test_a_changed_device_is_known_by_what_was_measured_of_its_type() -> None:
    """Seeded bug: the profile asked for the made-up type, so that a roofline stood in."""
    plan = NAMED_PLANS["single device"]("fp32")
    device = plan.cluster.devices()[0]
    model, workload = plan.workload.model, plan.workload
    rows = tuple(
        LayerRow(
            model=model.name, device_type=device.type.name, layer_kind=kind, tensor_parallel=1, micro_batch=1,
            sequence_length=workload.sequence_length, dtype="fp32", forward_seconds=0.25, backward_seconds=0.5,
        )
        for kind in ("embedding", "decoder", "head")
    )  # fmt: skip
    graph = changed_graph(plan.cluster, [Change("device", device.name, 0.5)])
    compute = ComputeModel(graph, workload, Profile(rows, ()), slow_down={device.type.name: 2.0})
    layer = compute.layer_seconds(graph.devices[0].type, "decoder", Share.whole(model), 1)
    assert layer == pytest.approx(2 * 2 * 0.75)


def test_further_devices_stand_in_the_first_group_of_their_type() -> None:
    plan = NAMED_PLANS["pipeline of 2"]("fp32")
    group = plan.cluster.node_groups[0]
    before = plan.cluster.counts()
    for count in (1, group.devices_per_node, 2 * group.devices_per_node + 1):
        change = parse_change(f"type:{group.device_type}=+{count}")
        assert isinstance(change, Addition)
        found = enlarged(plan.cluster, [change])
        assert found.counts() == before | {group.device_type: before[group.device_type] + count}
        assert {d.name for d in plan.cluster.devices()} <= {d.name for d in found.devices()}
    with pytest.raises(InputError, match="has no such type"):
        enlarged(plan.cluster, [Addition("none", 1)])


def test_messages_over_a_priced_link_cost_by_the_byte() -> None:
    plan = two_zones(usd_per_gb=None)
    assert money(plan) == 0.0
    priced = two_zones(usd_per_gb=2.0)
    program = compile_program(lay_out(priced), ComputeModel(CostGraph(priced.cluster), priced.workload))
    sizes = [program.transfer(n).bytes for n in range(len(program.messages))]
    assert sizes
    assert money(priced) == pytest.approx(2.0 * sum(sizes) / 1e9)


def money(plan: Plan) -> float:
    compute = ComputeModel(CostGraph(plan.cluster), plan.workload)
    return egress_usd(compile_program(lay_out(plan), compute), compute.graph)


def two_zones(usd_per_gb: float | None) -> Plan:
    """A pipeline of two stages whose devices stand in zones that one link joins."""
    plan = NAMED_PLANS["pipeline of 2"]("fp32")
    used = {s.replicas[0].ranks[0].device.split("/")[0] for s in plan.pipelines[0].stages}  # type: ignore[union-attr]
    one, other = sorted(used)
    groups = tuple(replace(group, zone=f"zone-{group.name}") for group in plan.cluster.node_groups)
    link = groups[0].inter_link
    links = tuple(
        GroupLink(
            between=(a.name, b.name), link=link, total_bandwidth_bytes_per_second=None, usd_per_gb=usd_per_gb
        )
        for number, a in enumerate(groups)
        for b in groups[number + 1 :]
    )
    assert one != other
    return plan.model_copy(update={"cluster": replace(plan.cluster, node_groups=groups, links=links)})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("faster", "not a change"),
        ("type:a=+0", "not a change"),
        ("device:a/0/0=+2", "not a change"),
        ("type:a=0x", "not a change"),
        ("type:a=1e999x", "not a change"),
        ("type:a=..x", "not a change"),
        ("link:none=2x", "has no such link"),
        ("device:z/0/0=2x", "has no such device"),
    ],
)
def test_what_is_no_change_of_this_cluster_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        seconds(NAMED_PLANS["single device"]("fp32"), text)


def test_one_link_is_slowed_by_its_own_name_and_its_class_by_theirs() -> None:
    cluster = NAMED_PLANS["rows cut differently in each stage"]("fp32").cluster
    links = cluster.named_links()
    own, link = next(iter(links.items()))
    alike = {name for name, other in links.items() if other.name == link.name}

    def slowed(name: str) -> set[str]:
        after = with_links(cluster, {name: 0.25}).named_links()
        return {
            n for n in links if after[n].bandwidth_bytes_per_second == links[n].bandwidth_bytes_per_second / 4
        }

    assert slowed(own) == {own}
    assert slowed(link.name) == alike


def test_energy_counts_each_power_for_its_time() -> None:
    plan = NAMED_PLANS["single device"]("fp32")
    known = next(iter(plan.cluster.device_types.values()))
    fields = dict.fromkeys(
        ("bubble_ratio", "idle_ratio", "unaccounted_ratio", "overrun_ratio", "real_ratio"), 0.0
    )
    summary = DeviceSummary(
        device="a/0/0", device_type=known.name, seconds=10.0, busy_ratio=0.5, recompute_ratio=0.1,
        exposed_communication_ratio=0.1, actions=1, **(fields | {"bubble_ratio": 0.3}),
    )  # fmt: skip

    def joules(full: float | None, sending: float | None, idle: float | None) -> float | None:
        device_type = replace(
            known, power_watts=full, communication_power_watts=sending, idle_power_watts=idle
        )
        return joules_of(device_type, summary)

    assert joules(None, 1.0, 1.0) is None
    assert joules(100.0, None, None) == pytest.approx(1000.0)
    assert joules(100.0, 50.0, 20.0) == pytest.approx(10 * (60 + 5 + 6))


def test_a_job_is_the_step_many_times() -> None:
    job = job_of(7.2e6, 1000.0, 0.5, None)
    assert (job.hours, job.kwh, job.usd) == (2.0, 1.0, None)
