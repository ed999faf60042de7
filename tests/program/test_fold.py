"""Groups folded into one device: the same step, from a fraction of the actions."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from hethub.cost.compute import ComputeModel
from hethub.program.compile import compile_program
from hethub.program.fold import fold
from hethub.simulate.engine import Simulation, simulate
from hethub.specs.layout import Layout, lay_out
from hethub.specs.plan import Pipeline, Plan, Rank, Replica, Stage
from hethub.specs.resolved import Cluster, DeviceType, Link, NodeGroup
from hethub.specs.workload import Workload
from hethub.timeline.record import Kind
from tests.plan_strategies import NAMED_PLANS, compute_model, tiny_model

_LAYERS = 12


def folding_cluster(degree: int) -> Cluster:
    """Two groups of nodes that hold two groups of `degree` devices each."""
    kind = DeviceType(
        name="chip",
        catalog=None,
        vendor="cpu",
        memory_bytes=1 << 30,
        memory_reserve_bytes=0,
        memory_bandwidth_bytes_per_second=1e9,
        peak_flops_per_second={"fp32": 2e8},
        matmul_efficiency=1.0,
        memory_efficiency=1.0,
        substitute_dtype={},
        power_watts=None,
        usd_per_hour=None,
    )
    intra = Link(name="link", bandwidth_bytes_per_second=1e7, latency_seconds=1e-5, transport="native")
    inter = Link(name="link", bandwidth_bytes_per_second=4e7, latency_seconds=1e-5, transport="native")
    group = NodeGroup(
        name="g",
        device_type="chip",
        nodes=4,
        devices_per_node=2 * degree,
        intra_link=intra,
        inter_link=inter,
        zone="hall",
    )
    return Cluster(
        name="folded",
        device_types={"chip": kind},
        node_groups=(group,),
        links=(),
        exclude=frozenset(),
        emulated_time_scale=None,
    )


def _plan(degree: int, heads: list[int]) -> Plan:
    """Two pipelines of four stages, each with one group on half a node."""
    model = tiny_model(layers=_LAYERS, heads=8)
    workload = Workload(model=model, sequence_length=16, global_batch=16, precision="fp32", optimizer="adamw")
    cuts = [0, 4, 7, 10, _LAYERS + 2]

    def ranks(stage: int) -> list[Rank]:
        found = []
        for at, own in enumerate(heads):
            devices = f"g/{stage}/{at},g/{stage}/{at + degree}"
            share = {"heads": own, "ffn": model.ffn_size * own // 8, "vocab": model.vocab_size * own // 8}
            if stage not in (0, 3):
                share.pop("vocab")
            found.append(Rank(devices=devices, count=1, **share))
        return found

    stages = [
        Stage(
            layers=(start, stop),
            recompute="none",
            in_flight=4 - number,
            replicas=[Replica(rows=1, ranks=ranks(number))],
        )
        for number, (start, stop) in enumerate(pairwise(cuts))
    ]
    pipeline = Pipeline(repeat=2, micro_batches=8, micro_batch_rows=1, stages=stages)
    return Plan(name="groups", pipelines=[pipeline], cluster=folding_cluster(degree), workload=workload)


def _seconds(plan: Plan, layout: Layout) -> tuple[float, float, int, int]:
    """Step seconds in full and folded, and the actions of both."""
    compute = compute_model(plan)
    folded = fold(layout, compute)
    assert folded is not None
    whole, part = compile_program(layout, compute), compile_program(folded.layout, folded.compute)
    return (
        simulate(whole, compute, record=False).step_seconds,
        simulate(part, folded.compute, record=False).step_seconds,
        sum(map(len, whole.devices)),
        sum(map(len, part.devices)),
    )


@pytest.mark.parametrize("degree", [2, 4])
def test_a_folded_plan_takes_as_long(degree: int) -> None:
    """Seen to catch: a folded link inside a node as narrow as one rank's; the group priced as a device alone."""
    plan = _plan(degree, [8 // degree] * degree)
    whole, part, actions, fewer = _seconds(plan, lay_out(plan))
    assert part == pytest.approx(whole, rel=0.02)
    assert fewer < 1.3 * actions / degree


@pytest.mark.parametrize("degree", [2, 4])
def test_pipeline_work_of_a_folded_group_is_when_its_members_do_it(degree: int) -> None:
    """To the rounding of sums: ranks with equal actions, costs and links. Parameters that every rank holds whole, a
    norm's, are what is left to differ, after the pipeline.

    Seen to catch: a folded path with the latency of each rank's message added up.
    """
    plan = _plan(degree, [8 // degree] * degree)
    layout, compute = lay_out(plan), compute_model(plan)
    folded = fold(layout, compute)
    assert folded is not None
    whole = _pipeline_times(simulate(compile_program(layout, compute), compute))
    part = _pipeline_times(
        simulate(compile_program(folded.layout, folded.compute), folded.compute, sub_events=False)
    )
    assert part.keys() == {key for key in whole if key[0] in folded.members}
    for (first, *rest), times in part.items():
        for device in folded.members[first]:
            assert whole[device, *rest] == pytest.approx(times, rel=1e-9, abs=1e-12)


def _pipeline_times(simulation: Simulation) -> dict[tuple[int, ...], tuple[float, float]]:
    """Start and end of each piece of pipeline work, parts taken together, by device, kind, stage and micro-batch."""
    assert simulation.timeline is not None
    found: dict[tuple[int, ...], tuple[float, float]] = {}
    for record in simulation.timeline.records:
        if record["kind"] in (Kind.FORWARD, Kind.BACKWARD):
            key = tuple(int(record[name]) for name in ("device", "kind", "stage", "micro_batch"))
            start, end = found.get(key, (float("inf"), 0.0))
            found[key] = (min(start, float(record["start"])), max(end, float(record["end"])))
    return found


@pytest.mark.parametrize("name", NAMED_PLANS)
def test_groups_of_one_fold_into_themselves(name: str) -> None:
    plan = NAMED_PLANS[name]("fp32")
    layout = lay_out(plan)
    ranks = [rank for p in layout.pipelines for s in p.stages for r in s.replicas for rank in r.ranks]
    groups = [r for p in layout.pipelines for s in p.stages for r in s.replicas]
    if len(groups) != len(ranks) or len({rank.device for rank in ranks}) != len(ranks):
        return  # larger groups, or devices in several stages
    whole, part, _, _ = _seconds(plan, layout)
    assert part == pytest.approx(whole, rel=1e-9)


def test_a_group_stands_for_its_members() -> None:
    plan = _plan(2, [4, 4])
    layout = lay_out(plan)
    folded = fold(layout, compute_model(plan))
    assert folded is not None
    assert sorted(d for group in folded.members.values() for d in group) == list(layout.used)
    assert folded.layout.used == tuple(sorted(folded.members))


def test_uneven_groups_do_not_fold() -> None:
    plan = _plan(2, [6, 2])
    assert fold(lay_out(plan), compute_model(plan)) is None


def test_what_was_measured_does_not_order_a_folded_program() -> None:
    """As of whole programs. Seen to catch: owners and list order by the folded devices' figures, as if a group were one
    device with a rank's share."""
    plan = _plan(4, [2] * 4)
    listed = [pipeline.model_copy(update={"schedule": "list"}) for pipeline in plan.pipelines]
    plan = plan.model_copy(update={"pipelines": listed})
    known = compute_model(plan)
    programs = []
    slow_downs: list[dict[str, float]] = [{}, {"chip": 3.0}]
    for slow in slow_downs:
        folded = fold(lay_out(plan), ComputeModel(known.graph, plan.workload, slow_down=slow))
        assert folded is not None
        programs.append(compile_program(folded.layout, folded.compute))
    assert replace(programs[1], prices=programs[0].prices) == programs[0]
    assert programs[1].prices != programs[0].prices
