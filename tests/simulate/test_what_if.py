"""What-if: changed clusters, and what is refused."""

from __future__ import annotations

import pytest

from hethub.cost.compute import ComputeModel
from hethub.errors import InputError
from hethub.program.compile import compile_program
from hethub.simulate.energy import job_of, joules_of
from hethub.simulate.engine import simulate
from hethub.simulate.what_if import changed_graph, parse_change
from hethub.specs.layout import lay_out
from hethub.specs.plan import Plan
from hethub.timeline.summary import DeviceSummary
from tests.plan_strategies import NAMED_PLANS


def seconds(plan: Plan, *changes: str) -> float:
    graph = changed_graph(plan.cluster, [parse_change(text) for text in changes])
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("faster", "not a change"),
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
        from dataclasses import replace

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
